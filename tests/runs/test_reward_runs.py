"""Runs whose rewards fail, do not always apply, or are measured apart: what they cost and say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from commandline import CommandLine
from running import (
    adapter_of,
    furthest,
    make_ppo_recipe,
    make_prompts,
    steps_of,
    train,
    write_rows,
)

from alignkit.errors import RecipeError, RewardError
from alignkit.runtime.metrics import read_metrics

GROUPS = {"prompts_per_step": 3, "samples_per_prompt": 4, "max_new_tokens": 6}
FIELDS: dict[str, Any] = {
    "rollout": GROUPS,
    "training": {"max_steps": 3, "learning_rate": 2e-3, "warmup": 0, "save_every": 1, "keep": 9},
}

HEAD = """\
import math, os, pathlib, sys, time
ARMED = pathlib.Path({armed!r})
DONE = pathlib.Path({run!r}) / "checkpoints" / "step-000001"


def score(prompts, completions, **columns):
    scores = [float("e" in text) for text in completions]
    if ARMED.exists() and DONE.exists():
"""
FAULTS = {
    "raises": ("raise ValueError('no more')", "score raised ValueError: no more, given 12"),
    "hangs": ("time.sleep(60)", "gave no result within 2 seconds; the response is to "),
    "gives None for all": ("return [None] * len(scores)", "no reward applies to any of 12"),
    "gives NaN": ("return [math.nan] * len(scores)", "score 0 must be a finite number, got nan"),
    "gives too few": ("return scores[1:]", "must give 12 scores, one for each completion, got 11"),
    "exits": ("os._exit(4)", "ended its process with exit code 4; the response is to "),
    "says goodbye": ("sys.exit('bye')", "score raised SystemExit: bye, given 12"),
}
HARMLESS = {
    "prints": "print('x' * 100_000); sys.stdout.buffer.write(b'\\xff')",
    "forks": "os.fork() or os._exit(0)",
    "moves": "os.chdir('/'); os.environ.clear()",
}


def recipe_of(folder: Path, base: Path, act: str, **reward: Any) -> Path:
    code = HEAD.format(armed=str(folder / "armed"), run=str(folder / "run"))
    folder.mkdir(parents=True, exist_ok=True)
    text = f"{code}        {act}\n    return scores\n"
    (folder / "mine.py").write_text(text, encoding="utf-8")
    source = {"function": f"{folder}/mine.py:score", **reward}
    return make_ppo_recipe(folder, base, **FIELDS, stage="grpo", reward=source)


@pytest.fixture(scope="module")
def whole(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose reward never fails."""
    return Path(train(recipe_of(tmp_path_factory.mktemp("whole"), tiny_base, "pass")).output)


@pytest.mark.parametrize("how", FAULTS)
def test_a_reward_that_fails_loses_nothing(
    how: str, whole: Path, tiny_base: Path, tmp_path: Path
) -> None:
    act, said = FAULTS[how]
    recipe = recipe_of(tmp_path, tiny_base, act, timeout=2.0 if how == "hangs" else 60.0)
    (tmp_path / "armed").touch()
    with pytest.raises(RewardError) as caught:
        train(recipe)
    assert said in caught.value.message
    assert caught.value.hint
    (tmp_path / "armed").unlink()
    run = Path(train(recipe, resume=True).output)
    assert furthest(adapter_of(run), adapter_of(whole)) == 0.0


