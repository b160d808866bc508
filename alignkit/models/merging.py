"""Adapter -> dense checkpoint that plain transformers loads, verified.

The merge runs in float32, W + (alpha / rank) · B A, and is rounded once to the base's dtype,
stochastically and with a fixed seed, because rounding to the nearest loses small updates. Then the
written files are read back and compared: every weight with the expected one, bit for bit, and the
logits with those of base + adapter on real rows. The report says how much of the update survived.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from alignkit.errors import ModelError
from alignkit.models.adapter_files import load_adapter
from alignkit.models.loading import BaseModel, load_model, load_tokenizer, quiet_transformers
from alignkit.models.rounding import round_stochastically
from alignkit.models.writing import beside, write_language_model
from alignkit.packed import IntArray

CHECK_TOKENS = 256
"""Positions on which logits are compared."""

MAX_KL = (1e-3, 1e-2)
"""Nats per token that rounding may move the merged model away from base + adapter: below the first
it always may, above the second never."""

MAX_KL_SHARE = 0.05
"""In between, as a share of the distance between base + adapter and the base."""


@dataclass(frozen=True)
class MergeReport:
    """What the merge did and how faithful it is.

    Args:
        output: the merged folder.
        dtype: of the written weights.
        modules: adapted layers.
        survived: projection of the rounded update on the exact one; 1.0 is all of it.
        rounding_error: norm of what rounding changed, relative to the norm of the update.
        max_logit_difference: largest |difference| to base + adapter, both in float32 arithmetic.
        mean_kl: KL(base + adapter ‖ merged) in nats per token.
        mean_kl_to_base: KL(base + adapter ‖ base): how far training moved the model.
        same_top_token: share of positions with the same likeliest token.
        positions: tokens compared.
    """

    output: str
    dtype: str
    modules: int
    survived: float
    rounding_error: float
    max_logit_difference: float
    mean_kl: float
    mean_kl_to_base: float
    same_top_token: float
    positions: int

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """The report in sentences."""
        return [
            f"merged {self.modules} layers into {self.output} ({self.dtype})",
            f"against base + adapter on {self.positions} tokens: largest logit difference "
            f"{self.max_logit_difference:.3g}, KL {self.mean_kl:.2g} nats/token "
            f"(training moved it by {self.mean_kl_to_base:.2g}), same top token "
            f"{self.same_top_token:.1%}",
            f"{self.survived:.1%} of the update survived rounding to {self.dtype}, under random "
            f"noise of {self.rounding_error:.0%} of the update's size that averages out",
        ]


def merge_adapter(
    base: BaseModel,
    adapter: Path,
    output: Path,
    *,
    rows: Sequence[IntArray],
    dtype: torch.dtype,
    tokenizer: Any = None,
    stop_tokens: Sequence[int] = (),
    overwrite: bool = False,
) -> MergeReport:
    """Write the merged model and verify it.

    Args:
        base: the model the adapter was trained on.
        adapter: PEFT LoRA folder.
        output: folder to write; stands there only once the merge is verified.
        rows: token ids of real rows, at least one with two tokens.
        dtype: of the written weights.
        tokenizer: saved beside the weights; None takes the base's.
        stop_tokens: ids that end an answer, added to the generation settings.
        overwrite: replace an existing output.

    Returns:
        The measured differences.

    Raises:
        ModelError: the output exists, the adapter does not fit, or the merge is not faithful.
    """
    if output.exists() and not overwrite:
        raise ModelError(
            f"{output} already exists", hint="add --overwrite, or name another --output"
        )
    model = load_adapter(load_model(base, torch.float32), adapter)
    samples = _samples(rows)
    exact = _logits(model, samples)
    with model.disable_adapter():
        kl_to_base = _mean_kl(exact, _logits(model, samples))
    survived, error, modules = merge_layers(model, dtype)
    with quiet_transformers():
        merged = model.merge_and_unload()
    del model
    with beside(output) as written:
        tokenizer = tokenizer or load_tokenizer(base)
        read_back = write_language_model(merged.to(dtype), tokenizer, written, stop_tokens)
        del merged
        found = _logits(read_back.float(), samples)
        report = MergeReport(
            output=str(output),
            dtype=str(dtype).removeprefix("torch."),
            modules=modules,
            survived=survived,
            rounding_error=error,
            max_logit_difference=float((found - exact).abs().max()),
            mean_kl=_mean_kl(exact, found),
            mean_kl_to_base=kl_to_base,
            same_top_token=float((found.argmax(-1) == exact.argmax(-1)).float().mean()),
            positions=len(exact),
        )
        _require_faithful(report)
    return report


def write_dense(
    model: Any, tokenizer: Any, output: Path, dtype: torch.dtype, stop_tokens: Sequence[int]
) -> None:
    """Write a model whose weights were all trained, and read it back bit for bit.

    Args:
        model: cast in place.
        tokenizer: saved with its chat template.
        output: folder to write, replaced if it exists; stands there only once it is verified.
        dtype: of the written weights.
        stop_tokens: ids that end an answer, added to the generation settings.

    Raises:
        ModelError: the files do not hold what was written.
    """
    with beside(output) as written:
        write_language_model(model.to(dtype), tokenizer, written, stop_tokens)


def _require_faithful(report: MergeReport) -> None:
    low, high = MAX_KL
    limit = min(high, max(low, MAX_KL_SHARE * report.mean_kl_to_base))
    if report.mean_kl <= limit and report.survived > 0.5:
        return
    raise ModelError(
        f"the merged model is not faithful to base + adapter: KL {report.mean_kl:.2g} nats/token "
        f"is more than {limit:.2g}, and {report.survived:.1%} of the update survived rounding "
        f"to {report.dtype}",
        hint="merge into wider weights with --dtype float32; nothing was written",
    )


def _samples(rows: Sequence[IntArray]) -> list[torch.Tensor]:
    """First tokens of the rows, `CHECK_TOKENS` in all, from at most eight rows."""
    samples, left = [], CHECK_TOKENS
    each = max(2, CHECK_TOKENS // min(8, len(rows)))
    for row in rows:
        ids = torch.as_tensor(row[: min(each, left)], dtype=torch.long)
        if len(ids):
            samples.append(ids)
            left -= len(ids)
        if left <= 0:
            break
    return samples


@torch.no_grad()
def _logits(model: Any, samples: list[torch.Tensor]) -> torch.Tensor:
    """`[N, V]` float32 logits at every position of the samples."""
    found = [model(input_ids=ids[None], use_cache=False).logits[0].float() for ids in samples]
    return torch.cat(found)


def _mean_kl(exact: torch.Tensor, other: torch.Tensor) -> float:
    """Mean over positions of KL(exact ‖ other) in nats."""
    p, q = torch.log_softmax(exact, -1), torch.log_softmax(other, -1)
    return float((p.exp() * (p - q)).sum(-1).mean().clamp_min(0.0))


@torch.no_grad()
def merge_layers(model: nn.Module, dtype: torch.dtype) -> tuple[float, float, int]:
    """Merge and round every adapted layer in place.

    Args:
        model: base in float32 with its adapter.
        dtype: that the weights are rounded to; they stay float32.

    Returns:
        How much of all updates survived, the size of what rounding changed relative to the
        updates, and the number of layers.
    """
    kept = squared = lost = 0.0
    modules = 0
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        weight = module.get_base_layer().weight
        before = weight.detach().clone()
        with quiet_transformers():
            module.merge(safe_merge=True)
        weight = module.get_base_layer().weight
        update = weight - before
        rounded = round_stochastically(weight.detach(), dtype, generator).float()
        weight.copy_(rounded)
        rounded = rounded - before  # not in place: in float32 it is the weight itself
        kept += float((rounded * update).sum(dtype=torch.float64))
        squared += float(update.square().sum(dtype=torch.float64))
        lost += float((rounded - update).square().sum(dtype=torch.float64))
        modules += 1
    if squared == 0.0:
        return 1.0, 0.0, modules
    return kept / squared, (lost / squared) ** 0.5, modules
