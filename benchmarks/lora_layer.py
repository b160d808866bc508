"""LoRA alone against PEFT's: the seven adapted layers of one decoder layer, forward and backward.

No attention, norm or loss: each layer reads an input of the right shape, queries, keys and values
the same one, gate and up the same one. The base is bfloat16, the adapters are float32, PEFT's
default; all engines hold the same weights. PEFT runs twice: under autocast, as trainers call it,
and plainly, as a model in bfloat16 is called, where it computes the update in float32. Before
anything is timed the outputs and gradients are compared, in float32 and in bfloat16.

    python benchmarks/lora_layer.py --out result.json
    python benchmarks/lora_layer.py --quantization nf4

They take turns in one process (A B B A ...), all with the allocator settings of a run, or none with
`--plain-allocator`; times are medians of passes, ratios are medians of rounds with a bootstrap
interval. One more engine is the base alone, without adapters, whose weights are frozen too: the
time that no LoRA can do without. So ratios are given of the whole, and of what each engine adds to
the base. Over a quantized base that one is bitsandbytes' own layers, which engines may undercut.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from machine import describe_machine
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from alignkit.models.kernels.lora import use_fast_lora
from alignkit.models.kernels.quantized import multiply_dense
from alignkit.runtime.processor import tune_processor

READS = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": ("self_attn.o_proj",),
    "feed_forward": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Input -> the layers that read it."""

ENGINES = ("alignkit", "peft", "peft_plain", "base")

PACKAGES = ("torch", "transformers", "peft", "alignkit")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder whose config.json gives the widths; default 135M")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--passes", type=int, default=5, help="of an engine in each round")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quantization", choices=("none", "nf4", "int8"), default="none")
    parser.add_argument("--plain-allocator", action="store_true", help="as Python starts")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def widths(model: str | None) -> Any:
    if model is not None:
        return AutoConfig.from_pretrained(model).get_text_config()
    return LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3
    )


def quantize(layer: nn.Module, kind: str, device: str) -> None:
    """Put bitsandbytes' layers in the place of linear ones."""
    for name, linear in list(layer.named_modules()):
        if not isinstance(linear, nn.Linear):
            continue
        sizes = linear.in_features, linear.out_features
        if kind == "nf4":
            narrow: nn.Linear = Linear4bit(
                *sizes, bias=False, compute_dtype=linear.weight.dtype, quant_type="nf4"
            )
            narrow.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        else:
            narrow = Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
            narrow.weight = Int8Params(
                linear.weight.data, requires_grad=False, has_fp16_weights=False
            )
        layer.set_submodule(name, narrow.to(device))
    layer.is_loaded_in_4bit, layer.is_loaded_in_8bit = kind == "nf4", kind == "int8"  # for PEFT


