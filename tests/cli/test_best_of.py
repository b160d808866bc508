"""`alignkit generate --best-of`: the answer that the reward model likes most."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from commandline import CommandLine, Done
from tiny import save_tiny

PROMPTS = ["the cat", "how many red birds fly over our old house"]
ENDS = ("stop", "length")
EXACT = ("--dtype", "float32", "--max-new-tokens", "10")


@pytest.fixture(scope="module")
def models(talkers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with sft/run and rm/run."""
    folder = tmp_path_factory.mktemp("best") / "models"
    shutil.copytree(talkers, folder)
    return folder


def best(alignkit: CommandLine, models: Path, *more: str) -> Done:
    return alignkit(
        "generate", "sft/run", *PROMPTS, "--reward", "rm/run", *EXACT, *more, cwd=models
    )


def as_json(done: Done) -> Any:
    assert done.code == 0, done.stderr
    return json.loads(done.stdout)


def test_the_best_of_all_candidates(alignkit: CommandLine, models: Path) -> None:
    rows = as_json(best(alignkit, models, "--best-of", "6", "--json"))
    assert [row["prompt"] for row in rows] == PROMPTS
    for row in rows:
        rewards = [candidate["reward"] for candidate in row["candidates"]]
        assert len(set(rewards)) > 1
        assert row["chosen"] == rewards.index(max(rewards))
        assert {**row, **row["candidates"][row["chosen"]]} == row
        for candidate in row["candidates"]:
            assert candidate["finish"] in (("stop",) if candidate["tokens"] < 10 else ENDS)


def test_more_answers_hold_the_fewer_ones(alignkit: CommandLine, models: Path) -> None:
    many = as_json(best(alignkit, models, "--best-of", "6", "--json"))
    few = as_json(best(alignkit, models, "--best-of", "2", "--json"))
    other = as_json(best(alignkit, models, "--best-of", "2", "--json", "--seed", "1"))
    for more, less, drawn in zip(many, few, other, strict=True):
        texts = [candidate["answer"] for candidate in more["candidates"]]
        assert [candidate["answer"] for candidate in less["candidates"]] == texts[:2]
        assert [candidate["answer"] for candidate in drawn["candidates"]] != texts[:2]
        assert more["reward"] >= less["reward"] - 1e-4


def test_plain_output(alignkit: CommandLine, models: Path) -> None:
    rows = as_json(best(alignkit, models, "--best-of", "3", "--json"))
    done = best(alignkit, models, "--best-of", "3")
    assert done.code == 0
    shown = [f"> {row['prompt']}\n{row['answer']}\n" for row in rows]
    assert done.stdout == "\n".join(shown)
    for row in rows:
        rewards = [candidate["reward"] for candidate in row["candidates"]]
        said = f"the best of 3: mean {sum(rewards) / 3:.4f}, worst {min(rewards):.4f}"
        assert f"reward {max(rewards):.4f}, {said}" in done.stderr


def test_a_cold_draw_is_greedy(alignkit: CommandLine, models: Path) -> None:
    # Logits a thousand times larger leave one token: every answer is the likeliest one.
    arguments = ("--best-of", "3", "--temperature", "1e-3", "--json")
    plain = as_json(alignkit("generate", "sft/run", *PROMPTS, *EXACT, "--json", cwd=models))
    for row, greedy in zip(as_json(best(alignkit, models, *arguments)), plain, strict=True):
        assert {candidate["answer"] for candidate in row["candidates"]} == {greedy["answer"]}
        assert row["chosen"] == 0


SINGLE = (
    "is not available with --best-of: its answers are drawn from the model's whole distribution\n"
    "hint: leave it out; a lower --temperature narrows the distribution\n"
)
WRONG: dict[str, tuple[list[str], str]] = {
    "no reward": (
        ["--best-of", "2"],
        "--best-of and --reward go together\nhint: as in --best-of 8 --reward runs/reward\n",
    ),
    "no number": (
        ["--reward", "rm/run"],
        "--best-of and --reward go together\nhint: as in --best-of 8 --reward runs/reward\n",
    ),
    "greedy": (
        ["--best-of", "2", "--reward", "rm/run", "--temperature", "0"],
        "--best-of needs a temperature above 0: at 0 all answers are the same\n"
        "hint: remove --temperature; its default is then 1\n",
    ),
    "top-p": (["--best-of", "2", "--reward", "rm/run", "--top-p", "0.9"], f"--top-p {SINGLE}"),
    "top-k": (["--best-of", "2", "--reward", "rm/run", "--top-k", "5"], f"--top-k {SINGLE}"),
    "penalty": (
        ["--best-of", "2", "--reward", "rm/run", "--repetition-penalty", "1.1"],
        f"--repetition-penalty {SINGLE}",
    ),
    "against": (
        ["--best-of", "2", "--reward", "rm/run", "--against", "sft/run"],
        "--best-of and --against exclude each other\nhint: generate with one model at a time\n",
    ),
    "no reward model": (
        ["--best-of", "2", "--reward", "sft/run"],
        "sft/run is not a reward model: it has no scalar head\n"
        "hint: name a run of the reward stage, its adapter/ or its merged/\n",
    ),
    "nothing there": (
        ["--best-of", "2", "--reward", "rm/ran"],
        "there is no reward model 'rm/ran'\n"
        "hint: name a run of the reward stage; `alignkit reward RECIPE` trains one\n",
    ),
    "too long": (
        ["--best-of", "2", "--reward", "rm/run", "--max-new-tokens", "100000"],
        "a prompt of 15 tokens and 100000 new ones do not fit the model's context of ",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs(case: str, alignkit: CommandLine, models: Path) -> None:
    arguments, message = WRONG[case]
    done = alignkit("generate", "sft/run", "the cat", *arguments, cwd=models)
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")


def test_models_that_cannot_meet(alignkit: CommandLine, models: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "qwen", "qwen2")
    options = ("the cat", "--best-of", "2", "--reward", "rm/run")
    done = alignkit("generate", tmp_path / "qwen", *options, cwd=models)
    assert done.code == 2
    assert "error: the reward model rm/run reads other tokens than the policy writes" in done.stderr
    done = alignkit("generate", "rm/run", *options, cwd=models)
    assert done.code == 2
    assert "error: rm/run is a reward model: it scores answers and writes none" in done.stderr
