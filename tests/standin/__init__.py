"""A stand-in for a CUDA device: it says that it is cuda:0 and computes on the processor.

Tensors on it carry CUDA's dispatch keys, so autocast, autograd, device checks, `.numpy()` and
`.item()` behave as on a GPU, and every branch of the project that asks for CUDA runs. What a GPU
would have to launch and to wait for is counted; time and memory are not simulated.

Not in it: int8 layers (bitsandbytes moves their weight in place), dropout of attention, streams.

`cd tests && python -m standin sft/float32 ppo/bfloat16` prints the counts of whole runs.
"""
