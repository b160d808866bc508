"""The gradient of every kind of GRPO against loops over its formula, in float64."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from alignkit.data.documents import Branch, Document
from alignkit.data.prompts import Prompt
from alignkit.generation.sampled import SampledResponse
from alignkit.recipe.stages.grpo import KINDS, GrpoRecipe, GrpoSpec
from alignkit.stages.grpo.update import Groups, GroupUpdater, Minibatch
from alignkit.stages.rollouts.sampling import Rollout
from alignkit.stages.rollouts.scoring import Scored

LENGTHS = [[3, 1, 4], [2, 5, 2]]
LONGEST, PRICE = 7, 0.3


def rollouts() -> list[Rollout]:
    made = []
    for number, lengths in enumerate(LENGTHS):
        own = tuple(
            SampledResponse(np.arange(n), np.zeros(n, np.float32), "stop", 1.0) for n in lengths
        )
        branches = tuple(Branch(c.ids.astype(np.int32), np.ones(len(c.ids), bool)) for c in own)
        ids = np.arange(3, dtype=np.int32)
        document = Document(ids, branches, number)
        made.append(Rollout(Prompt(ids, "", None, {}, "a:1"), document, own, ("",) * len(own)))
    return made


def spec_of(**objective: Any) -> GrpoSpec:
    values = {
        "stage": "grpo",
        "output": "x",
        "model": {"base": "m", "dtype": "float32"},
        "data": {"train": [{"path": "rows.jsonl"}]},
        "reward": {"rule": "json"},
        "objective": objective,
    }
    return GrpoRecipe.model_validate_json(json.dumps(values)).with_defaults().objective


def padded(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def by_hand(
    spec: GrpoSpec,
    new: list[torch.Tensor],
    old: list[torch.Tensor],
    reference: list[torch.Tensor],
    advantages: list[float],
    counts: list[float],
) -> torch.Tensor:
    """The loss, response by response and token by token."""
    responses = sum(counts)
    tokens = sum(len(row) * count for row, count in zip(new, counts, strict=True))
    total = torch.zeros((), dtype=torch.float64)
    low, high = spec.clip or (None, None)
    floor = -math.inf if low is None else 1 - low
    for row, before, ref, a, count in zip(new, old, reference, advantages, counts, strict=True):
        moved = row - before
        own = torch.zeros((), dtype=torch.float64)
        for t in range(len(row)):
            if spec.ratio == "stopped":
                assert high is not None
                loss = -min(float(moved[t].exp()), high) * a * row[t]
            else:
                rho = moved[t].exp()
                if spec.ratio == "sequence":
                    whole = moved.sum() if spec.loss == "sequence_sum" else moved.mean()
                    rho = whole.exp()
                top = math.inf if high is None else 1 + high
                bounded = rho.clamp(floor, top)
                gain = rho * a if float(rho * a) < float(bounded * a) else bounded * a
                if spec.dual_clip and a < 0 and float(gain) < spec.dual_clip * a:
                    gain = torch.tensor(spec.dual_clip * a, dtype=torch.float64)
                loss = -gain
            if spec.kl == "loss" and spec.kl_coef:
                d = ref[t] - row[t]
                loss = loss + spec.kl_coef * (d.exp() - 1 - d)
            own = own + loss
        if spec.ratio == "sequence" and spec.loss == "sequence_sum":
            own = own / len(row)
        if spec.loss == "token_mean":
            own = own / tokens
        elif spec.loss == "sequence_mean":
            own = own / (responses * len(row))
        elif spec.loss == "constant":
            own = own / (responses * LONGEST)
        else:
            own = own / responses
        total = total + count * own
    return total


CASES: dict[str, dict[str, Any]] = {
    **{kind: {"kind": kind} for kind in KINDS},
    "grpo by sequence": {"loss": "sequence_mean"},
    "grpo with kl": {"kl_coef": PRICE},
    "grpo without bounds": {"clip": [None, None]},
    "two bounds": {"dual_clip": 1.2},
    "masked": {"overlong": "mask"},
    "sums of tokens": {"loss": "sequence_sum"},
}


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_the_formula(case: str) -> None:
    spec = spec_of(**CASES[case])
    generator = torch.Generator().manual_seed(4)
    lengths = [n for group in LENGTHS for n in group]

    def draw(scale: float) -> list[torch.Tensor]:
        return [
            scale * torch.randn(n, generator=generator, dtype=torch.float64) - 2 for n in lengths
        ]

    old = draw(0.5)
    new = [row + 0.4 * (other + 2) for row, other in zip(old, draw(1.0), strict=True)]
    reference = draw(0.5)
    advantages = [1.5, -0.5, -1.0, 2.0, -1.2, -0.8]
    counts = [1.0] * 6 if case != "masked" else [1.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    leaf = torch.cat(new).requires_grad_()
    by_hand(spec, list(leaf.split(lengths)), old, reference, advantages, counts).backward()
    expected, leaf.grad = leaf.grad, None
    loss = by_hand(spec, new, old, reference, advantages, counts)

    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    scored = Scored(padded(old), padded(reference), torch.zeros(6, 5), mask)
    groups = Groups(
        rollouts(),
        torch.tensor(advantages, dtype=torch.float64),
        torch.tensor(counts, dtype=torch.float64),
        scored,
        longest=LONGEST,
        kl_coef=spec.kl_coef or 0.0,
    )
    tokens = sum(n * c for n, c in zip(lengths, counts, strict=True))
    whole = Minibatch([[0, 1]], tokens, sum(counts))
    roles: Any = SimpleNamespace(policy=lambda batch: SimpleNamespace(logprobs=leaf))
    stepper: Any = SimpleNamespace(scale=SimpleNamespace(value=1.0))
    sums = GroupUpdater(roles, spec, stepper).backward(groups, whole, [0, 1])
    assert expected is not None
    assert leaf.grad is not None
    assert torch.allclose(leaf.grad, expected, rtol=0, atol=1e-8)
    assert float(sums[0]) == pytest.approx(float(loss), abs=1e-8)
    assert float(sums[4]) == sum(lengths)
    assert float(expected.abs().max()) > 1e-4
