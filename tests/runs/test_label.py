"""Preference pairs of a model's own responses: what is written, left out and trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commandline import CommandLine
from running import make_pairs, make_preference_recipe, train, write_rows
from tiny import tiny_tokenizer

from alignkit.data.prompts import Prompt, PromptSet, load_prompts
from alignkit.data.report import DataReport
from alignkit.errors import AlignkitError, DataError, RecipeError
from alignkit.jobs import label as module
from alignkit.jobs.candidates import (
    Candidate,
    SampleSettings,
    judge_answers,
    prompts_of,
    sample_answers,
)
from alignkit.jobs.evaluate import score_answers
from alignkit.jobs.label import CUT_OFF, EMPTY, EQUAL, label_prompts, pick_pair
from alignkit.jobs.question import Question
from alignkit.models.opening import open_language_model
from alignkit.pipelines.running import PipelineRun, Result
from alignkit.recipe.reading.label import LabelSpec
from alignkit.recipe.reading.pipeline import load_pipeline
from alignkit.stages.running.session import RunOptions

pytestmark = pytest.mark.slow  # whole runs

TOOL = {"type": "function", "function": {"name": "count", "parameters": {}}}


@pytest.fixture(scope="module")
def models(talkers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with sft/run, rm/run and prompts.jsonl, whose rows are pairs, one with tools."""
    folder = tmp_path_factory.mktemp("label").resolve() / "models"
    shutil.copytree(talkers, folder)
    rows = make_pairs(8, seed=3)
    rows[4]["tools"] = [TOOL]
    write_rows(folder / "prompts.jsonl", rows)
    return folder


def ask(models: Path, **changes: Any) -> LabelSpec:
    values = {
        "output": "unused",
        "model": str(models / "sft/run"),
        "reward": str(models / "rm/run"),
        "prompts": [{"path": str(models / "prompts.jsonl")}],
        "max_new_tokens": 10,
        "dtype": "float32",
    }
    return LabelSpec.model_validate_json(json.dumps(values | changes))


def silent(text: str) -> None:
    pass


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# Rewards ---------------------------------------------------------------------------------------


def test_each_answer_has_the_reward_it_has_alone(models: Path) -> None:
    opened = open_language_model(str(models / "sft/run"), dtype=torch.float32)
    asked = ["the cat", "how many birds fly over our old house and the mat"]
    turns = [[{"role": "user", "content": text}] for text in asked]
    settings = SampleSettings(12, 10, 1.0, 5, "float32")
    rollouts = sample_answers(opened, prompts_of(opened, turns), settings, silent)
    found = judge_answers(rollouts, str(models / "rm/run"), "float32", silent)
    stop, compared = opened.tokenizer.eos_token_id, 0
    for prompt, rollout, answers in zip(asked, rollouts, found, strict=True):
        assert [answer.text for answer in answers] == list(rollout.texts)
        alone = score_answers(
            str(models / "rm/run"), prompt, list(rollout.texts), Question(dtype="float32")
        )
        for answer, (_, reward), sampled in zip(answers, alone, rollout.sampled, strict=True):
            ids = [*opened.tokenizer(answer.text, add_special_tokens=False)["input_ids"], stop]
            if sampled.ids.tolist() == ids:  # the text alone may become other tokens
                compared += 1
                assert answer.reward == pytest.approx(reward, abs=1e-4)
                assert (answer.finish, answer.tokens) == ("stop", len(ids))
    assert compared >= 3


# Pairs -----------------------------------------------------------------------------------------


def answers_of(*pairs: tuple[str, float]) -> list[Candidate]:
    return [Candidate(text, reward, 3, "stop") for text, reward in pairs]


