"""The scalar head of a reward model, its statistics, and how both are stored."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from alignkit.errors import ModelError
from alignkit.files import write_text
from alignkit.models.adapters.files import HEAD_KEY
from alignkit.models.base.files import reading
from alignkit.models.scoring.scorer import causal_model

STATISTICS = "reward.json"
"""Name of the file next to the weights that holds the `RewardStatistics`."""

STD_RANGE = (1e-30, 1e30)
"""Of a standard deviation that rewards can be divided by in float32."""


@dataclass(frozen=True)
class RewardStatistics:
    """Rewards of real completions, for normalising later.

    Args:
        mean: over all completions.
        std: over all completions; population.
        chosen: mean over the chosen completions.
        rejected: mean over the rejected completions.
        accuracy: share of pairs with the chosen completion ahead; ties count half.
        pairs: that were measured.
        rows: `held_out` or `train`.
    """

    mean: float
    std: float
    chosen: float
    rejected: float
    accuracy: float
    pairs: int
    rows: str

    def save(self, folder: Path) -> None:
        """Write the statistics into a model or adapter folder."""
        text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        write_text(folder / STATISTICS, text)


def read_statistics(folder: Path) -> RewardStatistics | None:
    """The statistics in a folder; None if it has none.

    Raises:
        ModelError: the file does not hold them.
    """
    path = folder / STATISTICS
    if not path.is_file():
        return None
    kinds = {field.name: field.type for field in dataclasses.fields(RewardStatistics)}
    with reading(folder, STATISTICS):
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.keys() != kinds.keys():
            raise ValueError(f"it must hold {', '.join(kinds)}")
        for key, kind in kinds.items():
            value = values[key]
            right = isinstance(value, str) if kind == "str" else isinstance(value, int | float)
            if not right:
                raise ValueError(f"{key} cannot be {value!r}")
        low, high = STD_RANGE
        if values["std"] != 0 and not low <= values["std"] <= high:
            raise ValueError(f"std must be 0 or {low:g} to {high:g}, got {values['std']!r}")
        if not abs(values["mean"]) <= high:
            raise ValueError(f"mean must be -{high:g} to {high:g}, got {values['mean']!r}")
    return RewardStatistics(**values)


def new_head(model: PreTrainedModel, seed: int) -> nn.Linear:
    """A fresh scalar head, drawn from N(0, 1 / (H + 1)) as in https://arxiv.org/abs/2009.01325.

    Args:
        model: the language model it is for, hidden size H.
        seed: of the draw.

    Returns:
        `[1, H]` float32 linear layer without bias, on the model's device.
    """
    inner = causal_model(model)
    hidden = int(inner.config.get_text_config().hidden_size)
    head = nn.Linear(hidden, 1, bias=False, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.normal_(0.0, (hidden + 1) ** -0.5, generator=generator)
    return head.to(next(inner.parameters()).device)


def freeze_unused_head(model: Any) -> None:
    """Freeze the vocabulary head, which a reward model never uses, unless it is the input embedding
    too."""
    inner = causal_model(model)
    unused, shared = inner.get_output_embeddings(), inner.get_input_embeddings()
    if unused is not None and unused.weight is not shared.weight:
        unused.requires_grad_(False)


def read_head(folder: Path) -> nn.Linear:
    """The head stored in an adapter folder or in a sequence classifier's folder.

    Args:
        folder: with safetensors files.

    Returns:
        `[1, H]` float32 linear layer.

    Raises:
        ModelError: the folder holds no scalar head.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with reading(folder, "the weights"), safe_open(path, "pt") as file:
            for key in (HEAD_KEY, "score.weight"):
                if key in file.keys():  # noqa: SIM118  it is not a dictionary
                    return _linear(file.get_tensor(key), folder)
    raise ModelError(
        f"{folder} is not a reward model: it holds no scalar head",
        hint="name a run of the reward stage, its adapter/ or its merged/",
    )


def _linear(weight: torch.Tensor, folder: Path) -> nn.Linear:
    if weight.shape[0] != 1:
        raise ModelError(
            f"{folder} is a classifier with {weight.shape[0]} labels, but a reward model has one",
            hint="name a run of the reward stage",
        )
    head = nn.Linear(weight.shape[1], 1, bias=False, dtype=torch.float32)
    head.weight = nn.Parameter(weight.float(), requires_grad=False)
    return head
