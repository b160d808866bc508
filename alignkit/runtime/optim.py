"""The optimizer and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from alignkit.errors import NotFiniteError, TrainingError
from alignkit.runtime.loss_scale import LossScale
from alignkit.runtime.schedule import learning_rate_at

try:
    import bitsandbytes
except ImportError:  # an extra: only these optimizers need it
    bitsandbytes = None

ADAM_EPSILON = 1e-8

_OF_BITSANDBYTES = {
    "adamw_8bit": ("AdamW8bit", ("cuda", "cpu")),
    "paged_adamw_8bit": ("PagedAdamW8bit", ("cuda",)),
    "lion": ("Lion", ("cuda", "cpu")),
    "lion_8bit": ("Lion8bit", ("cuda", "cpu")),
}
"""Name in a recipe -> its class, and where that has kernels. Elsewhere the paged optimizer silently
does not page."""

RATE_FACTOR = "rate_factor"
"""Key of a parameter group: its learning rate as a multiple of the schedule's."""


def require_optimizer(kind: str, device: str) -> None:
    """Refuse an optimizer that cannot run here.

    Args:
        kind: as in `build_optimizer`.
        device: type of the device.

    Raises:
        TrainingError: bitsandbytes is missing, or has no kernels for the device.
    """
    if kind not in _OF_BITSANDBYTES:
        return
    devices = _OF_BITSANDBYTES[kind][1]
    if bitsandbytes is None:
        raise TrainingError(
            f"training.optimizer = {kind} needs bitsandbytes, which is not installed",
            hint="pip install 'alignkit[quantization]'",
        )
    if device not in devices:
        narrow = "adamw_8bit or " * (device in _OF_BITSANDBYTES["adamw_8bit"][1])
        raise TrainingError(
            f"training.optimizer = {kind} runs on {' and '.join(devices)}, not on {device}",
            hint=f"set training.optimizer={narrow}adamw",
        )


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]],
    learning_rate: float,
    weight_decay: float,
    *,
    kind: str = "adamw",
    betas: tuple[float, float] | None = None,
    epsilon: float = ADAM_EPSILON,
    b_rate: float = 1.0,
) -> torch.optim.Optimizer:
    """An optimizer over the trainable weights.

    At step t, with gradient g, rate η and decay λ, each first multiplies the weight w by 1 - ηλ;
    then, with moments m and v from 0:

    - AdamW: m ← β₁m + (1-β₁)g, v ← β₂v + (1-β₂)g², w ← w - η m̂ / (√v̂ + ε), where
      m̂ = m / (1-β₁ᵗ), v̂ = v / (1-β₂ᵗ)
    - Lion: w ← w - η sign(β₁m + (1-β₁)g), m ← β₂m + (1-β₂)g
    - Adafactor, over matrices: r and c are means of g² over columns and rows that decay by
      1 - t⁻⁰·⁸; u = g / √(r cᵀ / mean r), w ← w - min(η, 1/√t) max(10⁻³, rms w) u / max(1, rms u).
      Vectors keep v whole instead of r and c

    In 8 bits a moment is rounded to one of 256 values, scaled by the largest of 256 neighbours.
    Weights with fewer than 4,096 elements keep theirs in float32: bitsandbytes' default.

    Args:
        parameters: names and weights; those without `requires_grad` are left out.
        learning_rate: peak; the schedule scales it.
        weight_decay: decoupled; not applied to vectors (biases and norms) nor to IA3's scales,
            whose neutral value is 1, nor to weights with an attribute `no_decay`.
        kind: as in a recipe, accepted by `require_optimizer`.
        betas: of the moments; None for Adafactor, and for AdamW's own 0.9 and 0.999.
        epsilon: of AdamW, added to the root of the second moment.
        b_rate: learning rate of LoRA's B matrices as a multiple of the others' (LoRA+,
            https://arxiv.org/abs/2402.12354).
    """
    named = sorted((n, p) for n, p in parameters if p.requires_grad)
    kinds: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, weight in named:
        held = getattr(weight, "no_decay", False)
        plain = weight.ndim < 2 or ".ia3_l." in name or held
        faster = b_rate != 1.0 and ".lora_B." in name
        kinds.setdefault((plain, faster), []).append(weight)
    groups = [
        {
            "params": weights,
            "weight_decay": 0.0 if plain else weight_decay,
            RATE_FACTOR: b_rate if faster else 1.0,
        }
        for (plain, faster), weights in sorted(kinds.items(), key=lambda item: item[0])
    ]
    options: dict[str, Any] = {"lr": learning_rate, "betas": betas or (0.9, 0.999)}
    if kind == "adafactor":
        return torch.optim.Adafactor(groups, lr=learning_rate)
    if "lion" not in kind:
        options["eps"] = epsilon
    if kind in _OF_BITSANDBYTES:
        made: torch.optim.Optimizer = getattr(bitsandbytes.optim, _OF_BITSANDBYTES[kind][0])(
            groups, **options
        )
        return made
    fused = all(p.device.type in ("cuda", "cpu") for _, p in named)
    return torch.optim.AdamW(groups, fused=fused, **options)


