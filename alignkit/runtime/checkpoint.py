"""Checkpoints that are whole or not there, and know the checksums of their files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from alignkit.errors import FileError, RunError, TrainingError
from alignkit.files import read_json, remove, replace_folder
from alignkit.runtime.optim import Optimizers

_FILES = {"trainable.safetensors", "optimizer.pt", "state.json"}
"""What every manifest names."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk.

    Args:
        folder: `checkpoints/step-000050`.
        step: optimizer steps done.
        state: what the loop stored next to the tensors.
    """

    folder: Path
    step: int
    state: dict[str, Any]


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Optimizers,
    state: dict[str, Any],
    keep: int,
    held: int | None = None,
) -> Path:
    """Write one checkpoint and remove old ones.

    Args:
        folder: `checkpoints/` of the run.
        step: optimizer steps done.
        model: its trainable weights are stored.
        optimizer: its whole state is stored.
        state: plain values that the loop needs to continue.
        keep: number of newest checkpoints that stay.
        held: step of a further one that stays.

    Returns:
        The folder of the checkpoint.

    Raises:
        TrainingError: a weight is not finite, or the files could not be written.
    """
    weights = trainable_weights(model)
    require_finite_weights(weights, f"after step {step}")
    final = step_folder(folder, step)
    try:
        with replace_folder(final) as written:
            save_file(weights, written / "trainable.safetensors")
            torch.save(optimizer.state_dict(), written / "optimizer.pt")
            kept = {} if held is None else {"held": held}
            text = json.dumps({"step": step, **kept, **state})
            (written / "state.json").write_text(text, encoding="utf-8")
            manifest = {path.name: _hash(path) for path in sorted(written.iterdir())}
            (written / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    except (OSError, SafetensorError, RuntimeError) as error:
        # On a full disk safetensors and torch.save raise errors of their own.
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise TrainingError(
            f"the checkpoint of step {step} could not be written to {folder}: {reason}",
            hint="free disk space and continue with --resume; earlier checkpoints are whole",
        ) from error
    # Later ones are damaged leftovers from before a resume; they must not crowd out whole ones.
    stored = _by_step(folder)
    current = stored.index(final)
    for old in [*stored[: current + 1][:-keep], *stored[current + 1 :]]:
        if held is None or old != step_folder(folder, held):
            remove(old)
    return final


def find_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint. One that holds another is whole only with it.

    Args:
        folder: `checkpoints/` of a run; may be missing.

    Returns:
        The checkpoint, or None, and a sentence for each torn one that was skipped.
    """
    skipped: list[str] = []
    for candidate in reversed(_by_step(folder)):
        fault = _fault(candidate)
        state = {} if fault else read_json(candidate / "state.json")
        held = state.get("held")
        if held is not None and held != state["step"]:
            best = step_folder(folder, held)
            fault = _fault(best)
            fault = fault and f"of {best.name}, its best one, {fault}"
        if fault is None:
            return Checkpoint(candidate, int(state["step"]), state), skipped
        skipped.append(f"{candidate.name} is damaged ({fault}); using the one before")
    return None, skipped


def step_folder(folder: Path, step: int) -> Path:
    """Folder of the checkpoint after a step.

    Args:
        folder: `checkpoints/` of a run.
        step: optimizer steps done.
    """
    return folder / f"step-{step:06d}"


def stored_state(folder: Path) -> dict[str, Any]:
    """What the loop stored in the newest checkpoint whose state.json is whole; {} without one.

    Args:
        folder: `checkpoints/` of a run; may be missing. No tensor is read.
    """
    for candidate in reversed(_by_step(folder)):
        if _fault(candidate, only="state.json") is None:
            return read_json(candidate / "state.json")
    return {}


def stored_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every trained weight in a checkpoint; no tensor is read."""
    with safe_open(checkpoint.folder / "trainable.safetensors", framework="pt") as stored:
        return {name: tuple(stored.get_slice(name).get_shape()) for name in list(stored.keys())}


def load_weights(folder: Path, model: nn.Module) -> None:
    """Restore the stored weights.

    Args:
        folder: of one checkpoint.
        model: gets them.

    Raises:
        RunError: they are not those of the model, or cannot be read.
    """
    try:
        stored = load_file(folder / "trainable.safetensors")
    except (OSError, SafetensorError) as error:
        raise RunError(f"checkpoint {folder} cannot be read: {error}") from error
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if stored.keys() != named.keys():
        odd = sorted(stored.keys() ^ named.keys())
        raise RunError(
            f"{folder} holds other weights than the recipe trains, first {odd[0]}",
            hint="resume with the recipe that started the run",
        )
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(stored[name])


def load_checkpoint(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer | Optimizers
) -> None:
    """Restore the stored weights and optimizer state.

    Raises:
        RunError: the weights in the checkpoint are not those of the model, or its files hold
            something else than was saved.
    """
    try:
        load_weights(checkpoint.folder, model)
        path = checkpoint.folder / "optimizer.pt"
        optimizer.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (MemoryError, RunError):
        raise
    except Exception as error:  # what is no state of this optimizer may end in any error
        kind, line = type(error).__name__, str(error).strip().split("\n")[0][:200]
        reason = line if isinstance(error, OSError | ValueError) else f"{kind}: {line}"
        if isinstance(error, UnpicklingError):
            reason = "optimizer.pt is a pickle of more than tensors and plain values"
        raise RunError(
            f"checkpoint {checkpoint.folder} cannot be read: {reason}",
            hint="remove its folder and resume again: the checkpoint before it is used",
        ) from error


def trainable_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> value of every trainable weight, on the CPU."""
    return {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def require_finite_weights(weights: Mapping[str, torch.Tensor], when: str) -> None:
    """Refuse to store weights that are not finite.

    Args:
        weights: name -> value.
        when: ends the sentence, as in `after step 3`.

    Raises:
        TrainingError: one holds an infinity or a NaN.
    """
    for name, weight in weights.items():
        if weight.numel() and not all(bound.isfinite() for bound in weight.aminmax()):
            raise TrainingError(
                f"{name} is not finite {when}: it is not saved",
                hint="lower training.learning_rate or training.weight_decay; earlier checkpoints "
                "are whole",
            )


def _by_step(folder: Path) -> list[Path]:
    """Checkpoints, oldest first; the number outgrows its six digits at a million steps."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdecimal()]
    return sorted(found, key=lambda path: (len(path.name), path.name))


def _fault(folder: Path, only: str | None = None) -> str | None:
    """What is wrong with a checkpoint, or with one of its files."""
    try:
        expected = read_json(folder / "manifest.json")
    except FileError:
        return "no readable manifest.json"
    if not expected.keys() >= _FILES:
        return "no readable manifest.json"
    for name in [only] if only else expected:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _hash(path) != expected[name]:
            return f"{name} does not match its checksum"
    return None


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