@pytest.mark.parametrize(
    ("answers", "margin", "expected"),
    [
        ([("a", 1.0), ("b", 3.0), ("c", -2.0)], 0.0, (1, 2)),
        ([("a", 1.0), ("b", 1.0), ("c", 0.5), ("d", 0.5)], 0.0, (0, 2)),
        ([("a", 1.0), ("b", 3.0)], 2.0, "best and worst reward differ by no more than 2"),
        ([("a", 1.0), ("b", 3.0)], 1.9, (1, 0)),
        ([("a", 1.0), ("b", 1.0)], 0.0, "best and worst reward differ by no more than 0"),
        ([("a", 1.0), ("a", 3.0)], 0.0, EQUAL),
        # The same text in other tokens: the worst response is another text.
        ([("a", 3.0), ("a", 0.0), ("b", 1.0)], 0.0, (0, 2)),
        ([("", 9.0), ("a", 1.0), ("b", 0.0), ("", -9.0)], 0.0, (1, 2)),
        ([("", 9.0), ("a", 1.0)], 0.0, EMPTY),
    ],
)
def test_which_answers_make_a_pair(
    answers: list[tuple[str, float]], margin: float, expected: Any
) -> None:
    given = answers_of(*answers)
    picked = pick_pair(given, margin)
    if isinstance(picked, tuple):
        assert (given.index(picked[0]), given.index(picked[1])) == expected
    else:
        assert picked == expected


def test_best_against_worst_of_every_prompt(models: Path, tmp_path: Path) -> None:
    said: list[str] = []
    spec = ask(models, samples=4, seed=2)
    summary = label_prompts(spec, tmp_path / "new" / "pairs.jsonl", said.append)
    rows = read(tmp_path / "new" / "pairs.jsonl")
    source = read(models / "prompts.jsonl")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["pairs.jsonl"]
    assert summary.prompts == 8
    assert summary.answers == 32
    assert summary.pairs == len(rows) > 4
    assert summary.pairs + sum(summary.left_out.values()) == 8
    assert said[0].startswith("prompts: 8 of 8 rows used")
    prompts = [row["prompt"] for row in source]
    for row in rows:
        assert row["prompt"] in prompts
        assert row["chosen_reward"] > row["rejected_reward"]
        assert (row["model"], row["reward_model"]) == (spec.model, spec.reward)
        assert ("tools" in row) == (row["prompt"] == prompts[4])
        for key in ("chosen", "rejected"):
            ((turn,)) = row[key]
            assert turn["role"] == "assistant"
            assert turn["content"]
    opened = open_language_model(spec.model, dtype=torch.float32)
    found = load_prompts(spec.prompts, opened.tokenizer, max_length=500, too_long="drop", seed=2)
    settings = SampleSettings(4, 10, 1.0, 2, "float32")
    answers = judge_answers(
        sample_answers(opened, found, settings, silent), spec.reward, "float32", silent
    )
    rewards = np.asarray([[answer.reward for answer in own] for own in answers])
    expected = (rewards.mean(), rewards.max(1).mean(), rewards.min(1).mean())
    assert (summary.mean, summary.best, summary.worst) == pytest.approx(expected, abs=1e-5)
    for row in rows:
        texts = {a.text: a.reward for a in answers[prompts.index(row["prompt"])] if a.text}
        assert row["chosen"][0]["content"] == max(texts, key=lambda text: texts[text])
        assert row["rejected"][0]["content"] == min(texts, key=lambda text: texts[text])


