"""What only a card can tell, in one command of a few minutes: no network, random weights.

    python benchmarks/gpu.py [--shapes 0.5B 1.5B 8B] [--rows NAME …] [--out FILE]

Rows: attention (the varlen backend against one masked call for each segment, bf16, outputs and
gradients), bits (mm against addmm onto zeros over the shapes of a model's layers), and for each
shape sft, dpo and groups (a prompt with eight branches): seconds of a step, useful operations as a
share of the card's own product of large matrices, and peak memory against the plan; trl sft and
trl dpo: the same rows with TRL's trainers; sampling: milliseconds a token, and graph: the same
token as a CUDA graph. What a missing library or too small a card does not let run is named, and
the rest goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from alignkit.data.documents import Branch, Document
from alignkit.data.packing import pack_documents
from alignkit.generation.rollout import RolloutSettings, TransformersEngine
from alignkit.models.attention.cached import ROUNDING, cached_forward
from alignkit.models.attention.plain import plain_attention
from alignkit.models.attention.varlen import varlen_attention
from alignkit.models.kernels.factors import fixed_factors
from alignkit.models.kernels.lora import use_fast_lora
from alignkit.models.kernels.quantized import multiply_dense
from alignkit.models.scoring.scorer import TokenScorer
from alignkit.packed import Role, Segments
from alignkit.recipe.facts import HardwareFacts, ModelFacts
from alignkit.recipe.planning.memory import estimate_memory
from alignkit.recipe.stages.registry import stages
from alignkit.runtime.devices import tune_cuda
from alignkit.runtime.optim import build_optimizer

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"sizes": (64, 128, 2, 4, 2, 512), "quantized": False},
    "0.5B": {"sizes": (896, 4864, 24, 14, 2, 151_936), "quantized": False},
    "1.5B": {"sizes": (1536, 8960, 28, 12, 2, 151_936), "quantized": False},
    "8B": {"sizes": (4096, 14_336, 32, 32, 8, 128_256), "quantized": True},
}
"""Hidden, intermediate, layers, query heads, key heads, vocabulary; as Qwen2.5 and Llama 3.1."""

BRANCHES = {"sft": 1, "dpo": 2, "groups": 8}
"""Completions of a prompt."""

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
STEPS, WARM = 5, 2
GRAPH_WARM = 3


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.5B", "1.5B", "8B"])
    parser.add_argument("--rows", nargs="+", help="names of rows; all without")
    parser.add_argument("--tokens", type=int, default=8192, help="of a training pass")
    parser.add_argument("--new", type=int, default=64, help="tokens of each sampled response")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(arguments)


# models ----------------------------------------------------------------------------------------


def build(shape: str, *, fast: bool = True) -> Any:
    """A random model in bfloat16 with LoRA of rank 16, its base in NF4 if the shape says so; the
    products are PEFT's and bitsandbytes' own without `fast`."""
    hidden, intermediate, layers, heads, key_heads, vocabulary = SHAPES[shape]["sizes"]
    kind = LlamaConfig if SHAPES[shape]["quantized"] else Qwen2Config
    config = kind(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        max_position_embeddings=32_768,
        tie_word_embeddings=kind is Qwen2Config,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    if SHAPES[shape]["quantized"]:
        quantize(model)
        if fast:
            multiply_dense(model, DTYPE)
    _give_weights(model)
    model.tie_weights()
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=list(TARGETS)))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    if fast:
        use_fast_lora(model)
    return model


def _give_weights(model: nn.Module) -> None:
    """Weights drawn on the card for those on the meta device; buffers are made again."""
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None and weight.is_meta:
                drawn = torch.empty(weight.shape, dtype=DTYPE, device=DEVICE)
                drawn.fill_(1.0) if weight.dim() < 2 else drawn.normal_(std=0.02)
                module._parameters[name] = nn.Parameter(drawn, requires_grad=False)
        if hasattr(module, "rope_init_fn") or type(module).__name__.endswith("RotaryEmbedding"):
            fresh = type(module)(module.config)
            module._buffers.update({k: v.to(DEVICE) for k, v in fresh._buffers.items()})


def quantize(model: nn.Module) -> None:
    """Every linear layer but the head in NF4, drawn layer by layer."""
    import bitsandbytes

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and name in TARGETS:
                shape = (layer.out_features, layer.in_features)
                drawn = torch.empty(shape, dtype=DTYPE, device="cpu").normal_(std=0.02)
                narrow = bitsandbytes.nn.Linear4bit(
                    *reversed(shape), bias=False, compute_dtype=DTYPE, quant_type="nf4"
                )
                narrow.weight = bitsandbytes.nn.Params4bit(
                    drawn, requires_grad=False, quant_type="nf4"
                )
                setattr(parent, name, narrow.to(DEVICE))


def documents(tokens: int, vocabulary: int, branches: int) -> list[Document]:
    """Documents of 200 to 600 tokens: a fifth is prompt, the rest one or more completions."""
    rng, made, total = np.random.default_rng(0), [], 0
    while total < tokens:
        length = min(int(rng.integers(200, 600)), max(20, tokens - total))
        prompt = length // 5
        each = max(2, (length - prompt) // branches)
        own = [
            Branch(
                rng.integers(0, vocabulary, each).astype(np.int32),
                np.ones(each, np.bool_),
                Role.REJECTED if number % 2 else Role.CHOSEN,
            )
            for number in range(branches)
        ]
        ids = rng.integers(0, vocabulary, prompt).astype(np.int32)
        made.append(Document(ids, tuple(own), len(made)))
        total += made[-1].num_tokens
    return made


# rows ------------------------------------------------------------------------------------------


def attention(args: argparse.Namespace) -> dict[str, float]:
    """Largest differences of varlen attention from masked calls, and both times."""
    segments = pack_documents(documents(min(args.tokens, 4096), 100, 2)).segments
    tokens = sum(segment.length for segment in segments)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, tokens, 64) for heads in (8, 2, 2)]
    rows = [torch.randn(shape, generator=generator).to(DEVICE, DTYPE) for shape in shapes]
    found = {name: _attend(path, rows, segments) for name, path in PATHS.items()}
    parts = ("output", "query", "key", "value")
    apart = {
        f"{part} differs by": float((one.float() - other.float()).abs().max())
        for part, one, other in zip(parts, *(found[name][0] for name in PATHS), strict=True)
    }
    return {**apart, **{f"{name} ms": found[name][1] for name in PATHS}}


PATHS: dict[str, Callable[..., torch.Tensor]] = {
    "varlen": varlen_attention,
    "segments": plain_attention,
}


def _attend(
    path: Callable[..., torch.Tensor], rows: Sequence[torch.Tensor], segments: Segments
) -> tuple[list[torch.Tensor], float]:
    leaves = [x.detach().requires_grad_() for x in rows]

    def once() -> list[torch.Tensor]:
        output = path(*leaves, segments)
        return [output.detach(), *torch.autograd.grad(output.float().square().sum(), leaves)]

    return once(), 1e3 * seconds_of(once)


def bits(args: argparse.Namespace) -> dict[str, float]:
    """Products whose bits depend on how they are computed, of all a model's layers."""
    differing = 0
    hidden, intermediate = SHAPES[args.shapes[-1]]["sizes"][:2]
    shapes = [(hidden, hidden), (hidden, intermediate), (intermediate, hidden)]
    for inputs, outputs in shapes:
        x = torch.randn(512, inputs, device="cpu").to(DEVICE, DTYPE)
        weight = torch.randn(outputs, inputs, device="cpu").to(DEVICE, DTYPE)
        onto = torch.zeros(512, outputs, dtype=DTYPE, device=DEVICE).addmm_(x, weight.T)
        differing += int((torch.mm(x, weight.T) != onto).sum())
    return {"shapes": len(shapes), "numbers that differ": differing}


