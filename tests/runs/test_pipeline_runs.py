"""Pipelines on the tiny base: what runs, what is skipped, and what a kill leaves."""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from commandline import CommandLine
from running import KILL_AFTER, make_pairs, make_recipe, make_rows, train, write_rows

from alignkit.errors import AlignkitError, RecipeError, RunError
from alignkit.pipelines import steps as pipeline_steps
from alignkit.pipelines.running import PipelineRun, Result
from alignkit.pipelines.steps import RUNNERS, Runner, StageOutput
from alignkit.recipe.reading.pipeline import READERS, load_pipeline
from alignkit.recipe.stages.ppo import PpoRecipe
from alignkit.stages.inputs.fingerprints import describe_changes, training_inputs
from alignkit.stages.running.session import RunOptions

pytestmark = pytest.mark.slow

DENSE = "merged/model.safetensors"
LOOP = {
    "max_steps": 4,
    "batch_size": 4,
    "learning_rate": 2e-3,
    "warmup": 0,
    "save_every": 2,
    "microbatch_tokens": 128,
}


def make_pipeline(folder: Path, base: Path) -> Path:
    """SFT and DPO from its merged model; rows and output are next to the file."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "rows.jsonl", make_rows())
    write_rows(folder / "pairs.jsonl", make_pairs())
    shared = {
        "adapter": {"kind": "lora", "rank": 4, "alpha": 8},
        "training": LOOP,
    }
    stages = {
        "sft": {
            "stage": "sft",
            "model": {"base": str(base), "dtype": "float32"},
            **shared,
            "data": {"train": [{"path": "rows.jsonl"}], "max_length": 256, "eval_fraction": 0.2},
        },
        "dpo": {
            "stage": "dpo",
            "model": {"base": "${sft}", "dtype": "float32"},
            **shared,
            "data": {"train": [{"path": "pairs.jsonl"}], "max_length": 256},
            "merge": False,
        },
    }
    path = folder / "p.yaml"
    path.write_text(json.dumps({"output": str(folder / "out"), "stages": stages}), encoding="utf-8")
    return path


def run(pipeline: Path, *overrides: str, overwrite: bool = False) -> list[Result]:
    running = PipelineRun(
        load_pipeline(str(pipeline), list(overrides)), RunOptions(overwrite=overwrite, quiet=True)
    )
    running.run()
    return running.results


def what(results: list[Result]) -> list[str]:
    return [result.status for result in results]


def state(folder: Path) -> Any:
    return json.loads((folder / "out" / "pipeline.json").read_text(encoding="utf-8"))["stages"]


@pytest.fixture(scope="module")
def made(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pipeline that has run; tests work on copies."""
    folder = tmp_path_factory.mktemp("made") / "p"
    assert what(run(make_pipeline(folder, tiny_base))) == ["done", "done"]
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy in another place, as if it had been made there."""
    copy = tmp_path.resolve() / "p"
    shutil.copytree(made, copy)
    for path in (*copy.glob("p*.yaml"), *copy.glob("out/*.json"), *copy.glob("out/*/*.yaml")):
        path.write_text(path.read_text(encoding="utf-8").replace(str(made), str(copy)))
    return copy


def test_a_stage_makes_what_its_own_command_makes(
    made: Path, tiny_base: Path, tmp_path: Path
) -> None:
    shutil.copy(made / "rows.jsonl", tmp_path)
    training = {f"training__{key}": value for key, value in LOOP.items()}
    train(make_recipe(tmp_path, tiny_base, data__eval_fraction=0.2, **training))
    assert (made / "out/sft" / DENSE).read_bytes() == (tmp_path / "run" / DENSE).read_bytes()
    base = json.loads((made / "out/dpo/run.json").read_text(encoding="utf-8"))["base"]
    assert base["location"] == str(made / "out/sft/merged")


def test_nothing_has_changed(folder: Path) -> None:
    # Contents count, not places.
    before = sorted(path.stat().st_mtime_ns for path in (folder / "out").rglob("*.json"))
    (folder / "rows.jsonl").rename(folder / "renamed.jsonl")
    results = run(folder / "p.yaml", "sft.data.train.0.path=renamed.jsonl")
    assert what(results) == ["skipped", "skipped"]
    assert results[0].numbers["steps"] == 4
    assert results[0].numbers["after"]["loss"] < results[0].numbers["before"]["loss"]
    assert sorted(p.stat().st_mtime_ns for p in (folder / "out").rglob("*.json")) == before


def test_a_changed_recipe_runs_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert what(run(folder / "p.yaml", "dpo.training.max_steps=2")) == ["skipped", "done"]
    said = capsys.readouterr().err.replace("\n", " ")
    assert "replaced: " in said
    assert "out/dpo: training.max_steps was 4, is 2" in said


def test_changed_rows_and_what_follows_from_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(folder / "rows.jsonl", make_rows(seed=1))
    assert what(run(folder / "p.yaml")) == ["done", "done"]
    said = capsys.readouterr().err
    assert "out/sft: rows of data.train[0] changed\n" in said
    assert "out/dpo: base changed\n" in said


def test_a_reproduced_base_changes_nothing(folder: Path) -> None:
    dense = folder / "out/sft" / DENSE
    before = dense.read_bytes()
    shutil.rmtree(folder / "out" / "sft")
    assert what(run(folder / "p.yaml")) == ["done", "skipped"]
    assert dense.read_bytes() == before
    shutil.rmtree(dense.parent)  # made again from the last checkpoint
    assert what(run(folder / "p.yaml")) == ["resumed", "skipped"]
    assert dense.read_bytes() == before


def test_runs_of_others_are_not_replaced(folder: Path) -> None:
    pipeline, sft = folder / "p.yaml", folder / "out" / "sft"
    # Another command has trained in the folder since: it no longer matches the record.
    about = json.loads((sft / "run.json").read_text(encoding="utf-8"))
    (sft / "run.json").write_text(json.dumps({**about, "started": "later"}), encoding="utf-8")
    # And the second stage has a run of someone else in a folder of its own.
    shutil.copytree(folder / "out" / "dpo", folder / "mine")
    mine = f"dpo.output={folder / 'mine'}"
    with pytest.raises(RecipeError) as caught:
        run(pipeline, mine)
    assert [problem.message for problem in caught.value.problems] == [
        f"{place} holds a run that this pipeline did not make" for place in (sft, folder / "mine")
    ]
    assert what(run(pipeline, mine, overwrite=True)) == ["done", "done"]
    # Now it is the pipeline's, but outside its folder: a changed one needs --overwrite.
    assert what(run(pipeline, mine)) == ["skipped", "skipped"]
    with pytest.raises(RunError, match=r"older run of stage dpo: seed was 0, is 1\n") as refused:
        run(pipeline, mine, "dpo.seed=1")
    assert "add --overwrite" in refused.value.hint


def test_a_folder_serves_one_pipeline_and_one_process(folder: Path) -> None:
    other = shutil.copy(folder / "p.yaml", folder / "q.yaml")
    with pytest.raises(RunError, match="belongs to the pipeline"):
        run(Path(other))
    assert what(run(Path(other), overwrite=True)) == ["skipped", "skipped"]
    with (folder / "out" / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="is in use by another process"):
            run(Path(other))
    with pytest.raises(RunError, match="is the folder of a run, not of a pipeline"):
        run(folder / "p.yaml", f"output={folder / 'out' / 'sft'}")


def test_another_kind_of_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert READERS.keys() == RUNNERS.keys()
    calls = []

    def label(settings: dict[str, Any], options: RunOptions) -> dict[str, Any]:
        calls.append(Path(settings["output"]).write_text(settings["text"], encoding="utf-8"))
        return {"rows": 3}

    def look(settings: dict[str, Any]) -> StageOutput | None:
        path = Path(settings["output"])
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        return StageOutput(text, "finished", False, {}) if text else None

    monkeypatch.setitem(READERS, "label", lambda document, pending: dict(document.values))
    inputs = lambda settings: {"text": settings["text"]}  # noqa: E731
    monkeypatch.setitem(RUNNERS, "label", Runner(lambda step: None, inputs, look, label))
    values = json.loads((folder / "p.yaml").read_text(encoding="utf-8"))
    values["stages"]["marks"] = {"label": {"text": "good", "output": str(folder / "out/marks")}}
    (folder / "p.yaml").write_text(json.dumps(values), encoding="utf-8")
    results = run(folder / "p.yaml")
    assert what(results) == ["skipped", "skipped", "done"]
    assert (results[2].stage, results[2].numbers) == ("label", {"rows": 3})
    assert what(run(folder / "p.yaml"))[2] == "skipped"
    assert what(run(folder / "p.yaml", "marks.label.text=bad"))[2] == "done"
    assert len(calls) == 2


def test_rewards_count_by_their_contents(made: Path, tiny_base: Path, tmp_path: Path) -> None:
    function, model = tmp_path / "rewards.py", tmp_path / "rm"
    function.write_text("def score(prompts, completions): ...", encoding="utf-8")
    shutil.copytree(made / "out" / "sft", model)
    values = {
        "stage": "ppo",
        "output": "runs/x",
        "model": {"base": str(tiny_base)},
        "data": {"train": [{"path": str(made / "rows.jsonl")}]},
        "reward": [{"function": f"{function}:score"}, {"model": str(model)}],
    }
    recipe = PpoRecipe.model_validate_json(json.dumps(values))
    first = training_inputs(recipe)
    assert training_inputs(recipe.model_copy(update={"output": "runs/y"})) == first
    function.write_text("def score(prompts, completions): return []", encoding="utf-8")
    (model / "adapter" / "reward.json").write_text("{}", encoding="utf-8")
    assert describe_changes(first, training_inputs(recipe)) == [
        "reward function 1 changed",
        "reward model 2 changed",
    ]
    other = PpoRecipe.model_validate_json(json.dumps(values | {"reward": values["reward"][:1]}))
    assert "reward model 2 is gone" in describe_changes(first, training_inputs(other))


def test_a_stage_that_fails_stops_the_rest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(recipe: Any, options: RunOptions) -> None:
        raise AlignkitError("no")

    monkeypatch.setattr(pipeline_steps, "run_stage", fail)
    running = PipelineRun(
        load_pipeline(str(folder / "p.yaml"), ["sft.seed=1"]), RunOptions(quiet=True)
    )
    with pytest.raises(AlignkitError, match="no"):
        running.run()
    assert what(running.results) == ["failed", "not run"]
    assert state(folder)["sft"]["status"] == "failed"
    monkeypatch.undo()
    # The older run is still there: it is neither mistaken for the new one nor resumed.
    assert what(run(folder / "p.yaml", "sft.seed=1")) == ["done", "done"]


# kills, in processes of their own -----------------------------------------------------------------

BEFORE_THE_RUN = """
import os, signal
import alignkit.pipelines.steps as steps
steps.run_stage = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
"""
AFTER_THE_RUN = """
import os, signal
import alignkit.pipelines.steps as steps
run_stage = steps.run_stage
def run_and_die(*args):
    run_stage(*args)
    os.kill(os.getpid(), signal.SIGKILL)
