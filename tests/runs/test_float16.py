"""float16: every stage learns with scaled losses, and overflows are counted, told and resumed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from running import (
    adapter_of,
    assert_same,
    break_off,
    losses,
    make_ppo_recipe,
    make_preference_recipe,
    make_recipe,
    steps_of,
    train,
)

from alignkit.runtime import loss_scale
from alignkit.runtime.loss_scale import FIRST, LossScale

MAKERS: dict[str, Callable[..., Path]] = {
    "sft": make_recipe,
    **{stage: partial(make_preference_recipe, stage=stage) for stage in ("reward", "dpo", "kto")},
    "ppo": make_ppo_recipe,
}
HALF = {"model__dtype": "float16"}


def test_the_factor_follows_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "PATIENCE", 2)
    scale = LossScale.of("float16", {})
    assert scale.overflowed()
    assert (scale.value, scale.overflows) == (FIRST / 2, 1)
    scale.passed()
    assert scale.value == FIRST / 2
    again = LossScale.of("float16", scale.state)
    again.passed()
    assert again.metrics == {"loss_scale": FIRST, "overflows": 1}
    assert not LossScale.of("float16", {"value": 1.0}).overflowed()
    plain = LossScale.of("bfloat16", {})
    assert not plain.overflowed()
    assert (plain.value, plain.metrics, plain.state) == (1.0, {}, {})


def test_gradients_are_divided_to_the_bit() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    gradient = torch.tensor([1e-20, -3.0, 0.1])
    weight.grad = gradient * FIRST
    LossScale.of("float16", {}).divide([weight, torch.nn.Parameter(torch.zeros(1))])
    assert torch.equal(weight.grad, gradient)


@pytest.mark.parametrize("stage", MAKERS)
def test_every_stage_learns_what_it_learns_in_float32(
    stage: str, tiny_base: Path, tmp_path: Path
) -> None:
    few = {"training__max_steps": 2, "merge": False}
    half = MAKERS[stage](tmp_path / "half", tiny_base, **HALF, **few)
    whole = MAKERS[stage](tmp_path / "whole", tiny_base, **few)
    train(half)
    train(whole)
    found = steps_of(tmp_path / "half" / "run")
    expected = losses(tmp_path / "whole" / "run")
    if stage == "ppo":  # it samples other responses
        assert all(step["grad_norm"] > 0 for step in found)
    else:
        assert losses(tmp_path / "half" / "run") == pytest.approx(expected, abs=0.02)
    assert {step["loss_scale"] for step in found} == {FIRST}
    assert {step["overflows"] for step in found} == {0}


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_overflows_are_skipped_counted_and_resumed(
    stage: str,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = 2.0**26
    monkeypatch.setattr(loss_scale, "FIRST", first)
    many = {"training__max_steps": 10, "training__save_every": 5, "training__keep": 9}
    recipe = MAKERS[stage](tmp_path, tiny_base, **HALF, **many, merge=False)
    run = Path(train(recipe).output)
    steps = steps_of(run)
    skipped = [step for step in steps if step["grad_norm"] is None]
    assert len(skipped) >= 2
    assert steps[-1]["overflows"] >= len(skipped)
    assert steps[-1]["loss_scale"] == first / 2 ** steps[-1]["overflows"]
    assert steps[-1]["grad_norm"] is not None
    assert any(bool(w.any()) for name, w in adapter_of(run).items() if "lora_B" in name)
    whole = break_off(run, 5)
    train(recipe, resume=True)
    assert_same(run, whole)
