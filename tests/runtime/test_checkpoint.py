"""Checkpoints are whole or not there."""

from __future__ import annotations

import errno
import hashlib
import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alignkit.errors import RunError, TrainingError
from alignkit.runtime import checkpoint
from alignkit.runtime.checkpoint import (
    Checkpoint,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    trainable_weights,
)
from alignkit.runtime.optim import build_optimizer


def trained(seed: int = 0, steps: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[1].bias.requires_grad_(False)
    optimizer = build_optimizer(model.named_parameters(), 1e-2, 0.1)
    for _ in range(steps):
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_comes_back_is_what_was_saved(tmp_path: Path) -> None:
    model, optimizer = trained()
    final = save_checkpoint(tmp_path, 7, model, optimizer, {"processes": 1}, keep=2)
    assert final == tmp_path / "step-000007"
    found, skipped = find_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.folder, skipped) == (7, final, [])
    assert found.state == {"step": 7, "processes": 1}
    other, other_optimizer = trained(seed=1, steps=1)
    with torch.no_grad():
        other[1].bias.copy_(model[1].bias)  # frozen, so not in the checkpoint
    load_checkpoint(found, other, other_optimizer)
    for _ in range(3):  # going on gives the same weights, moments included
        for m, o in ((model, optimizer), (other, other_optimizer)):
            torch.manual_seed(9)
            m(torch.randn(5, 3)).square().sum().backward()
            o.step()
            o.zero_grad()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name])


def test_only_trained_weights_are_stored(tmp_path: Path) -> None:
    model, _ = trained()
    assert sorted(trainable_weights(model)) == ["0.bias", "0.weight", "1.weight"]


def test_the_manifest_holds_every_file(tmp_path: Path) -> None:
    final = save_checkpoint(tmp_path, 1, *trained(), {}, keep=1)
    manifest = json.loads((final / "manifest.json").read_text(encoding="utf-8"))
    assert sorted([*manifest, "manifest.json"]) == names(final)
    for name, digest in manifest.items():
        assert hashlib.sha256((final / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_are_kept(keep: int, tmp_path: Path) -> None:
    model, optimizer = trained()
    for step in (2, 10, 100, 1000):
        save_checkpoint(tmp_path, step, model, optimizer, {}, keep=keep)
    steps = ["step-000002", "step-000010", "step-000100", "step-001000"]
    assert names(tmp_path) == steps[-keep:]


def test_steps_beyond_a_million_sort_as_numbers(tmp_path: Path) -> None:
    model, optimizer = trained()
    for step in (999_999, 1_000_000):
        save_checkpoint(tmp_path, step, model, optimizer, {}, keep=1)
    found, _ = find_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1_000_000


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    model, optimizer = trained()
    save_checkpoint(tmp_path, 3, model, optimizer, {"note": "old"}, keep=2)
    save_checkpoint(tmp_path, 3, model, optimizer, {"note": "new"}, keep=2)
    found, _ = find_checkpoint(tmp_path)
    assert found is not None
    assert found.state["note"] == "new"
    assert names(tmp_path) == ["step-000003"]


def test_nothing_to_find(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "missing") == (None, [])
    (tmp_path / ".writing-step-000004").mkdir()
    assert find_checkpoint(tmp_path) == (None, [])


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("manifest.json", None, "no readable manifest.json"),
        ("manifest.json", b"{", "no readable manifest.json"),
        ("state.json", b"{}", "state.json does not match its checksum"),
        ("optimizer.pt", None, "optimizer.pt is missing"),
        ("trainable.safetensors", b"", "trainable.safetensors does not match its checksum"),
    ],
)
def test_torn_ones_are_skipped(
    name: str, content: bytes | None, reason: str, tmp_path: Path
) -> None:
    model, optimizer = trained()
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, model, optimizer, {}, keep=5)
    for step in (2, 3):
        path = tmp_path / f"step-{step:06d}" / name
        path.unlink() if content is None else path.write_bytes(content)
    found, skipped = find_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert skipped == [
        f"step-000003 is damaged ({reason}); using the one before",
        f"step-000002 is damaged ({reason}); using the one before",
    ]


def test_weights_of_another_recipe(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, *trained(), {}, keep=1)
    found, _ = find_checkpoint(tmp_path)
    assert found is not None
    model = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(RunError, match=r"holds other weights than the recipe trains, first 1\.we"):
        load_checkpoint(found, model, build_optimizer(model.named_parameters(), 1e-2, 0.0))


class Hostile:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


@pytest.mark.parametrize("held", [Hostile(), 5, {}, {"state": {}, "param_groups": []}])
def test_an_optimizer_file_of_something_else(
    held: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, optimizer = trained()
    folder = save_checkpoint(tmp_path, 1, model, optimizer, {}, keep=1)
    torch.save(held, folder / "optimizer.pt")
    with pytest.raises(RunError, match=r"checkpoint .*step-000001 cannot be read: \w"):
        load_checkpoint(Checkpoint(folder, 1, {}), model, optimizer)
    assert capsys.readouterr().out == ""


def refused(tmp_path: Path, model: nn.Module, optimizer: Any, reason: str) -> None:
    with pytest.raises(TrainingError) as raised:
        save_checkpoint(tmp_path, 2, model, optimizer, {}, keep=2)
    message = raised.value.message
    assert message.startswith(f"the checkpoint of step 2 could not be written to {tmp_path}: ")
    assert reason in message
    assert raised.value.hint.startswith("free disk space and continue with --resume")
    assert names(tmp_path) == ["step-000001"]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained()
    save_checkpoint(tmp_path, 1, model, optimizer, {}, keep=2)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    refused(tmp_path, model, optimizer, "No space left on device")


@pytest.mark.parametrize("limit", [100, 600], ids=["weights", "optimizer"])
def test_a_file_that_cannot_grow(limit: int, tmp_path: Path) -> None:
    # As on a full disk, but for real: neither safetensors nor torch.save raises an OSError.
    model, optimizer = trained()
    save_checkpoint(tmp_path, 1, model, optimizer, {}, keep=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        refused(tmp_path, model, optimizer, "")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    save_checkpoint(tmp_path, 2, model, optimizer, {}, keep=2)
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_the_best_one_stays(tmp_path: Path) -> None:
    model, optimizer = trained()
    for step in range(1, 7):
        save_checkpoint(tmp_path, step, model, optimizer, {}, keep=2, held=2 if step > 1 else 1)
    assert names(tmp_path) == ["step-000002", "step-000005", "step-000006"]
    save_checkpoint(tmp_path, 7, model, optimizer, {}, keep=2, held=7)  # a better one
    assert names(tmp_path) == ["step-000006", "step-000007"]


def test_a_checkpoint_without_its_best_one_is_not_whole(tmp_path: Path) -> None:
    model, optimizer = trained()
    for step, held in ((1, None), (2, 2), (3, 3), (4, 3)):
        save_checkpoint(tmp_path, step, model, optimizer, {}, keep=9, held=held)
    (tmp_path / "step-000003" / "optimizer.pt").unlink()
    found, skipped = find_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 2
    assert skipped == [
        "step-000004 is damaged (of step-000003, its best one, optimizer.pt is missing); "
        "using the one before",
        "step-000003 is damaged (optimizer.pt is missing); using the one before",
    ]
