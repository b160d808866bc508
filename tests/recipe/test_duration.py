"""How long a plan says a run takes: operations by hand, over the speed that was measured."""

from __future__ import annotations

import dataclasses
import json

import pytest

from alignkit.recipe.facts import DataFacts, HardwareFacts, ModelFacts
from alignkit.recipe.planning.duration import estimate_seconds
from alignkit.recipe.stages.base import Recipe
from alignkit.recipe.stages.registry import stages

# A decoder of 2 x (2 x 8 x (8 + 4) + 3 x 8 x 16) = 1,152 weights and a head of 100 x 8 = 800.
MODEL = ModelFacts("Tiny", 2000, 10, 2, 8, 16, 8, 4, 100, 512)
DATA = DataFacts(
    rows=10,
    tokens=1000,
    trained_tokens=100,
    longest=200,
    step=1000,
    eval_rows=0,
    eval_tokens=0,
    overlap=0,
)
HARDWARE = HardwareFacts("cpu", "processor", 10**9, 2, 1, speed=1000.0)


def recipe(stage: str, **fields: object) -> Recipe:
    values = {
        "stage": stage,
        "output": "x",
        "model": {"base": "m", "dtype": "float32"},
        "data": {"train": [{"path": "rows.jsonl"}]},
        "training": {"batch_size": 10},
        **fields,
    }
    return stages()[stage].model_validate_json(json.dumps(values)).with_defaults()


def seconds(spec: Recipe, data: DataFacts = DATA, **more: object) -> float | None:
    given = {"steps": 1, "checkpointing": False, "reference": None, **more}
    return estimate_seconds(spec, MODEL, data, HARDWARE, **given)  # type: ignore[arg-type]


def test_one_pass_of_an_adapter() -> None:
    # Forward and to the inputs, 2 operations a weight each; six tenths of the speed are reached.
    expected = (1000 * 1152 * 4 + 100 * 800 * 4) / 600
    assert seconds(recipe("sft")) == pytest.approx(expected)
    assert seconds(recipe("sft"), steps=3) == pytest.approx(3 * expected)


def test_all_weights_and_recomputation_cost_more() -> None:
    full = recipe("sft", adapter={"kind": "full"})
    assert seconds(full) == pytest.approx((1000 * 1152 * 6 + 100 * 800 * 6) / 600)
    again = seconds(recipe("sft"), checkpointing=True)
    assert again == pytest.approx((1000 * 1152 * 6 + 100 * 800 * 4) / 600)


def test_a_reference_reads_the_rows_too() -> None:
    alone = seconds(recipe("dpo"), steps=3)
    read = (1000 * 1152 * 2 + 100 * 800 * 2) / 600
    assert alone is not None
    assert seconds(recipe("dpo"), steps=3, reference="adapter_off") == pytest.approx(
        alone + 3 * read
    )
    assert seconds(recipe("dpo"), steps=3, reference="cached") == pytest.approx(alone + read)


def test_evaluations_before_after_and_between() -> None:
    data = dataclasses.replace(DATA, eval_rows=5, eval_tokens=500)
    alone, once = seconds(recipe("sft"), steps=4), 500 * 1152 * 2 / 600
    assert alone is not None
    assert seconds(recipe("sft"), data, steps=4) == pytest.approx(alone + 2 * once)
    often = recipe("sft", training={"batch_size": 10, "eval_every": 2})
    assert seconds(often, data, steps=4) == pytest.approx(alone + 3 * once)


def test_nothing_is_said_where_nothing_is_known() -> None:
    unknown = dataclasses.replace(HARDWARE, speed=0.0)
    assert estimate_seconds(recipe("sft"), MODEL, DATA, unknown, 1, False, None) is None
    experts = dataclasses.replace(MODEL, experts=5)
    assert estimate_seconds(recipe("sft"), experts, DATA, HARDWARE, 1, False, None) is None
    assert seconds(ppo()) is None


def ppo(reward: object = None, **objective: object) -> Recipe:
    return recipe(
        "ppo",
        reward=reward or {"rule": "json"},
        rollout={"prompts_per_step": 10, "max_new_tokens": 10},
        objective=objective,
        training={},
    )


def test_responses_are_sampled_scored_and_learned_from() -> None:
    sampling = dataclasses.replace(HARDWARE, sampling_speed=100.0)
    data = dataclasses.replace(DATA, eval_rows=5, eval_tokens=50)

    def seconds(spec: Recipe, data: DataFacts = DATA) -> float:
        found = estimate_seconds(spec, MODEL, data, sampling, 1, False, None)
        assert found is not None
        return found

    # 900 tokens of prompts, 100 of responses. The reference reads them once; policy and value
    # model each forward and to the inputs in four passes.
    once = 1000 * 1152 + 100 * 800
    sampled = (900 * 1152 * 2) / 600 + 100 * (1152 + 800) * 2 / 60
    assert seconds(ppo()) == pytest.approx(sampled + (2 + 4 * 2 * 4) * once / 600)
    one = ppo({"model": "runs/reward"}, epochs=1)
    assert seconds(one) == pytest.approx(sampled + (4 + 2 * 4) * once / 600)
    # Held-out prompts are answered and scored before and after.
    held_out = 2 * ((50 + 50) * 1152 * 2 / 600 + 50 * (1152 + 800) * 2 / 60)
    assert seconds(ppo(), data) == pytest.approx(seconds(ppo()) + held_out)