def test_the_seed_decides(models: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.jsonl" for name in "abc"]
    for path, seed in zip(files, (1, 1, 2), strict=True):
        label_prompts(ask(models, samples=2, seed=seed), path, silent)
    one, same, other = (path.read_bytes() for path in files)
    assert one == same != other


def test_a_margin_leaves_prompts_out(models: Path, tmp_path: Path) -> None:
    label_prompts(ask(models), tmp_path / "all.jsonl", silent)
    rows = read(tmp_path / "all.jsonl")
    gaps = sorted(row["chosen_reward"] - row["rejected_reward"] for row in rows)
    margin = round((gaps[1] + gaps[2]) / 2, 4)
    said: list[str] = []
    found = label_prompts(ask(models, margin=margin), tmp_path / "some.jsonl", said.append)
    assert found.left_out[f"best and worst reward differ by no more than {margin:g}"] == 2
    assert len(read(tmp_path / "some.jsonl")) == found.pairs == len(rows) - 2
    assert any(line.startswith("pairs: 2 rows dropped: best and worst") for line in said)
    with pytest.raises(DataError) as caught:
        label_prompts(ask(models, margin=1e6), tmp_path / "none.jsonl", silent)
    assert caught.value.message.startswith("no pair is left of 8 prompts: ")
    assert "rows dropped: best and worst reward differ by no more than 1e+06" in str(caught.value)
    assert caught.value.hint == (
        "raise the temperature or the number of samples, or lower the margin"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.jsonl", "some.jsonl"]


def test_answers_that_were_cut_off_are_counted(models: Path, tmp_path: Path) -> None:
    said: list[str] = []
    found = label_prompts(ask(models, max_new_tokens=1), tmp_path / "p.jsonl", said.append)
    assert found.cut_off > 24  # of 32: an answer of one token is an empty one that stops
    assert found.notes[CUT_OFF] == found.pairs
    assert any(f"rows: {CUT_OFF} (" in line for line in said)


def test_plain_text_stays_plain(models: Path, tmp_path: Path) -> None:
    rows = [{"text": "the cat sat on"}, {"text": "how many red birds"}]
    path = write_rows(tmp_path / "text.jsonl", rows)
    label_prompts(ask(models, prompts=[{"path": str(path)}]), tmp_path / "p.jsonl", silent)
    for row in read(tmp_path / "p.jsonl"):
        assert row["prompt"] in [source["text"] for source in rows]
        assert isinstance(row["chosen"], str)
        assert isinstance(row["rejected"], str)


def test_a_prompt_that_is_read_back_differently_is_noted(tmp_path: Path) -> None:
    tokenizer, report = tiny_tokenizer(), DataReport(prompts=True)
    turns = [{"role": "user", "content": "the cat"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
    prompts = PromptSet(
        (Prompt(ids, turns, None, {}, "a:1"), Prompt(ids[1:], turns, None, {}, "a:2")), report, ""
    )
    sides = {key: [{"role": "assistant", "content": key}] for key in ("chosen", "rejected")}
    rows = [(number, {"prompt": turns, **sides}) for number in (0, 1)]
    module._write_rows(tmp_path / "p.jsonl", rows, prompts, tokenizer, report)
    assert report.notes == {module.OTHER_TOKENS: 1}
    assert report.examples[module.OTHER_TOKENS] == ["a:2"]


@pytest.mark.parametrize("stage", ["dpo", "reward"])
def test_stages_train_on_the_file_as_it_is(stage: str, models: Path, tmp_path: Path) -> None:
    found = label_prompts(ask(models), tmp_path / "rows.jsonl", silent)
    summary = train(make_preference_recipe(tmp_path, models / "sft/run", stage))
    assert summary.steps == 4
    about = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    report = about["data"]["train"]
    assert report["kept"] == report["rows"] == found.pairs
    # Only for the row with tools: nothing else that was written is doubtful.
    assert report["notes"].keys() <= {"tool calls written as text: the template has none"}


# The command -----------------------------------------------------------------------------------


def command(models: Path, **changes: Any) -> list[Any]:
    options = {
        "reward": "rm/run",
        "output": "out.jsonl",
        "max-new-tokens": 10,
        "dtype": "float32",
        "seed": 4,
        **changes,
    }
    return ["data", "label", "sft/run", "prompts.jsonl"] + [
        part for key, value in options.items() for part in (f"--{key}", value)
    ]


def test_the_command(alignkit: CommandLine, models: Path) -> None:
    path = models / "out.jsonl"
    done = alignkit(*command(models, take=5, samples=3), "--json", cwd=models)
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    rows = read(path)
    assert found["output"] == "out.jsonl"
    assert (found["prompts"], found["answers"], found["pairs"]) == (5, 15, len(rows))
    assert found["rewards/worst"] < found["rewards/mean"] < found["rewards/best"]
    assert {(row["model"], row["reward_model"]) for row in rows} == {("sft/run", "rm/run")}
    before = path.read_bytes()
    again = alignkit(*command(models, take=5, samples=3), cwd=models)
    assert (again.code, again.stderr) == (
        2,
        "error: out.jsonl exists already\nhint: add --overwrite, or name another file\n",
    )
    replaced = alignkit(*command(models, take=5, samples=3), "--overwrite", cwd=models)
    assert (replaced.code, replaced.stdout) == (0, "")
    assert f"{len(rows)} pairs in out.jsonl" in replaced.stderr
    assert "15 answers to 5 prompts" in replaced.stderr
    assert path.read_bytes() == before


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "one sample": (
        {"samples": 1},
        "command line: samples must be at least 2, got 1\n"
        "hint: at least two: the best is paired with the worst; 4 to 16 is usual\n",
    ),
    "cold": (
        {"temperature": 0},
        "command line: temperature must be at least 0.0001, got 0.0\nhint: 0.7 to 1 is usual\n",
    ),
    "margin": (
        {"margin": -1},
        "command line: margin must be at least 0, got -1.0\n"
        "hint: in units of the reward model; 0 accepts any difference\n",
    ),
    "dtype": (
        {"dtype": "int3"},
        "command line: dtype must be 'auto', 'bfloat16', 'float16' or 'float32', got 'int3'\n",
    ),
    "suffix": (
        {"output": "out.json"},
        "pairs are written as .jsonl, one row a line, got out.json\nhint: name it out.jsonl\n",
    ),
    "no reward model": (
        {"reward": "sft/run"},
        "sft/run is not a reward model: it has no scalar head\n"
        "hint: name a run of the reward stage, its adapter/ or its merged/\n",
    ),
    "long answers": (
        {"max-new-tokens": 100000},
        "100000 new tokens leave no room for a prompt in the context of sft/run, which is ",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs(case: str, alignkit: CommandLine, models: Path) -> None:
    changes, message = WRONG[case]
    done = alignkit(*command(models, **{"output": "no.jsonl", **changes}), cwd=models)
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")
    assert not list(models.glob("*no*.jsonl"))


def test_a_misspelled_file(alignkit: CommandLine, models: Path) -> None:
    arguments = command(models, output="no.jsonl")
    arguments[3] = "prompt.jsonl"
    done = alignkit(*arguments, cwd=models)
    assert (done.code, done.stderr) == (
        2,
        "error: command line: prompts[0].path names no file: 'prompt.jsonl'\n"
        "hint: did you mean prompts.jsonl?\n",
    )


# In a pipeline ---------------------------------------------------------------------------------


def make_pipeline(folder: Path, models: Path) -> Path:
    """Labelling with existing models, and DPO on the pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.jsonl").write_bytes((models / "prompts.jsonl").read_bytes())
    asked = ask(models).model_dump(mode="json", include={"model", "reward", "max_new_tokens"})
    stages = {
        "marks": {"label": {**asked, "prompts": [{"path": "prompts.jsonl"}], "dtype": "float32"}},
        "dpo": {
            "stage": "dpo",
            "model": {"base": asked["model"], "dtype": "float32"},
            "adapter": {"kind": "lora", "rank": 4},
            "data": {"train": [{"path": "${marks}/pairs.jsonl"}], "max_length": 256},
            "training": {"max_steps": 2, "batch_size": 2, "learning_rate": 1e-3},
            "merge": False,
        },
    }
    path = folder / "p.yaml"
    path.write_text(json.dumps({"output": str(folder / "out"), "stages": stages}), encoding="utf-8")
    return path


def run(pipeline: Path, *overrides: str) -> list[Result]:
    loaded = load_pipeline(str(pipeline), list(overrides))
    running = PipelineRun(loaded, RunOptions(quiet=True))
    running.run()
    return running.results


def what(results: list[Result]) -> list[str]:
    return [result.status for result in results]


@pytest.mark.slow
def test_a_pipeline_trains_on_what_it_has_labelled(models: Path, tmp_path: Path) -> None:
    path = make_pipeline(tmp_path / "p", models)
    results = run(path)
    assert what(results) == ["done", "done"]
    folder = tmp_path / "p" / "out" / "marks"
    rows = read(folder / "pairs.jsonl")
    assert (results[0].stage, results[0].numbers["pairs"]) == ("label", len(rows))
    about = json.loads((folder / "label.json").read_text(encoding="utf-8"))
    assert about["summary"]["rewards/best"] == results[0].numbers["rewards/best"]
    assert about["settings"]["samples"] == 4
    again = run(path)
    assert what(again) == ["skipped", "skipped"]
    assert again[0].numbers == results[0].numbers
    # Stopped before the mark of its end was written: the same pairs are made again, once.
    before = (folder / "pairs.jsonl").read_bytes()
    record = tmp_path / "p" / "out" / "pipeline.json"
    state = json.loads(record.read_text(encoding="utf-8"))
    state["stages"]["marks"] |= {"status": "running", "mark": ""}
    record.write_text(json.dumps(state), encoding="utf-8")
    (folder / "label.json").unlink()
    assert what(run(path)) == ["done", "skipped"]
    assert (folder / "pairs.jsonl").read_bytes() == before
    assert what(run(path)) == ["skipped", "skipped"]
    assert what(run(path, "marks.label.seed=9")) == ["done", "done"]
    # A changed setting that changes no pair: it runs once more, and what follows does not.
    assert what(run(path, "marks.label.seed=9", "marks.label.margin=1e-9")) == ["done", "skipped"]
    assert what(run(path, "marks.label.seed=9", "marks.label.margin=1e-9")) == ["skipped"] * 2


def failure(pipeline: Path, *overrides: str) -> str:
    with pytest.raises(AlignkitError) as caught:
        run(pipeline, *overrides)
    text = str(caught.value).replace(str(pipeline.parent), "DIR")
    assert isinstance(caught.value, RecipeError)
    return text


def test_what_can_be_wrong_in_a_pipeline(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_pipeline(tmp_path / "p", models)
    monkeypatch.chdir(path.parent)
    assert failure(path, "marks.label.sample=3") == (
        "command line: marks: sample is not a key of label\nhint: did you mean samples?"
    )
    assert failure(path, "marks.label.reward={model: x}") == (
        "command line: marks: reward must be text, got {model}\n"
        "hint: a run of the reward stage, as in reward: runs/reward"
    )
    assert failure(path, "marks.label.prompts=[]") == (
        "command line: marks: prompts must not be empty, got []\n"
        "hint: a list of sources, as in [{path: prompts.jsonl}]"
    )
    assert failure(path, f"marks.label.reward={models / 'sft/run'}") == (
        f"command line: reward: {models / 'sft/run'} is not a reward model: it has no scalar head\n"
        "hint: name a run of the reward stage, its adapter/ or its merged/"
    )
    values = json.loads(path.read_text(encoding="utf-8"))
    first = {"stage": "reward", "model": {"base": "x/y"}, "data": values["stages"]["dpo"]["data"]}
    first = {**first, "data": {"train": [{"path": "prompts.jsonl"}]}}
    sft = {**first, "stage": "sft"}
    marks = {"label": {**values["stages"]["marks"]["label"], "model": "${rm}", "reward": "${s}"}}
    values["stages"] = {"rm": first, "s": sft, "marks": marks}
    path.write_text(json.dumps(values), encoding="utf-8")
    assert failure(path) == (
        "p.yaml:1: model is stage rm, which trains a reward model\n"
        "hint: name the stage it was trained from, which can generate text\n"
        "p.yaml:1: reward is stage s, which trains no reward model\n"
        "hint: name a stage with stage: reward"
    )
