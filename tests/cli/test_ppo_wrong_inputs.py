"""What a person mistypes in a PPO recipe: exit code 2, a sentence and a hint, nothing lost."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from commandline import CommandLine, Done
from running import make_ppo_recipe, make_preference_recipe, make_prompts, train, write_rows
from tiny import save_tiny


def said(done: Done, *parts: str) -> None:
    """The command failed politely, with all of the parts on stderr."""
    assert done.code == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    assert done.stderr.count("hint: ") <= 1
    for part in parts:
        assert part in " ".join(done.stderr.split()), done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path.resolve()


@pytest.fixture(scope="module")
def reward_run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model over the tiny base."""
    folder = tmp_path_factory.mktemp("reward")
    steps = {"training__max_steps": 1, "merge": True}
    train(make_preference_recipe(folder, tiny_base, "reward", **steps))
    return folder / "run"


RECIPES: dict[str, tuple[list[str], list[str]]] = {
    "no reward": (
        ["reward=null"],
        ["command line: reward must be a mapping or a list of mappings, got null", "hint: "],
    ),
    "two sources in one": (
        ["reward={model: BASE, rule: exact}"],
        ["command line: reward must be a mapping with one of model, function, url, judge or rule"],
    ),
    "unknown rule": (["reward={rule: lenght, max: 3}"], ["reward.rule", "'lenght'", "length"]),
    "dropout": (
        ["adapter.dropout=0.1"],
        ["adapter has dropout = 0.1: the policy that samples and the policy that is trained"],
    ),
    "batch size": (
        ["training.batch_size=8"],
        ["training.batch_size is not a key", "hint: did you mean rollout.prompts_per_step?"],
    ),
    "reference": (
        ["reference={kind: cached}"],
        ["reference is not a key", "the reference is the model that training starts from"],
    ),
    "a step of no length": (["training.learning_rate=0"], ["must be greater than 0, got 0"]),
    "beyond the context": (
        ["data.max_length=4096"],
        [
            "data.max_length = 4096 is longer than the model's context of 2048 tokens",
            "hint: set data.max_length=2048 or less",
        ],
    ),
    "no room for prompts": (
        ["data.max_length=32", "rollout.max_new_tokens=32"],
        [
            "data.max_length = 32 leaves no room for prompts with rollout.max_new_tokens = 32",
            "hint: raise data.max_length or lower rollout.max_new_tokens",
        ],
    ),
    "all prompts too long": (
        ["data.max_length=12"],
        [
            "no prompt is left: 12 rows dropped: longer than max_length = 6 tokens",
            "hint: raise data.max_length",
        ],
    ),
    "a prompt too long": (
        ["data.max_length=40", "data.too_long=error"],
        ["rows.jsonl:2: the prompt has ", "tokens, more than data.max_length = 34", "hint: raise"],
    ),
    "prompts that lose their end": (
        ["data.too_long=truncate_right"],
        ["data.too_long: prompts keep their end", "hint: truncate_left keeps the end"],
    ),
    "no reward model there": (
        ["reward={model: runs/none}"],
        ["reward.model does not exist: 'runs/none'", "hint: name a run of the reward stage"],
    ),
    "no reward function there": (
        ["reward={function: none.py:score}"],
        ["none.py", "hint: "],
    ),
    "a language model as reward": (
        ["reward={model: BASE}"],
        ["is not a reward model: it has no scalar head", "hint: name a run of the reward stage"],
    ),
    "a reward model over another base": (
        ["reward={model: REWARD}", "model.base=OTHER"],
        [
            "was trained over another base",
            "so it cannot share its weights",
            "reward.separate=true",
        ],
    ),
    "a reward model without statistics": (
        ["reward={model: BARE}"],
        ["stores no mean and standard deviation", "hint: set reward.normalize=false"],
    ),
    "a column that is missing": (
        ["reward={rule: exact, column: solution}"],
        ["rows.jsonl:1: the row has no column 'solution'", "hint: its columns are prompt"],
    ),
}


LATE = {"a column that is missing"}
"""Found at the first response, when the run's folder is there."""


