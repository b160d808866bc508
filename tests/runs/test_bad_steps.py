"""Steps without a finite loss or gradient, losses that stand out, weights that are not finite."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import CommandLine
from running import assert_same, break_off, make_ppo_recipe, make_recipe, steps_of, train
from safetensors.torch import load_file

from alignkit.errors import NotFiniteError, TrainingError
from alignkit.recipe.reading.load import load_recipe
from alignkit.stages.ppo import update
from alignkit.stages.registry import run_stage
from alignkit.stages.running.bad_steps import BadSteps, Spikes
from alignkit.stages.running.session import RunOptions
from alignkit.stages.supervised import sft

ERROR = NotFiniteError("the loss of step 7 is nan")


def test_a_run_that_stops() -> None:
    with pytest.raises(NotFiniteError, match="step 7"):
        BadSteps("stop", 100).skip(ERROR)


@pytest.mark.parametrize(
    ("steps", "pattern", "message"),
    [
        (100, "x" * 10 + ".", None),
        (100, "x" * 11, "11 steps in a row had no finite loss or gradient, more than the 10 that"),
        (100, "x." * 10, None),
        (100, "x." * 11, "11 steps had no finite loss or gradient, more than the 10 that are"),
        (5000, "x." * 50, None),  # 1%
        (5000, "x." * 51, "51 steps had no finite loss or gradient, more than the 50 that are"),
        (5000, "x" * 11, "11 steps in a row"),
    ],
)
def test_how_many_are_skipped(steps: int, pattern: str, message: str | None) -> None:
    bad = BadSteps("skip", steps)

    def go() -> None:
        for kind in pattern:
            restored = BadSteps("skip", steps, **bad.state)  # after any step
            bad.skipped, bad.in_a_row = restored.skipped, restored.in_a_row
            bad.skip(ERROR) if kind == "x" else bad.passed()

    if message is None:
        go()
        assert bad.skipped == pattern.count("x")
    else:
        with pytest.raises(TrainingError, match=message) as caught:
            go()
        assert "the last: the loss of step 7 is nan" in caught.value.message
        assert caught.value.hint


def test_spikes() -> None:
    rng, spikes = random.Random(0), Spikes()
    losses = [2.0 - step / 1000 + rng.gauss(0, 0.1) for step in range(1000)]
    found = [step for step, loss in enumerate(losses) if spikes.look(loss) is not None]
    assert found == []  # noise of the usual size
    median = spikes.look(3.5)
    assert median == pytest.approx(1.0, abs=0.1)
    assert spikes.look(1.1) is None
    late = Spikes()  # late in preference training: near zero, with rare larger ones
    assert [late.look(0.001 if step % 7 else 0.3) for step in range(200)] == [None] * 200
    assert late.look(0.9) is not None
    assert [Spikes().look(loss) for loss in (1.0, 100.0)] == [None, None]  # too few to compare


BAD = {2, 4}
"""Steps from 0; each step's seed is its number, as the recipe's seed is 0."""


def spoil_loss(value: torch.Tensor) -> torch.Tensor:
    return value * (math.nan if torch.initial_seed() in BAD else 1.0)


def spoil_gradient(value: torch.Tensor) -> torch.Tensor:
    if torch.initial_seed() in BAD and value.requires_grad:
        value.register_hook(lambda gradient: gradient * math.inf)
    return value


FIELDS: dict[str, Any] = {
    "merge": False,
    "training__max_steps": 6,
    "training__save_every": 1,
    "training__keep": 9,
}


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (spoil_loss, "the loss of step 3 is nan; its rows begin with ROWS:"),
        (spoil_gradient, "the gradient of step 3 is not finite; its loss is "),
    ],
)
def test_supervised(
    spoil: Any, sentence: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = sft.cross_entropy_loss
    monkeypatch.setattr(sft, "cross_entropy_loss", lambda logprobs: spoil(right(logprobs)))
    recipe = make_recipe(tmp_path, tiny_base, **FIELDS)
    with pytest.raises(NotFiniteError) as caught:
        train(recipe, "output=" + str(tmp_path / "stopped"))
    assert sentence.replace("ROWS", str(tmp_path / "rows.jsonl")) in caught.value.message
    assert "; its rows begin with " in caught.value.message
    assert "training.on_bad_step=skip" in caught.value.hint
    assert len(steps_of(tmp_path / "stopped")) == 2
    summary = train(recipe, "training.on_bad_step=skip")
    run = tmp_path / "run"
    assert summary.skipped_steps == 2
    assert math.isfinite(summary.loss)
    assert [step["skipped_steps"] for step in steps_of(run)] == [0, 0, 1, 1, 2, 2]
    assert [step["loss"] is None for step in steps_of(run)] == [n in BAD for n in range(6)]
    saved = [load_file(path) for path in sorted(run.rglob("trainable.safetensors"))]
    same = [all(torch.equal(a[k], b[k]) for k in a) for a, b in pairwise(saved)]
    assert same == [False, True, False, True, False]
    break_off(run, 3)  # just after a skipped step
    train(recipe, "training.on_bad_step=skip", resume=True)
    assert_same(run, tmp_path / "whole-run")


def test_ppo(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = update.policy_losses

    def spoilt(*args: Any, **options: Any) -> torch.Tensor:
        return spoil_loss(right(*args, **options))

    monkeypatch.setattr(update, "policy_losses", spoilt)
    recipe = make_ppo_recipe(tmp_path, tiny_base, **FIELDS)
    with pytest.raises(NotFiniteError, match="a loss of step 3 is not finite: nan of the policy"):
        train(recipe, "output=" + str(tmp_path / "stopped"))
    assert train(recipe, "training.on_bad_step=skip").skipped_steps == 2
    run = tmp_path / "run"
    assert [step["loss"] is None for step in steps_of(run)] == [n in BAD for n in range(6)]
    break_off(run, 3)
    train(recipe, "training.on_bad_step=skip", resume=True)
    assert_same(run, tmp_path / "whole-run")


@pytest.mark.slow
def test_two_processes_skip_together(
    alignkit: CommandLine, tiny_base: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path, tiny_base, **FIELDS)
    # Only the first process sees the bad number: its seed in the third step is 2 * 2 + 0.
    spoil = """
import torch
import alignkit.stages.supervised.sft as sft
right = sft.cross_entropy_loss
def wrong(logprobs):
    return right(logprobs) * (float("nan") if torch.initial_seed() == 4 else 1.0)
sft.cross_entropy_loss = wrong
"""
    arguments = ("sft", recipe, "training.on_bad_step=skip")
    done = alignkit.together(2, *arguments, cwd=tmp_path, before=spoil)
    assert done.code == 0, done.stderr
    assert "step 3 is skipped: the loss of step 3 is nan; its rows begin with" in done.stderr
    assert "1 of 6 steps were skipped" in done.stderr
    assert [step["skipped_steps"] for step in steps_of(tmp_path / "run")] == [0, 0, 1, 1, 1, 1]


def test_weights_that_are_not_finite_are_not_saved(tiny_base: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(make_recipe(tmp_path, tiny_base, **FIELDS))).recipe
    # More than a recipe may say: whatever makes weights infinite, they are not saved.
    training = recipe.training.model_copy(update={"weight_decay": 1e300})
    with pytest.raises(
        TrainingError, match=r"is not finite after step 1: it is not saved"
    ) as caught:
        run_stage(recipe.model_copy(update={"training": training}), RunOptions(quiet=True))
    assert "training.weight_decay" in caught.value.hint
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
    assert not (tmp_path / "run" / "adapter").exists()
