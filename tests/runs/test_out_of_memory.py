"""Memory that runs out in a step: one more try with half the tokens, told and kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from running import adapter_of, assert_same, break_off, furthest, losses, make_recipe, train

from alignkit.errors import TrainingError
from alignkit.models.heap import is_device_fault, is_out_of_memory
from alignkit.models.scoring.scorer import TokenScorer
from alignkit.packed import PackedBatch

BUDGET = 512
ERRORS = {
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"): (True, True),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"): (True, True),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"): (True, True),
    MemoryError(): (True, True),
    RuntimeError("CUDA error: an illegal memory access was encountered"): (False, True),
    RuntimeError("Expected all tensors to be on the same device, but found two"): (False, True),
    RuntimeError("shapes [3] and [4] cannot be broadcast"): (False, False),
    ValueError("no memory of this"): (False, False),
}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: str(error)[:40])
def test_errors_keep_their_kind(error: Exception) -> None:
    assert (is_out_of_memory(error), is_device_fault(error)) == ERRORS[error]


@pytest.fixture
def small_card(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Training passes of more tokens than the last of the list run out of memory."""
    limits = [10**9]
    forward = TokenScorer.forward

    def limited(self: Any, batch: PackedBatch) -> Any:
        if torch.is_grad_enabled() and batch.num_tokens > limits[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, batch)

    monkeypatch.setattr(TokenScorer, "forward", limited)
    return limits


def recipe_of(folder: Path, base: Path) -> Path:
    return make_recipe(
        folder, base, training__microbatch_tokens=BUDGET, training__save_every=2, merge=False
    )


def test_one_more_try_with_half_the_tokens(
    small_card: list[int],
    tiny_base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = Path(train(recipe_of(tmp_path / "plain", tiny_base)).output)
    small_card.append(BUDGET // 2)
    run = Path(train(recipe_of(tmp_path / "small", tiny_base)).output)
    assert losses(run) == pytest.approx(losses(plain), rel=1e-6)
    assert furthest(adapter_of(run), adapter_of(plain)) < 1e-5
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    assert plan["microbatch_tokens"] == BUDGET // 2
    whole = break_off(run, 2)
    train(recipe_of(tmp_path / "small", tiny_base), resume=True)
    assert_same(run, whole)


def test_the_second_try_draws_the_same_dropout(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropout = {"adapter": {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.3}}

    def trained(name: str, budget: int) -> Path:
        fields = {**dropout, "training__microbatch_tokens": budget, "merge": False}
        return Path(train(make_recipe(tmp_path / name, tiny_base, **fields)).output)

    halved = trained("halved", BUDGET // 2)
    forward, passes = TokenScorer.forward, []

    def limited(self: Any, batch: PackedBatch) -> Any:
        scores = forward(self, batch)  # which has drawn
        passes.append(torch.is_grad_enabled())
        # After the start-up check and the dry run: in the first step.
        if batch.num_tokens > BUDGET // 2 and sum(passes) > 2 and passes[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return scores

    monkeypatch.setattr(TokenScorer, "forward", limited)
    run = trained("tried again", BUDGET)
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    assert plan["microbatch_tokens"] == BUDGET // 2
    assert losses(run) == losses(halved)


def test_half_must_be_enough(small_card: list[int], tiny_base: Path, tmp_path: Path) -> None:
    small_card.append(10)
    with pytest.raises(TrainingError, match="does not fit in memory"):
        train(recipe_of(tmp_path, tiny_base))