@pytest.mark.parametrize("case", RECIPES)
def test_recipes(
    case: str, alignkit: CommandLine, tiny_base: Path, reward_run: Path, folder: Path
) -> None:
    overrides, parts = RECIPES[case]
    recipe = make_ppo_recipe(folder, tiny_base)
    if "OTHER" in " ".join(overrides):
        save_tiny(folder / "other", seed=1)
    if "BARE" in " ".join(overrides):
        shutil.copytree(reward_run / "adapter", folder / "bare")
        (folder / "bare" / "reward.json").unlink()
    places = {"BASE": tiny_base, "REWARD": reward_run, "OTHER": folder / "other"}
    for name, place in {**places, "BARE": folder / "bare"}.items():
        overrides = [text.replace(name, str(place)) for text in overrides]
    said(alignkit("ppo", recipe, *overrides, cwd=folder), *parts)
    assert not (folder / "run" / "checkpoints").exists()
    assert not (folder / "run").exists() or case in LATE


def test_a_recipe_without_a_reward(alignkit: CommandLine, tiny_base: Path, folder: Path) -> None:
    recipe = make_ppo_recipe(folder, tiny_base)
    text = recipe.read_text(encoding="utf-8")
    start = text.index('"reward"')
    recipe.write_text(text[:start] + text[text.index('"rollout"') :], encoding="utf-8")
    said(alignkit("ppo", recipe, cwd=folder), "reward is required")
    assert not (folder / "run").exists()


def test_more_processes_than_prompts(alignkit: CommandLine, tiny_base: Path, folder: Path) -> None:
    recipe = make_ppo_recipe(folder, tiny_base)
    done = alignkit("plan", recipe, "--processes", "5", cwd=folder)
    said(done, "rollout.prompts_per_step = 4 is less than the 5 processes", "hint: each process")


# All faults of a function, by their whole messages, are in generation/test_rewards.py.
FUNCTIONS: dict[str, tuple[str, list[str]]] = {
    "raises": (
        "def score(prompts, completions):\n    return [text[99] for text in completions]\n",
        [
            "score.py:2: score raised IndexError: string index out of range, given 4 completions",
            "hint: the line is `return [text[99] for text in completions]`",
        ],
    ),
    "wants a column": (
        "def score(prompts, completions, answer):\n    return [1.0 for _ in completions]\n",
        ["score.py:score wants 'answer', a column that not every row has", "the rows have prompt"],
    ),
    "is named otherwise": (
        "def scores(prompts, completions):\n    return [1.0 for _ in completions]\n",
        ["score.py: has no function 'score'", "hint: did you mean scores?"],
    ),
}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_reward_functions(case: str, alignkit: CommandLine, tiny_base: Path, folder: Path) -> None:
    code, parts = FUNCTIONS[case]
    (folder / "score.py").write_text(code, encoding="utf-8")
    reward = {"function": str(folder / "score.py:score")}
    recipe = make_ppo_recipe(folder, tiny_base, reward=reward)
    said(alignkit("ppo", recipe, cwd=folder), *parts)
    run = folder / "run"
    assert not (run / "checkpoints").exists()
    assert not (run / "adapter").exists()
    # Nothing stands in the way of the fixed function.
    if case == "raises":
        fixed = "def score(prompts, completions):\n    return [1.0 for _ in completions]\n"
        (folder / "score.py").write_text(fixed, encoding="utf-8")
        again = ["--resume"] if run.exists() else []
        done = alignkit("ppo", recipe, "training.max_steps=4", *again, cwd=folder)
        assert done.code == 0, done.stderr


def test_a_reward_column_of_some_rows(alignkit: CommandLine, tiny_base: Path, folder: Path) -> None:
    rows: list[dict[str, Any]] = [{**row, "answer": "4"} for row in make_prompts(6)]
    rows[1]["answer"] = "four"
    write_rows(folder / "rows.jsonl", rows)
    recipe = make_ppo_recipe(folder, tiny_base, reward={"rule": "numeric"})
    done = alignkit("ppo", recipe, cwd=folder)
    said(done, "rows.jsonl:2: the reward rule `numeric` finds no number in 'answer': 'four'")
