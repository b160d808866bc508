"""A merge has the memory of the trained weights: nothing in a run holds them any more."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from running import make_ppo_recipe, make_preference_recipe, make_recipe, train
from transformers import PreTrainedModel

from alignkit.stages.running import finish

HELD = (PeftModel, PreTrainedModel, torch.optim.Optimizer)


@pytest.mark.parametrize(
    ("stage", "more"),
    [("sft", {}), ("dpo", {"reference": {"kind": "frozen_copy"}}), ("kto", {}), ("ppo", {})],
)
def test_neither_model_nor_optimizer_is_left(
    stage: str,
    more: dict[str, Any],
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fields: dict[str, Any] = {"merge": True, "training__max_steps": 1, **more}
    if stage in ("dpo", "kto"):
        recipe = make_preference_recipe(tmp_path, tiny_base, stage, **fields)
    else:
        make: Any = make_recipe if stage == "sft" else make_ppo_recipe
        recipe = make(tmp_path, tiny_base, **fields)
    gc.collect()
    before = {id(held) for held in gc.get_objects() if issubclass(type(held), HELD)}
    left: list[str] = []
    merge = finish.merge_adapter

    def look(*given: Any, **options: Any) -> Any:
        gc.collect()
        held = [one for one in gc.get_objects() if issubclass(type(one), HELD)]
        left.extend(type(one).__name__ for one in held if id(one) not in before)
        return merge(*given, **options)

    monkeypatch.setattr(finish, "merge_adapter", look)
    train(recipe)
    assert left == []
