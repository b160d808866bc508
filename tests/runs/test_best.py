"""The best weights, an early end, and every optimizer and schedule: resumed to the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from running import (
    assert_same,
    break_off,
    make_ppo_recipe,
    make_recipe,
    steps_of,
    train,
)
from safetensors.torch import load_file

from alignkit.errors import RecipeError, TrainingError
from alignkit.recipe.reading.load import load_recipe
from alignkit.runtime.metrics import read_metrics
from alignkit.stages.running.best import Best

STEPS = 4
FULL: dict[str, Any] = {"adapter": {"kind": "full"}, "training__learning_rate": 0.2}


def turning(folder: Path, base: Path, **fields: Any) -> Path:
    """A recipe whose held-out loss falls and then rises: its rate is far too high."""
    common: dict[str, Any] = {
        "training__max_steps": STEPS,
        "training__learning_rate": 0.9,
        "training__schedule": "constant",
        "training__eval_every": 1,
        "training__save_every": 2,
        "training__keep": 1,
        "data__eval_fraction": 0.25,
        "merge": False,
    }
    return make_recipe(folder, base, **{**common, **fields})


def held_out(run: Path, name: str) -> dict[int, float]:
    lines = read_metrics(run / "metrics.jsonl")
    return {line["step"]: line[f"eval/{name}"] for line in lines if f"eval/{name}" in line}


def about(run: Path) -> Any:
    return json.loads((run / "run.json").read_text(encoding="utf-8"))


def checkpoints(run: Path) -> list[int]:
    return sorted(int(folder.name[5:]) for folder in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_the_best_is_written(
    full: bool, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own: dict[str, Any] = {"training__keep_best": "loss"}
    own |= FULL if full else {}
    said: list[str] = []
    monkeypatch.setattr(
        "alignkit.runtime.progress.StepProgress.say", lambda self, text: said.append(text)
    )
    summary = train(turning(tmp_path, tiny_base, **own))
    run = tmp_path / "run"
    losses = held_out(run, "loss")
    best = min((step for step in losses if step), key=lambda step: losses[step])
    assert best < STEPS  # else the test would show nothing
    assert checkpoints(run) == [best, STEPS]
    assert summary.best == {
        "metric": "loss",
        "better": "lower",
        "step": best,
        "value": losses[best],
        "seen": STEPS,
        "last": losses[STEPS],
        "since": STEPS - best,
    }
    assert about(run)["summary"]["best"] == summary.best
    assert summary.after["loss"] == losses[best]
    line = f"best: step {best}, loss {losses[best]:.4g}; the last step had {losses[STEPS]:.4g}"
    assert line in said
    file = run / ("merged/model.safetensors" if full else "adapter/adapter_model.safetensors")
    assert_written(run, best, file, "default")
    with pytest.raises(AssertionError):
        assert_written(run, STEPS, file, "default")


def assert_written(run: Path, step: int, file: Path, adapter: str) -> None:
    """Every weight of a file is that of the checkpoint."""
    kept = load_file(run / f"checkpoints/step-{step:06d}/trainable.safetensors")
    for name, weight in load_file(file).items():
        if ".score." in name:  # named otherwise in checkpoints
            continue
        found = [key for key in kept if key.replace(f".{adapter}.", ".").endswith(name)]
        assert len(found) == 1, name
        assert weight.equal(kept[found[0]]), name


RESUMED: dict[str, dict[str, Any]] = {
    "adafactor, cosine_min": {
        "training__optimizer": "adafactor",
        "training__schedule": "cosine_min",
        "training__learning_rate": 0.05,
    },
    "lion, wsd": {
        "training__optimizer": "lion",
        "training__betas": [0.8, 0.95],
        "training__schedule": "wsd",
        "training__decay": 0.5,
        "training__learning_rate": 1e-3,
    },
    "8-bit lion over full weights": {
        "training__optimizer": "lion_8bit",
        "adapter": {"kind": "full"},
        "training__learning_rate": 1e-4,
    },
    "the best, before": {**FULL, "training__keep_best": "loss", "training__keep": 2},
    "the best, after": {"training__keep_best": "loss"},
    "the end": {**FULL, "training__early_stop": 2, "training__keep_best": "accuracy"},
}


@pytest.mark.parametrize("case", RESUMED)
def test_resumed_to_the_same_bytes(case: str, tiny_base: Path, tmp_path: Path) -> None:
    if "lion" in case:
        pytest.importorskip("bitsandbytes")
    steps = 6 if case == "the end" else STEPS
    fields = {"training__keep": 9, "training__max_steps": steps}
    recipe = turning(tmp_path, tiny_base, **{**fields, **RESUMED[case]})
    run = tmp_path / "run"
    train(recipe)
    ended, summary = checkpoints(run)[-1], about(run)["summary"]
    if "best" in case:
        assert summary["best"]["step"] == (1 if "before" in case else 3)
    if case == "the best, before":  # besides the two newest
        assert checkpoints(run) == [1, 2, 4]
    whole = break_off(run, 2)
    train(recipe, resume=True)
    assert checkpoints(run)[-1] == ended
    assert_same(run, whole)
    assert about(run)["summary"] == summary
    if case == "the end":
        assert 2 < ended < steps
        assert len(steps_of(run)) == ended == summary["steps"]
        assert summary["ended_early"].startswith(f"ended early, after step {ended} of {steps}: no")


def test_killed_after_an_early_end(tiny_base: Path, tmp_path: Path) -> None:
    recipe = turning(tmp_path, tiny_base, **FULL, training__early_stop=1)
    train(recipe)
    run = tmp_path / "run"
    assert checkpoints(run) == [2]
    whole = break_off(run, 2)  # all checkpoints stay, nothing of what was written at the end
    train(recipe, resume=True)
    assert_same(run, whole)
    assert about(run)["summary"] == about(whole)["summary"]


def test_ppo_writes_the_best_policy_and_value_model(tiny_base: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "training": {"max_steps": 4, "learning_rate": 2e-2, "warmup": 0, "eval_every": 1},
        "training__save_every": 2,
        "training__keep_best": "reward",
        "training__early_stop": 3,
        "data__eval_fraction": 0.3,
        "reward": {"rule": "regex", "pattern": "e", "weight": -1.0},
    }
    recipe = make_ppo_recipe(tmp_path, tiny_base, **fields)
    train(recipe)
    run = tmp_path / "run"
    best, rewards = about(run)["summary"]["best"], held_out(run, "reward")
    assert best["value"] == max(value for step, value in rewards.items() if step)
    assert best["step"] == 1
    for folder, name in (("adapter", "default"), ("value", "ppo_value")):
        assert_written(run, 1, run / folder / "adapter_model.safetensors", name)
    whole = break_off(run, 2)
    train(recipe, resume=True)
    assert_same(run, whole)


def test_what_counts_as_better() -> None:
    best = Best("accuracy", higher=True, kept=True, patience=2)
    best.look(0, {"accuracy": 9.0})  # before training
    assert (best.step, best.ended, best.held) == (0, False, None)
    for step, value in ((1, 0.5), (2, 0.6), (3, 0.6), (4, float("nan"))):
        assert not best.ended
        best.look(step, {"accuracy": value})
        assert best.is_new(step) == (step < 3)
    assert (best.step, best.value, best.last, best.since, best.ended) == (2, 0.6, None, 2, True)
    assert Best("accuracy", True, True, 2, **json.loads(json.dumps(best.state))) == best
    assert best.ending(4) == ""  # the last step anyway
    assert best.ending(9) == (
        "ended early, after step 4 of 9: no better accuracy in 2 evaluations in a row: 0.6 after "
        "step 2 is the best"
    )
    with pytest.raises(TrainingError, match="keep_best = accuracy is not measured"):
        best.look(5, {"loss": 1.0})
    passed = Best("pass@1", higher=True, kept=True)
    passed.look(1, {"task/pass@1": 0.25})
    assert passed.value == 0.25


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"training__keep_best": "loss", "training__eval_every": None},
            "training.keep_best needs evaluations during the run: set training.eval_every",
        ),
        (
            {"training__early_stop": 2, "training__eval_every": None},
            "training.early_stop needs evaluations during the run: set training.eval_every",
        ),
        (
            {"training__keep_best": "loss", "data__eval_fraction": None},
            "training has keep_best, which needs held-out rows: set data.eval or",
        ),
        (
            {"training__early_stop": 1, "data__eval_fraction": None},
            "training has early_stop, which needs held-out rows: set data.eval or",
        ),
        (
            {"training__keep_best": "rewards/margins"},
            "training has keep_best = rewards/margins, no held-out metric of this stage that has a "
            "best: use loss or perplexity or accuracy",
        ),
        ({"training__decay": 0.1}, "training.decay is a key of schedule = wsd, not of constant"),
        (
            {"training__schedule": "wsd", "training__min_rate": 0.1},
            "training.min_rate is a key of schedule = cosine_min, not of wsd",
        ),
        ({"training__betas": [0.9, 1.0]}, "training.betas[1] must be less than 1, got 1"),
        (
            {"training__optimizer": "adafactor", "training__betas": [0.9, 0.99]},
            "training.betas is no key of optimizer = adafactor",
        ),
    ],
)
def test_what_a_recipe_cannot_ask_for(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    recipe = turning(tmp_path, tmp_path, **fields)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(recipe))
    assert message in str(caught.value)


def test_pass_at_1_needs_a_task(tmp_path: Path) -> None:
    fields = {"data__eval_fraction": 0.3, "training__eval_every": 1}
    recipe = make_ppo_recipe(tmp_path, tmp_path, **fields, training__keep_best="pass@1")
    with pytest.raises(RecipeError, match="keep_best = pass@1 needs a task to measure it"):
        load_recipe(str(recipe))
    task = {"task": {"rule": "regex", "pattern": "e"}}
    recipe = make_ppo_recipe(tmp_path, tmp_path, **fields, **task, training__keep_best="pass@1")
    assert load_recipe(str(recipe)).recipe.training.keep_best == "pass@1"


def test_what_is_not_set_is_filled_in(tmp_path: Path) -> None:
    def values(**fields: Any) -> Any:
        own = {f"training__{key}": value for key, value in fields.items()}
        return load_recipe(str(turning(tmp_path, tmp_path, **own))).recipe.training

    plain = values(learning_rate=None)
    assert (plain.betas, plain.decay, plain.min_rate) == ((0.9, 0.999), None, None)
    assert values(schedule="wsd").decay == 0.2
    assert values(schedule="cosine_min").min_rate == 0.1
    lion = values(optimizer="lion", learning_rate=None)
    assert (lion.betas, lion.learning_rate) == ((0.9, 0.99), 4e-5)  # a fifth of 2e-4
    adafactor = values(optimizer="adafactor", learning_rate=None)
    assert (adafactor.betas, adafactor.learning_rate) == (None, 1e-2)  # 50 times
