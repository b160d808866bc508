"""A run that was stopped, in any way, ends as if it had not been: byte for byte."""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from commandline import CommandLine
from running import KILL_AFTER, assert_same, break_off, make_recipe

from alignkit.runtime.metrics import read_metrics

pytestmark = pytest.mark.slow  # whole runs

STEPS = 10

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "several epochs": {
        "training__batch_size": 7,
        "data__eval_fraction": 0.2,
        "training__eval_every": 5,
    },
}


def recipe_for(kind: str, folder: Path, base: Path) -> Path:
    """Its run is `folder/run`, for commands in this folder: copies of the folder are runs too."""
    fields = {
        "output": "run",
        "training__max_steps": STEPS,
        "training__save_every": 4,
        "training__keep": 3,
        "training__microbatch_tokens": 128,
        "merge": False,
    }
    return make_recipe(folder, base, **{**fields, **KINDS[kind]})


@pytest.fixture(scope="module")
def whole(alignkit: CommandLine, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of the uninterrupted run of each kind, made once."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp("whole")
            recipe = recipe_for(kind, folder, tiny_base)
            done = alignkit("sft", recipe, cwd=folder)
            assert done.code == 0, done.stderr
            made[kind] = folder / "run"
        return made[kind]

    return get


@pytest.fixture
def broken(whole: Any, tmp_path: Path) -> Path:
    """A folder whose `run` ended in the second step after step 8, with the recipe next to it."""
    shutil.copytree(whole("lora").parent, tmp_path, dirs_exist_ok=True)
    break_off(tmp_path / "run", 8)
    return tmp_path


def test_kill_after_step_six(
    alignkit: CommandLine, whole: Any, tiny_base: Path, tmp_path: Path
) -> None:
    kind = "several epochs"
    recipe = recipe_for(kind, tmp_path, tiny_base)
    killed = alignkit("sft", recipe, cwd=tmp_path, before=KILL_AFTER.replace("STEP", "6"))
    assert killed.code == -signal.SIGKILL
    run = tmp_path / "run"
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] == 6
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["status"] == "running"
    done = alignkit("sft", recipe, "--resume", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert "resuming after step 4" in done.stderr
    assert_same(run, whole(kind))


def test_different_runs_differ(whole: Any) -> None:
    # Otherwise "the same bytes" would prove nothing.
    name = "adapter/adapter_model.safetensors"
    one, two = ((whole(kind) / name).read_bytes() for kind in KINDS)
    assert one != two


@pytest.mark.slow
def test_kill_before_the_first_checkpoint(
    alignkit: CommandLine, whole: Any, tiny_base: Path, tmp_path: Path
) -> None:
    kind = "several epochs"
    recipe = recipe_for(kind, tmp_path, tiny_base)
    alignkit("sft", recipe, cwd=tmp_path, before=KILL_AFTER.replace("STEP", "2"))
    done = alignkit("sft", recipe, "--resume", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert "no checkpoint to resume from: starting at step 1" in done.stderr
    assert_same(tmp_path / "run", whole(kind))


@pytest.mark.slow
def test_killed_twice_and_with_a_torn_line(
    alignkit: CommandLine, whole: Any, tiny_base: Path, tmp_path: Path
) -> None:
    recipe = recipe_for("lora", tmp_path, tiny_base)
    alignkit("sft", recipe, cwd=tmp_path, before=KILL_AFTER.replace("STEP", "5"))
    with (tmp_path / "run" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 6, "loss": 1.')
    alignkit("sft", recipe, "--resume", cwd=tmp_path, before=KILL_AFTER.replace("STEP", "10"))
    done = alignkit("sft", recipe, "--resume", cwd=tmp_path)
    assert "resuming after step 8" in done.stderr
    assert_same(tmp_path / "run", whole("lora"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "terminate"]
)
def test_a_signal_saves_and_exits(
    number: signal.Signals,
    code: int,
    alignkit: CommandLine,
    whole: Any,
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    recipe = recipe_for("lora", tmp_path, tiny_base)
    stop = KILL_AFTER.replace("STEP", "2").replace("SIGKILL", number.name)
    done = alignkit("sft", recipe, cwd=tmp_path, before=stop)
    assert done.code == code
    run = tmp_path / "run"
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] == 2
    text = done.stderr.replace("\n", " ")
    assert "stopping after this step" in text.partition("stopped after")[0]
    assert f"stopped after step 2 of {STEPS}; a checkpoint was saved" in text
    assert "hint: continue with --resume" in text
    assert (run / "checkpoints" / "step-000002" / "manifest.json").is_file()
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["status"] == "interrupted"
    with (run / ".lock").open("a") as lock:  # released, so the run can be resumed
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if number == signal.SIGTERM:  # the two leave the same
        resumed = alignkit("sft", recipe, "--resume", cwd=tmp_path)
        assert "resuming after step 2" in resumed.stderr
        assert_same(run, whole("lora"))


def tear_weights(checkpoint: Path) -> str:
    path = checkpoint / "trainable.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    return "trainable.safetensors does not match its checksum"


def tear_optimizer(checkpoint: Path) -> str:
    (checkpoint / "optimizer.pt").unlink()
    return "optimizer.pt is missing"


def tear_manifest(checkpoint: Path) -> str:
    (checkpoint / "manifest.json").write_text('{"state.json": ', encoding="utf-8")
    return "no readable manifest.json"


def test_a_torn_checkpoint_is_skipped(alignkit: CommandLine, whole: Any, broken: Path) -> None:
    reason = tear_weights(broken / "run" / "checkpoints" / "step-000008")
    done = alignkit("sft", "recipe.yaml", "--resume", cwd=broken)
    assert done.code == 0, done.stderr
    text = done.stderr.replace("\n", " ")
    assert f"warning: step-000008 is damaged ({reason}); using the one before" in text
    assert "resuming after step 4" in text
    assert_same(broken / "run", whole("lora"))


def test_all_checkpoints_torn(alignkit: CommandLine, whole: Any, broken: Path) -> None:
    checkpoints = broken / "run" / "checkpoints"
    reasons = {8: tear_optimizer(checkpoints / "step-000008")}
    reasons[4] = tear_manifest(checkpoints / "step-000004")
    done = alignkit("sft", "recipe.yaml", "--resume", cwd=broken)
    assert done.code == 0, done.stderr
    text = done.stderr.replace("\n", " ")
    for step, reason in reasons.items():
        assert f"warning: step-{step:06d} is damaged ({reason}); using the one before" in text
    assert "no checkpoint to resume from: starting at step 1" in done.stderr
    assert_same(broken / "run", whole("lora"))


@pytest.mark.slow
def test_a_kill_while_a_checkpoint_is_written(
    alignkit: CommandLine, whole: Any, tiny_base: Path, tmp_path: Path
) -> None:
    recipe = recipe_for("lora", tmp_path, tiny_base)
    die_before_the_rename = """
import os, signal
replace = os.replace
def replace_or_die(old, new):
    if new.name == "step-000008":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(old, new)
os.replace = replace_or_die
"""
    killed = alignkit("sft", recipe, cwd=tmp_path, before=die_before_the_rename)
    assert killed.code == -signal.SIGKILL
    checkpoints = tmp_path / "run" / "checkpoints"
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names[0].startswith(".writing-step-000008-")
    assert names[1:] == ["step-000004"]
    done = alignkit("sft", recipe, "--resume", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert_same(tmp_path / "run", whole("lora"))
    assert not list(checkpoints.glob(".writing-*"))


@pytest.mark.slow
def test_a_kill_after_the_last_step(alignkit: CommandLine, tiny_base: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_base, training__max_steps=3)
    done = alignkit("sft", recipe, cwd=tmp_path)
    assert done.code == 0, done.stderr
    run, whole = tmp_path / "run", tmp_path / "whole"
    run.rename(whole)
    for target, more in (("save_adapter", ()), ("merge_adapter", ("--resume",))):
        die = f"""
import os, signal
import alignkit.stages.running.finish as outputs
outputs.{target} = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
"""
        killed = alignkit("sft", recipe, *more, cwd=tmp_path, before=die)
        assert killed.code == -signal.SIGKILL
        assert (run / "adapter").exists() == (target == "merge_adapter")
        assert not (run / "merged").exists()
    resumed = alignkit("sft", recipe, "--resume", cwd=tmp_path)
    assert resumed.code == 0, resumed.stderr
    assert_same(run, whole)
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.slow
def test_a_full_disk_stops_with_a_sentence(
    alignkit: CommandLine, whole: Any, tiny_base: Path, tmp_path: Path
) -> None:
    recipe = recipe_for("lora", tmp_path, tiny_base)
    # No file may grow beyond 10 kB: the second checkpoint does not fit, as on a full disk.
    limit = """
import resource
import alignkit.stages.running.loop as loop
save, count = loop.save_checkpoint, []
def save_in_little_room(*args):
    count.append(1)
    if len(count) == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    return save(*args)
loop.save_checkpoint = save_in_little_room
"""
    done = alignkit("sft", recipe, cwd=tmp_path, before=limit)
    assert done.code == 2, done.stderr
    text = done.stderr.replace("\n", " ")
    assert "the checkpoint of step 8 could not be written to" in text
    assert "File too large" in text
    assert "hint: free disk space and continue with --resume" in text
    assert "Traceback" not in text
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-000004"]
    resumed = alignkit("sft", recipe, "--resume", cwd=tmp_path)
    assert resumed.code == 0, resumed.stderr
    assert_same(tmp_path / "run", whole("lora"))


def test_a_loss_that_is_not_finite_names_step_and_rows(
    alignkit: CommandLine, tiny_base: Path, tmp_path: Path
) -> None:
    recipe = recipe_for("lora", tmp_path, tiny_base)
    explode = """
import alignkit.stages.supervised.sft as sft
right, count = sft.cross_entropy_loss, []
def wrong(logprobs):
    count.append(1)
    return right(logprobs) * (float("nan") if len(count) > 20 else 1.0)
sft.cross_entropy_loss = wrong
"""
    done = alignkit("sft", recipe, cwd=tmp_path, before=explode)
    assert done.code == 2
    text = done.stderr.replace("\n", " ")
    assert "the loss of step " in text
    assert " is nan; its rows begin with " in text
    assert f"{tmp_path}/rows.jsonl:" in text
    assert "Traceback" not in text
    run = tmp_path / "run"
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["status"] == "failed"
    assert not (run / "adapter").exists()
    assert not (run / "merged").exists()
    # Every step on record is a good one.
    assert all(line["loss"] is not None for line in read_metrics(run / "metrics.jsonl"))