def steps(shape: str, stage: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a training step, its share of the peak, and its memory against the plan."""
    model, branches = build(shape), BRANCHES[stage]
    scorer = TokenScorer(model, DTYPE).train()
    optimizer = build_optimizer(scorer.named_parameters(), 1e-4, 0.0)
    batch = pack_documents(documents(args.tokens, SHAPES[shape]["sizes"][5], branches))
    torch.cuda.reset_peak_memory_stats()

    def once() -> None:
        with fixed_factors(scorer):
            scores: Any = scorer(batch)
            scores.logprobs.mean().neg().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = seconds_of(once)
    work = useful_work(shape, batch.num_tokens, len(batch.target_ids))
    used = torch.cuda.max_memory_allocated()
    planned = planned_bytes(shape, stage, batch.num_tokens)
    return {
        "tokens": batch.num_tokens,
        "seconds": seconds,
        "tokens a second": batch.num_tokens / seconds,
        "share of the peak": work / seconds / peak_rate(min(8192, args.tokens)),
        "peak GB": used / 1e9,
        "planned GB": planned / 1e9,
    }


def trl_steps(shape: str, stage: str, args: argparse.Namespace) -> dict[str, float]:
    """The same step with TRL's trainer, PEFT's products and bitsandbytes' own."""
    from gpu_trl import time_steps  # TRL may be missing

    rows = documents(args.tokens, SHAPES[shape]["sizes"][5], BRANCHES[stage])
    return time_steps(build(shape, fast=False), stage, rows, STEPS, WARM)


def sampling(shape: str, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of one token of a batch of 32 responses."""
    model = TokenScorer(build(shape), DTYPE).model  # with its norms, as in a run
    settings = RolloutSettings(max_new_tokens=args.new, temperature=1.0, stop_tokens=frozenset())
    engine = TransformersEngine(model.get_base_model(), DTYPE, settings)
    prompts = [np.arange(1, 65) + number for number in range(32)]
    seeds = [(0, number) for number in range(32)]
    engine.generate(prompts[:2], seeds[:2])
    started = time.perf_counter()
    engine.generate(prompts, seeds)
    torch.cuda.synchronize()
    return {"ms a token": 1e3 * (time.perf_counter() - started) / args.new, "responses": 32}


def graph(shape: str, args: argparse.Namespace) -> dict[str, float]:
    """The same token captured once as a CUDA graph, and how many tokens it draws otherwise."""
    model = TokenScorer(build(shape), DTYPE).model
    settings = RolloutSettings(max_new_tokens=args.new, temperature=1.0, stop_tokens=frozenset())
    inner = model.get_base_model().eval()
    engine = TransformersEngine(inner, DTYPE, settings)
    prompts = [np.arange(1, 65) + number for number in range(32)]
    seeds = [(0, number) for number in range(32)]
    # A graph holds for the keys of one bucket: of 64 tokens of prompt and 32 that follow.
    tokens = min(args.new, ROUNDING) - 1 - GRAPH_WARM
    with torch.no_grad(), cached_forward(inner), fixed_factors(inner):
        plain = engine.begin(prompts, seeds)
        for _ in range(GRAPH_WARM + tokens):
            engine.next_token(*plain)
        rows, responses, cache = engine.begin(prompts, seeds)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(GRAPH_WARM):
                engine.next_token(rows, responses, cache)
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            engine.next_token(rows, responses, cache)
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(tokens):
            captured.replay()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return {
        "ms a token": 1e3 * seconds / tokens,
        "tokens that differ": int((plain[1].ids != responses.ids).sum()),
    }


# measures --------------------------------------------------------------------------------------


def seconds_of(work: Callable[[], object]) -> float:
    """Median seconds, after a few that compile and fill caches."""
    times = []
    for _ in range(WARM + STEPS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[WARM:])


def peak_rate(side: int) -> float:
    """Operations a second of the card's product of square matrices."""
    one = torch.zeros(side, side, dtype=DTYPE, device=DEVICE)
    return 2.0 * side**3 / seconds_of(lambda: one @ one)


def useful_work(shape: str, tokens: int, targets: int) -> float:
    """Operations of the base's products: 2 a weight and token forward, 2 backward with LoRA."""
    hidden, _, layers, *_, vocabulary = SHAPES[shape]["sizes"]
    facts = model_facts(shape)
    decoder = facts.parameters - 2 * vocabulary * hidden
    return 4.0 * (tokens * max(decoder, layers) + targets * vocabulary * hidden)


def model_facts(shape: str) -> ModelFacts:
    """The shape as the planner sees it; the head counts apart from the embeddings."""
    hidden, intermediate, layers, heads, key_heads, vocabulary = SHAPES[shape]["sizes"]
    width, narrow = hidden, hidden // heads * key_heads
    each = 2 * hidden * (width + narrow) + 3 * hidden * intermediate
    lora = 16 * (2 * (hidden + width) + 2 * (hidden + narrow) + 3 * (hidden + intermediate))
    return ModelFacts(
        architecture=shape,
        parameters=layers * each + 2 * vocabulary * hidden,
        trainable=layers * lora,
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        attention_width=width,
        key_value_width=narrow,
        vocabulary=vocabulary,
        context=32_768,
    )


def planned_bytes(shape: str, stage: str, tokens: int) -> int:
    """What the plan expects of a pass of so many tokens."""
    name = "sft" if stage == "sft" else "dpo"
    kind = "nf4" if SHAPES[shape]["quantized"] else "none"
    values = {
        "stage": name,
        "output": "x",
        "model": {"base": "x", "dtype": "bfloat16", "quantization": kind},
        "data": {"train": [{"path": "x.jsonl"}]},
    }
    recipe = stages()[name].model_validate_json(json.dumps(values)).with_defaults()
    hardware = HardwareFacts("cuda", "card", 80 * 10**9, 1, 1)
    memory = estimate_memory(recipe, model_facts(shape), hardware, tokens, checkpointing=False)
    return memory.peak - memory.libraries


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and keep what was asked for."""
    args = parse(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: this measures a card")
    tune_cuda(deterministic=False)
    rows: dict[str, Callable[[], dict[str, float]]] = {
        "attention": partial(attention, args),
        "bits": partial(bits, args),
    }
    for shape in args.shapes:
        for stage in ("sft", "dpo", "groups"):
            rows[f"{shape} {stage}"] = partial(steps, shape, stage, args)
        for stage in ("sft", "dpo"):
            rows[f"{shape} trl {stage}"] = partial(trl_steps, shape, stage, args)
        rows[f"{shape} sampling"] = partial(sampling, shape, args)
        rows[f"{shape} graph"] = partial(graph, shape, args)
    found: dict[str, Any] = {}
    for name, row in rows.items():
        if args.rows and not any(wanted in name for wanted in args.rows):
            continue
        try:
            found[name] = row()
            shown = ", ".join(f"{key} {_short(value)}" for key, value in found[name].items())
        except Exception as error:  # the next row may run all the same
            where = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {error}".split("\n")[0][:200]
            found[name] = {"skipped": f"{reason} ({Path(where.filename).name}:{where.lineno})"}
            shown = f"skipped, {found[name]['skipped']}"
        print(f"{name}: {shown}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    record = {
        "card": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "torch": torch.__version__,
        "machine": describe_machine(),
        "date": time.strftime("%Y-%m-%d"),
        "rows": found,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def _short(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else str(value)


if __name__ == "__main__":
    main()