@pytest.mark.parametrize("how", HARMLESS)
def test_what_a_reward_does_beside_changes_nothing(
    how: str, whole: Path, tiny_base: Path, tmp_path: Path
) -> None:
    (tmp_path / "armed").touch()
    run = Path(train(recipe_of(tmp_path, tiny_base, HARMLESS[how])).output)
    assert furthest(adapter_of(run), adapter_of(whole)) == 0.0


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_a_response_without_a_reward_is_left_out(
    stage: str, tiny_base: Path, tmp_path: Path
) -> None:
    # None where the text is short; the other source is not there for it.
    (tmp_path / "mine.py").write_text(
        "def score(prompts, completions, **columns):\n"
        "    if len(completions) == 1 and len(completions[0]) % 3 == 0:\n"
        "        raise ValueError('not this one')\n"
        "    if any(len(text) % 3 == 0 for text in completions):\n"
        "        return 1 / 0\n"
        "    return [float('e' in text) for text in completions]\n"
    )
    source = {"function": f"{tmp_path}/mine.py:score", "on_failure": "skip", "name": "mine"}
    recipe = make_ppo_recipe(tmp_path, tiny_base, **FIELDS, stage=stage, reward=source)
    run = Path(train(recipe).output)
    steps = steps_of(run)
    assert len(steps) == 3
    assert all(0.0 < step["unscored"] < 1.0 for step in steps)
    assert all(0.0 <= step["reward/mine"] <= 1.0 for step in steps)
    lines = read_metrics(run / "samples.jsonl")
    failed = [line for line in lines if line["reward"] is None]
    assert len(failed) == sum(len(line["response"]) % 3 == 0 for line in lines) > 0
    for line in failed:
        assert "mine.py:3: score raised ValueError" in line["notes"]["mine"]["failed"]
        assert line["rewards"] == {"mine": None}


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_a_source_that_fails_for_all_ends_the_run(
    stage: str, tiny_base: Path, tmp_path: Path
) -> None:
    code = "def score(completions, **columns):\n    return 1 / 0\n"
    (tmp_path / "mine.py").write_text(code, encoding="utf-8")
    failing = {"function": f"{tmp_path}/mine.py:score", "on_failure": "skip", "name": "dead"}
    reward = [{"rule": "regex", "pattern": "e"}, failing]
    recipe = make_ppo_recipe(tmp_path, tiny_base, **FIELDS, stage=stage, reward=reward)
    with pytest.raises(RewardError) as caught:
        train(recipe)
    assert caught.value.message.startswith("reward dead: none of ")
    assert "division by zero" in caught.value.message


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_a_prompt_without_rewards_leaves_no_trace_in_the_update(
    stage: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {**FIELDS, "training": {**FIELDS["training"], "max_steps": 1}}
    rows = [{"prompt": f"row {n} of them"} for n in range(3)]
    (tmp_path / "mine.py").write_text(
        "def score(prompts, completions, **columns):\n"
        "    both = zip(prompts, completions)\n"
        "    return [None if 'row 1' in p else float(len(c)) for p, c in both]\n"
    )
    updates = []
    for dropped in (False, True):  # the second never asks the prompt
        folder = tmp_path / str(dropped)
        data = {"train": [{"path": str(write_rows(tmp_path / "rows.jsonl", rows))}]}
        if dropped:
            name = "step_prompts" if stage == "ppo" else "stream"
            module = importlib.import_module(f"alignkit.stages.{stage}.step")
            real = getattr(module, name)
            without = lambda *a, real=real: [item for item in real(*a) if item != 1]  # noqa: E731
            monkeypatch.setattr(module, name, without)
        recipe = make_ppo_recipe(
            folder,
            tiny_base,
            **fields,
            stage=stage,
            reward={"function": f"{tmp_path}/mine.py:score"},
            data={**data, "max_length": 256},
        )
        updates.append(adapter_of(Path(train(recipe).output)))
    assert max(float(w.abs().max()) for n, w in updates[0].items() if "lora_B" in n) > 1e-4
    assert furthest(*updates) < 1e-6


def test_names_are_never_shared(tiny_base: Path, tmp_path: Path) -> None:
    reward = [
        {"rule": "regex", "pattern": "e", "name": "a"},
        {"rule": "regex", "pattern": "a", "name": "a_2"},
        {"rule": "length", "max": 5},
        {"rule": "length", "max": 50},
    ]
    recipe = make_ppo_recipe(tmp_path, tiny_base, **FIELDS, stage="grpo", reward=reward)
    step = steps_of(Path(train(recipe).output))[0]
    parts = [f"reward/{name}" for name in ("a", "a_2", "length", "length_2")]
    assert step["reward"] == pytest.approx(sum(step[part] for part in parts))
    for names, said in ((("a", "a"), "twice"), (("task", "b"), "that of the task")):
        both = [{**source, "name": name} for source, name in zip(reward, names, strict=False)]
        wrong = make_ppo_recipe(tmp_path / said, tiny_base, **FIELDS, stage="grpo", reward=both)
        with pytest.raises(RecipeError, match=said):
            train(wrong)


def test_the_task_is_measured_apart_from_the_reward(
    tiny_base: Path, tmp_path: Path, alignkit: CommandLine
) -> None:
    rows = [{**row, "answer": "e"} for row in make_prompts(8)]
    write_rows(tmp_path / "held.jsonl", rows[:5])
    data = {
        "train": [{"path": str(write_rows(tmp_path / "rows.jsonl", rows[5:]))}],
        "eval": [{"path": str(tmp_path / "held.jsonl")}],
        "max_length": 256,
    }
    task = {"rule": "regex", "pattern": "a"}
    recipe = make_ppo_recipe(
        tmp_path, tiny_base, **FIELDS, stage="grpo", data=data, task=task, output="run"
    )
    run = Path(train(recipe, f"output={tmp_path}/run").output)
    before, after = (
        line for line in read_metrics(run / "metrics.jsonl") if "eval/task/pass@1" in line
    )
    lines = [line for line in read_metrics(run / "samples.jsonl") if line["rows"] == "held_out"]
    for values, step in ((before, 0), (after, 3)):
        own = [line for line in lines if line["step"] == step]
        right = [line["task"] for line in own]
        assert len(right) == 20
        assert [float("a" in line["response"]) for line in own] == right
        assert values["eval/task/pass@1"] == pytest.approx(sum(right) / 20)
        groups = [right[i : i + 4] for i in range(0, 20, 4)]
        assert values["eval/task/pass@4"] == pytest.approx(sum(map(any, groups)) / 5)
    assert "eval/task/pass@1_gain" not in before
    gain = after["eval/task/pass@1"] - before["eval/task/pass@1"]
    assert after["eval/task/pass@1_gain"] == pytest.approx(gain)
    assert after["eval/task/pass@1_gain_low"] <= gain <= after["eval/task/pass@1_gain_high"]

    shown = alignkit("samples", str(run), "-n", "2", cwd=tmp_path)
    assert shown.code == 0, shown.stderr
    assert "step 3, held-out prompts, 5 in all" in shown.stdout
    assert "regex" in shown.stdout
    assert "task" in shown.stdout
    best = json.loads(alignkit("samples", str(run), "--best", "--json", cwd=tmp_path).stdout)
    rewards = [sample["reward"] for sample in best["samples"]]
    assert len(rewards) == 20
    assert rewards == sorted(rewards, reverse=True)
    train_rows = alignkit("samples", str(run), "--rows", "train", "--step", "1", cwd=tmp_path)
    assert "step 1, train prompts" in train_rows.stdout
    wrong = alignkit("samples", str(run), "--step", "2", cwd=tmp_path)
    assert wrong.code == 2
    assert "has no responses of step 2\nhint: there are some of 0, 1, 3" in wrong.stderr
    nothing = alignkit("samples", str(tmp_path), cwd=tmp_path)
    assert nothing.code == 2
    assert "has no samples.jsonl" in nothing.stderr