class Optimizers:
    """Several optimizers that step together and are stored as one.

    Args:
        parts: name -> optimizer, each with its weights.
    """

    def __init__(self, parts: dict[str, torch.optim.Optimizer]) -> None:
        self.parts = parts

    def state_dict(self) -> dict[str, Any]:
        """The states by name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the states."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every parameter group, times the group's factor if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(RATE_FACTOR, 1.0)


@dataclass(frozen=True)
class TrainedPart:
    """Weights that share an optimizer.

    Args:
        name: as in the plan's peak rates; the first part's metrics carry no name.
        weights: whose gradient norm is clipped.
        optimizer: of these weights.
    """

    name: str
    weights: Sequence[nn.Parameter]
    optimizer: Any


def set_rates(
    parts: Sequence[TrainedPart], step: int, *, peaks: Mapping[str, float], **shape: Any
) -> dict[str, float]:
    """Set the learning rates of one step.

    Args:
        parts: each has its peak.
        step: from 0.
        peaks: name of a part -> its peak.
        **shape: of all parts' schedules; see `learning_rate_at`.

    Returns:
        `learning_rate` of the first part, and `<name>_learning_rate` of each other one.
    """
    rates = {}
    for number, part in enumerate(parts):
        rate = learning_rate_at(step, peak=peaks[part.name], **shape)
        set_learning_rate(part.optimizer, rate)
        rates[_metric(part, number, "learning_rate")] = rate
    return rates


def step_parts(
    parts: Sequence[TrainedPart],
    step: int,
    loss: float,
    *,
    limit: float | None,
    clip: Callable[..., Any] = nn.utils.clip_grad_norm_,
    scale: LossScale,
) -> dict[str, float]:
    """Clip the gradients of each part, step its optimizer and clear them.

    Gradients of scaled losses that overflow are dropped, and the next step is scaled less.

    Args:
        parts: with the gradients of a whole step.
        step: from 0, for messages.
        loss: of the step, for messages.
        limit: of the gradient norm of a part; None never clips.
        clip: like torch's own; returns the norm before clipping.
        scale: of the losses whose gradients these are.

    Returns:
        Norms before clipping: `grad_norm` of the first part, `<name>_grad_norm` of the others.

    Raises:
        NotFiniteError: a norm is not finite; no weight has changed.
    """
    norms = {}
    for number, part in enumerate(parts):
        scale.divide(part.weights)
        total = clip(part.weights, math.inf if limit is None else limit)
        norm = math.nan if total is None else float(total)
        if total is not None and not math.isfinite(norm):
            if scale.overflowed():
                return _without_step(parts)
            where = f"the {part.name} in " if len(parts) > 1 else ""
            raise NotFiniteError(
                f"the gradient of {where}step {step + 1} is not finite; its loss is {loss:.4g}",
                hint="lower training.learning_rate, or set training."
                + ("max_grad_norm" if limit is None else "on_bad_step=skip"),
            )
        norms[_metric(part, number, "grad_norm")] = norm
    for part in parts:
        part.optimizer.step()
        part.optimizer.zero_grad(set_to_none=True)
    scale.passed()
    return norms


def _without_step(parts: Sequence[TrainedPart]) -> dict[str, float]:
    """Norms of a step that changes no weight."""
    for part in parts:
        part.optimizer.zero_grad(set_to_none=True)
    return {_metric(part, number, "grad_norm"): math.nan for number, part in enumerate(parts)}


def _metric(part: TrainedPart, number: int, name: str) -> str:
    return f"{part.name}_{name}" if number else name
