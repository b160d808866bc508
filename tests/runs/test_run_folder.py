"""One run at a time in a folder, from before its weights are read; a run that fails to start leaves
nothing."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any

import pytest
from running import make_ppo_recipe, make_recipe, train
from safetensors.torch import save_file
from tiny import save_tiny, tiny_model

from alignkit import files
from alignkit.errors import AlignkitError, ModelError, RunError
from alignkit.recipe.reading.load import load_recipe
from alignkit.stages.registry import run_stage
from alignkit.stages.rollouts import roles
from alignkit.stages.running import session
from alignkit.stages.running.record import require_same_inputs
from alignkit.stages.running.run_folder import RunFolder
from alignkit.stages.running.session import RunOptions


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize(("make", "module"), [(make_recipe, session), (make_ppo_recipe, roles)])
def test_a_second_run_reads_no_weights(
    make: Any, module: Any, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make(tmp_path, tiny_base, training__max_steps=1, merge=False)
    load, start, loads, refused = module.load_model, session.start_model, [], []

    def load_while_another_starts(*args: Any) -> Any:
        loads.append(args)
        starts: list[Any] = []
        monkeypatch.setattr(session, "start_model", starts.append)
        with pytest.raises(RunError, match="run is in use by another process"):
            train(recipe)
        monkeypatch.setattr(session, "start_model", start)
        refused.append(starts)
        return load(*args)

    monkeypatch.setattr(module, "load_model", load_while_another_starts)
    train(recipe)
    assert refused == [[]]  # not even its base was looked for
    assert len(loads) == 1
    assert (tmp_path / "run" / "adapter").is_dir()


@pytest.mark.parametrize("make", [make_recipe, make_ppo_recipe])
def test_weights_that_cannot_be_read_leave_nothing(make: Any, tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    output = tmp_path / "new" / "folder" / "run"
    recipe = make(tmp_path, tmp_path / "base", output=str(output), training__max_steps=1)
    spoil(tmp_path / "base")
    with pytest.raises(ModelError, match="the weights of"):
        train(recipe)
    assert not (tmp_path / "new").exists()
    output.mkdir(parents=True)
    with pytest.raises(ModelError, match="the weights of"):
        train(recipe)
    assert list(output.iterdir()) == []  # what somebody else created stays


def spoil(base: Path) -> None:
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


@pytest.mark.parametrize("fault", ["weights", "rows"])
def test_an_old_run_stays_until_the_new_one_can_start(fault: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    recipe = make_recipe(tmp_path, tmp_path / "base", training__max_steps=1, merge=False)
    train(recipe)
    before = contents(tmp_path / "run")
    if fault == "weights":
        spoil(tmp_path / "base")
    else:
        (tmp_path / "rows.jsonl").write_text("{", encoding="utf-8")
    loaded = load_recipe(str(recipe)).recipe
    for options in (RunOptions(overwrite=True, quiet=True), RunOptions(resume=True, quiet=True)):
        with pytest.raises(AlignkitError):
            run_stage(loaded, options)
        assert contents(tmp_path / "run") == before


def test_a_run_is_not_resumed_over_other_weights(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    recipe = make_recipe(tmp_path, tmp_path / "base", training__max_steps=1, merge=False)
    train(recipe)
    before = contents(tmp_path / "run")
    weights = tiny_model(seed=1).state_dict()
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match="base has changed since the run was started"):
        train(recipe, resume=True)
    assert contents(tmp_path / "run") == before


def test_a_run_is_not_resumed_over_other_tokens_of_the_same_rows() -> None:
    same = {"fingerprint": "a"}
    stored = {"base": same, "adapter": same, "objective": same, "rewards": {}}
    stored["data"] = {"train": same | {"kept": 2, "tokens": 20, "trained_tokens": 5}}
    require_same_inputs(stored, stored)
    now = stored | {"data": {"train": same | {"kept": 2, "tokens": 21, "trained_tokens": 5}}}
    with pytest.raises(RunError, match=r"data.train: this version of alignkit reads the same rows"):
        require_same_inputs(now, stored)


def test_a_lock_that_its_last_owner_removes_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs that lock two files of one name would both own the folder."""
    first, lock = RunFolder(tmp_path / "run"), fcntl.flock

    def lock_late(*args: Any) -> None:
        first.close()
        lock(*args)

    monkeypatch.setattr(files.fcntl, "flock", lock_late)
    with pytest.raises(RunError, match="is in use by another process"):
        RunFolder(tmp_path / "run")
    monkeypatch.undo()
    assert not (tmp_path / "run").exists()
    RunFolder(tmp_path / "run").close()
    assert not (tmp_path / "run").exists()