class Layer:
    """One decoder layer's linear layers, and the inputs and gradients they get."""

    def __init__(self, kind: str, options: argparse.Namespace, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        config = widths(options.model)
        config._attn_implementation = "eager"
        layer = LlamaDecoderLayer(config, 0).to(options.device, dtype)
        if options.quantization != "none":
            quantize(layer, options.quantization, options.device)
            if kind == "alignkit":
                multiply_dense(layer, dtype)
        self.kind, self.dtype, self.device = kind, dtype, options.device
        if kind != "base":
            lora = LoraConfig(
                r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear"
            )
            layer = get_peft_model(layer, lora)
            generator = torch.Generator().manual_seed(1)
            for name, weight in layer.named_parameters():
                if "lora_B" in name:
                    weight.data = 0.02 * torch.randn(weight.shape, generator=generator)
                    weight.data = weight.data.to(options.device)
            if kind == "alignkit":
                use_fast_lora(layer)
            layer = layer.base_model.model
        else:
            layer.requires_grad_(False)
        self.weights = {n: p for n, p in layer.named_parameters() if p.requires_grad}
        self.layers = {n: layer.get_submodule(n) for names in READS.values() for n in names}
        generator = torch.Generator().manual_seed(2)

        def draw(width: int) -> torch.Tensor:
            found = torch.randn(1, options.tokens, width, generator=generator)
            return found.to(options.device, dtype)

        self.inputs = {}
        self.slopes = {}
        for read, names in READS.items():
            bases = [getattr(self.layers[n], "base_layer", self.layers[n]) for n in names]
            self.inputs[read] = draw(bases[0].in_features).requires_grad_()
            self.slopes |= {n: draw(b.out_features) for n, b in zip(names, bases, strict=True)}

    def run(self) -> dict[str, torch.Tensor]:
        """Outputs and all gradients of one pass."""
        narrow = self.dtype != torch.float32 and self.kind != "peft_plain"
        context = torch.autocast(self.device, self.dtype) if narrow else contextlib.nullcontext()
        with context:
            outputs = {n: self.layers[n](self.inputs[r]) for r, ns in READS.items() for n in ns}
        leaves = {**self.inputs, **self.weights}
        slopes = [self.slopes[name].to(y.dtype) for name, y in outputs.items()]
        found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), slopes)
        return {**outputs, **dict(zip(leaves, found, strict=True))}

    def seconds(self, passes: int) -> float:
        times = []
        for _ in range(passes):
            start = time.perf_counter()
            self.run()
            if self.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)


def difference(options: argparse.Namespace, dtype: torch.dtype) -> float:
    """Largest distance of a result to PEFT's, relative to the result's norm."""
    ours, theirs = (Layer(kind, options, dtype).run() for kind in ("alignkit", "peft"))
    assert ours.keys() == theirs.keys()
    return max(
        float((ours[n].float() - theirs[n].float()).norm() / theirs[n].float().norm())
        for n in theirs
    )


def ratio(theirs: np.ndarray, ours: np.ndarray) -> dict[str, float]:
    """Median over rounds, with a bootstrap interval."""
    ratios = theirs / ours
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return {"median": float(np.median(ratios)), "low": float(low), "high": float(high)}


def main() -> None:
    options = parse()
    if not options.plain_allocator:
        tune_processor()
    parity = {str(t).removeprefix("torch."): difference(options, t) for t in DTYPES}
    for dtype, limit in DTYPES.items():
        name = str(dtype).removeprefix("torch.")
        assert parity[name] <= limit, f"not the same arithmetic in {name}: {parity[name]:.2g}"
    engines = {kind: Layer(kind, options, torch.bfloat16) for kind in ENGINES}
    for engine in engines.values():
        engine.seconds(3)
    rounds: dict[str, list[float]] = {kind: [] for kind in engines}
    for number in range(options.rounds):
        order = list(engines) if number % 2 == 0 else list(engines)[::-1]
        for kind in order:
            rounds[kind].append(engines[kind].seconds(options.passes))
    ours, theirs, plain, base = (np.asarray(rounds[kind]) for kind in ENGINES)
    result = {
        "what": "seven LoRA layers of one decoder layer, forward and backward",
        "machine": describe_machine(),
        "date": datetime.date.today().isoformat(),
        "arguments": {k: v for k, v in vars(options).items() if k not in ("out", "model")},
        "packages": {name: version(name) for name in PACKAGES},
        "largest_relative_difference": parity,
        "milliseconds": {k: 1e3 * statistics.median(v) for k, v in rounds.items()},
        "times_peft": ratio(theirs, ours),
        "times_peft_plain": ratio(plain, ours),
        "times_peft_beyond_the_base": ratio(theirs - base, ours - base),
        "times_peft_plain_beyond_the_base": ratio(plain - base, ours - base),
        "bound_by_the_base": ratio(theirs, base),
        "bound_by_the_base_plain": ratio(plain, base),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Precision -> accepted difference to PEFT; in bfloat16 PEFT rounds more often."""


if __name__ == "__main__":
    main()
