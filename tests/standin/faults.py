"""Faults planted on purpose: tensors left on the host where a stage needs them on the device."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState
from running import train

from alignkit.errors import AlignkitError
from alignkit.models.scoring import scorer
from alignkit.stages.ppo import update
from alignkit.stages.supervised import pairs, reference, reward
from standin.device import device
from standin.runs import recipe_of

PLANTED: dict[str, tuple[str, ModuleType]] = {
    "inputs": ("sft", scorer),
    "roles of pairs": ("dpo", pairs),
    "margins": ("reward", reward),
    "known references": ("kto", reference),
    "columns of an update": ("ppo", update),
}
"""What stays on the host -> a stage that reads it, and the module that copies it."""


def check_faults(folder: Path) -> dict[str, str]:
    """What each planted fault ends with: the error, or "" where nothing was noticed.

    Args:
        folder: as for `compare`.
    """
    return {
        name: _planted(folder / "faults" / stage, stage, module)
        for name, (stage, module) in PLANTED.items()
    }


def _planted(folder: Path, stage: str, module: ModuleType) -> str:
    def stay(array: Any, where: torch.device) -> torch.Tensor:
        return torch.from_numpy(array)

    os.environ["ALIGNKIT_DEVICE"] = "cuda"
    AcceleratorState._reset_state(True)
    with device(), patch.object(module, "on_device", stay):
        try:
            fields = {"reference": {"kind": "cached"}} if stage == "kto" else {}
            train(recipe_of(f"{stage}/float32", folder, training__max_steps=1, **fields))
        except (RuntimeError, AlignkitError) as error:
            return str(error)
    return ""