steps.run_stage = run_and_die
"""
WHILE_WRITING = """
import os, signal
replace = os.replace
def replace_or_die(old, new):
    if str(new).endswith("pipeline.json"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(old, new)
os.replace = replace_or_die
"""
KILLS = {
    "in the first stage": (KILL_AFTER.replace("STEP", "3"), ["resumed", "done"]),
    "before its run": (BEFORE_THE_RUN, ["done", "done"]),
    "after its run": (AFTER_THE_RUN, ["skipped", "done"]),
    "while the state is written": (WHILE_WRITING, ["done", "done"]),
}


@pytest.mark.parametrize("case", KILLS)
def test_a_kill_at_any_moment(case: str, alignkit: CommandLine, made: Path, folder: Path) -> None:
    # The stages of `made` are redone from other rows and back, so an older run is in the way.
    before, expected = KILLS[case]
    pipeline = folder / "p.yaml"
    shutil.rmtree(folder / "out" / "dpo")
    about = state(folder)
    about["sft"]["inputs"]["rows of data.train[0]"] = "0" * 64
    whole = {"pipeline": str(pipeline), "stages": {"sft": about["sft"]}}
    (folder / "out" / "pipeline.json").write_text(json.dumps(whole), encoding="utf-8")
    killed = alignkit("run", pipeline, cwd=folder, before=before)
    assert killed.code == -signal.SIGKILL
    again = alignkit("run", pipeline, "--json", cwd=folder)
    assert again.code == 0, again.stderr
    assert [stage["status"] for stage in json.loads(again.stdout)["stages"]] == expected
    for name in (f"sft/{DENSE}", "dpo/adapter/adapter_model.safetensors"):
        assert (folder / "out" / name).read_bytes() == (made / "out" / name).read_bytes()


def test_ctrl_c_and_the_next_run_goes_on(alignkit: CommandLine, made: Path, folder: Path) -> None:
    shutil.rmtree(folder / "out")
    stop = KILL_AFTER.replace("STEP", "2").replace("SIGKILL", "SIGINT")
    stopped = alignkit("run", folder / "p.yaml", cwd=folder, before=stop, COLUMNS="200")
    assert stopped.code == 130
    text = " ".join(stopped.stderr.split())
    assert "hint: run the same command again to resume" in text
    assert "sft interrupted" in text
    assert "dpo not run" in text
    assert state(folder)["sft"]["status"] == "interrupted"
    assert what(run(folder / "p.yaml")) == ["resumed", "done"]
    for name in (f"sft/{DENSE}", "dpo/adapter/adapter_model.safetensors"):
        assert (folder / "out" / name).read_bytes() == (made / "out" / name).read_bytes()
