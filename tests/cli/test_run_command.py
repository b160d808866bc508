"""`alignkit run` as a person sees it: the table, --json, wrong inputs and exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from commandline import CommandLine
from running import make_rows, write_rows

from alignkit.cli.training.run import describe_numbers


def make_pipeline(folder: Path, base: Path) -> Path:
    """Two stages of one step each."""
    write_rows(folder / "rows.jsonl", make_rows(8))
    (folder / "sft.yaml").write_text(
        f"""\
stage: sft
output: runs/alone
model: {{base: {base}, dtype: float32}}
adapter: {{kind: lora, rank: 2}}
data: {{train: [{{path: rows.jsonl}}], max_length: 256, eval_fraction: 0.2}}
training: {{max_steps: 1, batch_size: 4}}
merge: false
""",
        encoding="utf-8",
    )
    path = folder / "p.yaml"
    path.write_text(
        """\
output: runs/p
stages:
  one: {recipe: sft.yaml, merge: true}
  two:
    recipe: sft.yaml
    model:
      base: ${one}
""",
        encoding="utf-8",
    )
    return path


@pytest.mark.slow
def test_a_run_and_the_next(alignkit: CommandLine, tiny_base: Path, tmp_path: Path) -> None:
    make_pipeline(tmp_path, tiny_base)
    done = alignkit("run", "p.yaml", cwd=tmp_path, COLUMNS="200")
    assert done.code == 0, done.stderr
    assert done.stdout == ""
    assert "[1/2] one: runs/p/one\n" in done.stderr
    assert "[2/2] two: runs/p/two\n" in done.stderr
    assert re.search(
        r"^one +done +\d+\.\d +1 +loss \d+\.\d{4} -> \d+\.\d{4} +runs/p/one", done.stderr, re.M
    )
    again = alignkit("run", "p.yaml", "--json", "two.seed=1", cwd=tmp_path, COLUMNS="200")
    assert again.code == 0, again.stderr
    assert "skipped: nothing has changed" in again.stderr
    assert "replaced: runs/p/two: seed was 0, is 1" in again.stderr
    assert re.search(r"^one +skipped +1 +loss", again.stderr, re.M)
    found = json.loads(again.stdout)
    assert (found["pipeline"], found["output"]) == ("p.yaml", "runs/p")
    one, two = found["stages"]
    assert (one["name"], one["stage"], one["status"]) == ("one", "sft", "skipped")
    assert (two["status"], two["steps"], two["output"]) == ("done", 1, "runs/p/two")
    assert two["after"]["loss"] > 0
    quiet = alignkit("run", "p.yaml", "--quiet", "two.seed=1", cwd=tmp_path)
    assert (quiet.code, quiet.stdout, quiet.stderr) == (0, "", "")


@pytest.mark.slow
def test_a_failing_stage(alignkit: CommandLine, tiny_base: Path, tmp_path: Path) -> None:
    make_pipeline(tmp_path, tiny_base)
    write_rows(tmp_path / "bad.jsonl", [{"messages": [{"role": "robot", "content": "x"}]}])
    wrong = "two.data.train=[{path: bad.jsonl}]"
    done = alignkit("run", "p.yaml", "--json", wrong, cwd=tmp_path, COLUMNS="200")
    assert done.code == 2
    assert "bad.jsonl:1: messages[0].role is 'robot'" in done.stderr
    assert [s["status"] for s in json.loads(done.stdout)["stages"]] == ["done", "failed"]
    fixed = alignkit("run", "p.yaml", "--json", cwd=tmp_path)
    assert [s["status"] for s in json.loads(fixed.stdout)["stages"]] == ["skipped", "done"]


WRONG = {
    "no such file": (["q.yaml"], ["error: q.yaml: no such recipe"]),
    "a recipe": (
        ["sft.yaml"],
        ["error: sft.yaml: is a recipe, not a pipeline", "hint: run `alignkit sft sft.yaml`"],
    ),
    "unknown stage": (["p.yaml", "tow.seed=1"], ["there is no stage 'tow'", "did you mean two?"]),
    "all stages": (
        ["p.yaml", "one.seed=-1", "two.data.train=[{path: no.jsonl}]", "two.model.base=${on}"],
        [
            "command line: one: seed must be at least 0, got -1",
            "command line: two: model.base refers to an unknown stage: ${on}",
            "hint: did you mean ${one}?",
        ],
    ),
    "missing rows": (
        ["p.yaml", "two.data.train=[{path: no.jsonl}]"],
        ["command line: two: data.train[0].path names no file: 'no.jsonl'"],
    ),
    "missing model": (
        ["p.yaml", "two.model.base=nowhere"],
        ["error: command line: model.base: 'nowhere' is not a model"],
    ),
    "an output that is something else": (
        ["p.yaml", "two.output=things"],
        ["error: things is not empty and is not a run folder"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_before_anything_runs(
    case: str, alignkit: CommandLine, tiny_base: Path, tmp_path: Path
) -> None:
    make_pipeline(tmp_path, tiny_base)
    (tmp_path / "things").mkdir()
    (tmp_path / "things" / "notes.txt").write_text("mine", encoding="utf-8")
    arguments, parts = WRONG[case]
    done = alignkit("run", *arguments, cwd=tmp_path)
    assert (done.code, done.stdout) == (2, ""), done.stderr
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_pipeline_given_to_a_stage(
    alignkit: CommandLine, tiny_base: Path, tmp_path: Path
) -> None:
    make_pipeline(tmp_path, tiny_base)
    done = alignkit("sft", "p.yaml", cwd=tmp_path)
    assert done.code == 2
    assert "error: p.yaml: is a pipeline, not a recipe\nhint: run `alignkit run p.yaml`" in (
        done.stderr
    )


def test_shipped_pipelines_are_listed_and_copied(alignkit: CommandLine, tmp_path: Path) -> None:
    listed = alignkit("recipes", "list", "--json", cwd=tmp_path).stdout
    assert json.loads(listed)["pipelines/sft_dpo.yaml"].startswith("pipeline: SFT, then DPO")
    done = alignkit("recipes", "copy", "pipelines/sft_dpo", "mine.yaml", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert "stages:" in (tmp_path / "mine.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("numbers", "lines"),
    [
        ({}, []),
        ({"steps": 3, "loss": 0.5, "before": {}, "after": {}}, ["loss 0.5"]),
        (
            {
                "steps": 3,
                "loss": 0.5,
                "before": {"loss": 0.7, "rewards/accuracies": 0.5},
                "after": {"loss": 0.6, "rewards/accuracies": 0.75, "pairs": 4},
            },
            ["loss 0.7000 -> 0.6000", "rewards/accuracies 50.0% -> 75.0%"],
        ),
        ({"rows": 12}, ["rows 12"]),
    ],
)
def test_key_numbers(numbers: dict[str, object], lines: list[str]) -> None:
    assert describe_numbers(numbers) == lines
