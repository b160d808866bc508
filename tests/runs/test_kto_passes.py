"""KTO in one pass over both completions, and in two: the same loss, baseline and gradients."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_model
from torch import nn

from alignkit.data.documents import Branch, Document
from alignkit.models.adapters.attach import attach_adapter
from alignkit.models.scoring.scorer import TokenScorer
from alignkit.packed import Role
from alignkit.recipe.adapters import LoraSpec
from alignkit.recipe.stages.registry import stages
from alignkit.stages.supervised.kto import kto_hooks
from alignkit.stages.supervised.reference import adapter_off


def scorer_of(dropout: float = 0.0) -> Any:
    spec = LoraSpec(kind="lora", rank=2, alpha=4.0, dropout=dropout)
    model = attach_adapter(tiny_model(), spec, 0)
    torch.manual_seed(3)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.05)
    return TokenScorer(model, torch.float32).train()


def documents() -> list[Document]:
    rng = np.random.default_rng(2)

    def branch(role: Role, length: int) -> Branch:
        ids = rng.integers(0, 600, length).astype(np.int32)
        return Branch(ids, np.ones(length, np.bool_), role)

    return [
        Document(
            rng.integers(0, 600, 9 + row).astype(np.int32),
            (
                branch((Role.CHOSEN, Role.REJECTED)[row % 2], 3 + row),
                branch(Role.MISMATCHED, 6 - row),
            ),
            row,
        )
        for row in range(4)
    ]


def hooks() -> Any:
    values = {
        "stage": "kto",
        "output": "x",
        "model": {"base": "m", "dtype": "float32"},
        "data": {"train": [{"path": "rows.jsonl"}]},
    }
    recipe: Any = stages()["kto"].model_validate_json(json.dumps(values)).with_defaults()
    return kto_hooks(recipe, documents(), adapter_off)  # type: ignore[arg-type]


@pytest.mark.parametrize("alone", [True, False])
def test_both_ways_are_one(alone: bool) -> None:
    scorer, rows, kto = scorer_of(), documents(), hooks()
    with torch.no_grad():
        separate = kto.measure(scorer, rows, False)
    measured = {name: float(value) for name, value in separate.sums.items()}
    assert separate.loss is None
    kto.loss(scorer, rows, measured).loss.backward()
    expected = {n: p.grad.clone() for n, p in scorer.named_parameters() if p.requires_grad}
    scorer.zero_grad()
    found = kto.measure(scorer, rows, alone)
    assert (found.loss is not None) == alone
    assert {n: float(v) for n, v in found.sums.items()} == pytest.approx(measured, abs=1e-5)
    assert not any(value.requires_grad for value in found.sums.values())
    if found.loss is None:
        return
    together = found.loss(measured)
    together.loss.backward()
    for name, weight in scorer.named_parameters():
        if weight.requires_grad:
            assert torch.allclose(weight.grad, expected[name], rtol=1e-4, atol=1e-6), name


def test_what_is_dropped_at_random_is_measured_without() -> None:
    assert hooks().measure(scorer_of(dropout=0.2), documents(), True).loss is None
