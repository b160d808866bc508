"""What the planner decides about a preference run, in closed form, and what it warns of."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from alignkit.errors import AlignkitError
from alignkit.recipe.facts import DataFacts, HardwareFacts, ModelFacts
from alignkit.recipe.planning.memory import estimate_memory, fits
from alignkit.recipe.planning.plan import Plan, make_plan
from alignkit.recipe.stages.base import Recipe
from alignkit.recipe.stages.registry import stages

MODEL = ModelFacts(
    architecture="LlamaForCausalLM",
    parameters=100_000_000,
    trainable=2_000_000,
    layers=12,
    hidden=512,
    intermediate=1536,
    attention_width=512,
    key_value_width=256,
    vocabulary=32_000,
    context=4096,
)
DATA = DataFacts(
    rows=320,
    tokens=64_000,
    trained_tokens=20_000,
    longest=400,
    step=4000,
    eval_rows=32,
    eval_tokens=6_400,
    overlap=0,
    chosen=160,
    rejected=160,
)
HARDWARE = HardwareFacts("cuda", "card", 80 * 10**9, 8, 1)


def recipe(stage: str, **fields: Any) -> Recipe:
    values = {
        "stage": stage,
        "output": "runs/x",
        "model": {"base": "some/model"},
        "data": {"train": [{"path": "rows.jsonl"}]},
        **({"reward": {"rule": "json"}} if stage in ("ppo", "grpo") else {}),
        **fields,
    }
    made = stages()[stage].model_validate_json(json.dumps(values)).with_defaults()
    if made.model.dtype == "auto":  # chosen before a plan is made
        return made.model_copy(update={"model": made.model.computing_in("bfloat16", "a test")})
    return made


def plan(stage: str, data: DataFacts = DATA, **fields: Any) -> Plan:
    return make_plan(recipe(stage, **fields), MODEL, data, HARDWARE)


# reference -----------------------------------------------------------------------------------

ADAPTER_OFF = "each row is read about once: caching would save nothing"
ONCE = "each row is read {} times and scored once"
WIDE = {"base": "m", "dtype": "float32"}
FULL = "all weights are trained: no second model is kept in memory"


@pytest.mark.parametrize("stage", ["dpo", "kto"])
@pytest.mark.parametrize(
    ("fields", "reference", "reason"),
    [
        ({"model": WIDE}, "adapter_off", ADAPTER_OFF),
        ({"model": WIDE, "training": {"epochs": 0.5}}, "adapter_off", ADAPTER_OFF),
        ({"model": WIDE, "training": {"epochs": 1.5}}, "adapter_off", ADAPTER_OFF),
        ({"model": WIDE, "training": {"epochs": 1.6}}, "cached", ONCE.format(1.6)),
        ({"model": WIDE, "training": {"epochs": 3}}, "cached", ONCE.format(3.0)),
        # In narrow precisions only the same pass rounds alike.
        ({}, "adapter_off", "it rounds to bfloat16 like the policy"),
        (
            {"model": {"base": "m", "dtype": "float16"}, "training": {"epochs": 3}},
            "adapter_off",
            "it rounds to float16 like the policy",
        ),
        # 320 rows in steps of 16 are 20 steps an epoch; max_steps overrides epochs.
        (
            {"model": WIDE, "training": {"epochs": 3, "max_steps": 20}},
            "adapter_off",
            ADAPTER_OFF,
        ),
        (
            {"model": WIDE, "training": {"max_steps": 40}},
            "cached",
            "each row is read 2.0 times and scored once",
        ),
        ({"adapter": {"kind": "full"}}, "cached", FULL),
        ({"adapter": {"kind": "full"}, "training": {"epochs": 3}}, "cached", FULL),
        ({"reference": {"kind": "cached"}}, "cached", "as the recipe says"),
        ({"reference": {"kind": "frozen_copy"}}, "frozen_copy", "as the recipe says"),
        (
            {"reference": {"kind": "adapter_off"}, "training": {"epochs": 3}},
            "adapter_off",
            "as the recipe says",
        ),
        (
            {"reference": {"kind": "frozen_copy"}, "adapter": {"kind": "full"}},
            "frozen_copy",
            "as the recipe says",
        ),
    ],
)
def test_the_reference_and_why(
    stage: str, fields: dict[str, Any], reference: str, reason: str
) -> None:
    found = plan(stage, **fields)
    assert (found.reference, found.reference_reason) == (reference, reason)
    assert found.to_json()["reference"] == reference


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_there_is_no_adapter_to_turn_off(stage: str) -> None:
    with pytest.raises(AlignkitError) as caught:
        plan(stage, adapter={"kind": "full"}, reference={"kind": "adapter_off"})
    assert str(caught.value) == (
        "reference.kind = adapter_off, but there is no adapter: all weights are trained\n"
        "hint: set reference.kind to cached or frozen_copy"
    )


@pytest.mark.parametrize(
    ("stage", "fields"),
    [
        ("sft", {}),
        ("reward", {}),
        ("dpo", {"objective": {"kind": "simpo"}}),
        ("dpo", {"objective": {"kind": "orpo"}, "training": {"epochs": 3}}),
        ("dpo", {"objective": {"kind": "cpo"}, "adapter": {"kind": "full"}}),
    ],
)
def test_no_reference_where_none_is_needed(stage: str, fields: dict[str, Any]) -> None:
    found = plan(stage, **fields)
    assert (found.reference, found.reference_reason) == (None, "")
    assert found.memory.reference == 0


# memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 2), ("float16", 2), ("float32", 4)])
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_frozen_copy_is_a_second_set_of_weights(adapter: str, dtype: str, width: int) -> None:
    spec = recipe("dpo", adapter={"kind": adapter}, model={"base": "m", "dtype": dtype})
    without, cached, copy = (
        estimate_memory(spec, MODEL, HARDWARE, 4096, False, reference)
        for reference in (None, "cached", "frozen_copy")
    )
    width = 4 if adapter == "full" else width  # stored as the policy's own weights are
    assert cached == without
    assert copy.reference == MODEL.parameters * width
    assert copy.peak == without.peak + MODEL.parameters * width
    assert dataclasses.replace(copy, reference=0, peak=without.peak) == without


def test_what_quantized_weights_take() -> None:
    # Per layer: q and o 512 × 512 each, k and v 256 × 512 each, three of 1536 × 512.
    narrow = 12 * (2 * 512 * 512 + 2 * 256 * 512 + 3 * 1536 * 512)
    weights = {
        kind: plan("sft", model={"base": "m", "quantization": kind}).memory.weights
        for kind in ("none", "nf4", "int8")
    }
    # 2 bytes each; a byte and a float32 scale a row; half a byte, and for 64 weights a scale.
    # 1 %: rows of two lengths share one number here, and blocks have scales of their scales.
    assert weights["none"] - weights["int8"] == pytest.approx(narrow * (2 - 1.008), rel=0.01)
    assert weights["none"] - weights["nf4"] == pytest.approx(narrow * (2 - 0.516), rel=0.01)


def test_what_stacks_of_experts_take() -> None:
    def found(changed: int, **fields: Any) -> Any:
        model = dataclasses.replace(MODEL, experts=60_000_000, changed_experts=changed)
        return make_plan(recipe("sft", **fields), model, DATA, HARDWARE).memory

    # Linear layers alone are quantized, q and o 512 × 512 each, k and v 256 × 512 each.
    narrow = 12 * (2 * 512 * 512 + 2 * 256 * 512)
    weights = [found(0, model={"base": "m", "quantization": q}).weights for q in ("none", "nf4")]
    assert weights[0] - weights[1] == pytest.approx(narrow * (2 - 0.516), rel=0.01)
    # A changed copy of each of twelve layers' in 2 bytes, and the gradient of one.
    none, all_of_them = (found(n, model={"base": "m"}).activations for n in (0, 60_000_000))
    assert all_of_them - none == 13 * 5_000_000 * 2
    # Their files name weights otherwise, so a merge holds the base and what it wrote.
    held = found(0, model={"base": "m"}).merging - plan("sft", model={"base": "m"}).memory.merging
    assert held == 2 * MODEL.parameters * 2


def test_what_the_optimizer_keeps() -> None:
    def state(kind: str, stage: str = "sft") -> int:
        return plan(stage, training={"optimizer": kind}).memory.training_state

    # A gradient and two moments: in float32, or in a byte each with a float32 scale for 256.
    assert state("adamw") == MODEL.trainable * (4 + 2 * 4)
    assert state("adamw_8bit") == MODEL.trainable * (4 + 2 * (1 + 4 / 256))
    assert state("paged_adamw_8bit") == state("adamw_8bit")
    # One moment; a row and a column of a matrix, the longer of which is a rank-th of it.
    assert state("lion") == MODEL.trainable * (4 + 4)
    assert state("lion_8bit") == MODEL.trainable * (4 + 1 + 4 / 256)
    assert state("adafactor") == MODEL.trainable * (4 + 4 / 16)
    # The value adapter's weights are counted with its state.
    assert state("adamw", "ppo") == 2 * state("adamw") + 4 * MODEL.trainable
    assert state("adamw_8bit", "ppo") == 2 * state("adamw_8bit") + 4 * MODEL.trainable


def test_the_plan_counts_the_copy() -> None:
    peaks = {
        kind: plan("dpo", reference={"kind": kind}).memory.peak
        for kind in ("adapter_off", "cached", "frozen_copy")
    }
    assert peaks["adapter_off"] == peaks["cached"]
    assert peaks["frozen_copy"] == peaks["cached"] + 2 * MODEL.parameters


# warnings ------------------------------------------------------------------------------------


def warnings(stage: str, data: DataFacts = DATA, **fields: Any) -> tuple[str, ...]:
    return plan(stage, data, **fields).warnings


def counts(chosen: int, rejected: int) -> DataFacts:
    return dataclasses.replace(DATA, rows=chosen + rejected, chosen=chosen, rejected=rejected)


@pytest.mark.parametrize("stage", stages())
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_defaults_are_usual(stage: str, adapter: str) -> None:
    assert warnings(stage, adapter={"kind": adapter}) == ()


@pytest.mark.parametrize(
    ("chosen", "rejected", "weights"),
    [
        (160, 160, {}),  # 1
        (200, 150, {}),  # 4/3
        (170, 150, {}),
        (159, 160, {}),  # near enough
        (100, 200, {"undesirable_weight": 0.4}),  # 1.25
        (120, 200, {"desirable_weight": 2.0}),  # 1.2
        (200, 100, {"undesirable_weight": 1.75}),  # 1.14
        (100, 300, {"desirable_weight": 2.0, "undesirable_weight": 0.5}),  # 4/3
    ],
)
def test_balanced_labels(chosen: int, rejected: int, weights: dict[str, float]) -> None:
    assert warnings("kto", counts(chosen, rejected), objective={"kind": "kto", **weights}) == ()


@pytest.mark.parametrize(
    ("chosen", "rejected", "weights", "ratio", "low", "high"),
    [
        (100, 200, {}, "0.50", "2", "2.67"),
        (200, 100, {}, "2.00", "0.5", "0.667"),
        (150, 160, {}, "0.94", "1.07", "1.42"),
        (320, 7, {}, "45.71", "0.0219", "0.0292"),
        (100, 200, {"undesirable_weight": 0.3}, "1.67", "0.6", "0.8"),
        (160, 160, {"desirable_weight": 1.5}, "1.50", "1", "1.33"),
    ],
)
def test_unbalanced_labels(
    chosen: int, rejected: int, weights: dict[str, float], ratio: str, low: str, high: str
) -> None:
    data, objective = counts(chosen, rejected), {"kind": "kto", **weights}
    assert warnings("kto", data, objective=objective) == (
        f"desirable_weight × {chosen} desirable rows is {ratio} times undesirable_weight × "
        f"{rejected} undesirable rows; the paper keeps this between 1 and 4/3: "
        f"set objective.desirable_weight between {low} and {high}",
    )
    for advised in (low, high):
        changed = {**objective, "desirable_weight": float(advised)}
        assert warnings("kto", data, objective=changed) == ()


@pytest.mark.parametrize(
    ("chosen", "rejected", "side"), [(320, 0, "desirable"), (0, 320, "undesirable")]
)
def test_one_label_only(chosen: int, rejected: int, side: str) -> None:
    assert warnings("kto", counts(chosen, rejected)) == (
        f"all 320 rows are {side}: there is nothing to tell apart",
    )
    assert warnings("dpo", counts(chosen, rejected)) == ()  # a question of KTO alone


@pytest.mark.parametrize(
    ("stage", "adapter", "rate", "sentence"),
    [
        ("dpo", "lora", 2e-3, "0.002 is above the usual 1e-06 to 0.0005 for dpo with LoRA"),
        ("dpo", "full", 2e-5, "2e-05 is above the usual 5e-08 to 1e-05 for dpo with full weights"),
        ("kto", "lora", 1e-7, "1e-07 is below the usual 1e-06 to 0.0005 for kto with LoRA"),
        ("reward", "lora", 5e-6, "5e-06 is below the usual 1e-05 to 0.001 for reward with LoRA"),
        ("sft", "full", 2e-3, "0.002 is above the usual 5e-07 to 0.0001 for sft with full weights"),
    ],
)
def test_unusual_learning_rates(stage: str, adapter: str, rate: float, sentence: str) -> None:
    found = warnings(stage, adapter={"kind": adapter}, training={"learning_rate": rate})
    assert found == (f"training.learning_rate = {sentence}",)


def test_pairs_are_counted_as_rows() -> None:
    found = plan("dpo", training={"epochs": 2.5, "batch_size": 50})
    # 320 pairs in steps of 50 are 7 steps an epoch; two and a half of them are 17.5.
    assert (found.steps_per_epoch, found.steps, found.stage) == (7, 18, "dpo")
    assert found.tokens == round(64_000 * 18 / 7)
    assert found.trained_tokens == round(20_000 * 18 / 7)


def test_activations_of_a_prefix() -> None:
    # A layer keeps of a token norms 2·4·512, queries to output (2·512 + 2·256)·2, gate and up
    # 2·1536·2 and the output once more, 512·2; of each of 30 documents' 20 prefix tokens queries to
    # output. No inputs of products, 2·2·512 of a token: nothing that reads them is trained.
    model = dataclasses.replace(MODEL, prefix=20)
    spec = recipe("sft", adapter={"kind": "prefix"})
    layer = 4096 * (4096 + 3072 + 6144 + 1024) + 30 * 20 * 3072
    expected = round((12 * layer + 4096 * 512 * 6) * 1.1)
    assert estimate_memory(spec, model, HARDWARE, 4096, False, documents=30).activations == expected
    lora = estimate_memory(recipe("sft"), MODEL, HARDWARE, 4096, False, documents=30).activations
    assert lora > expected


def test_a_plan_fills_no_more_than_its_share_of_the_memory() -> None:
    wide = plan("sft")
    # Nine tenths of the memory would do, and a plan leaves 15% of it free.
    tight = dataclasses.replace(HARDWARE, memory=round(wide.memory.peak / 0.9))
    narrow = make_plan(recipe("sft"), MODEL, DATA, tight)
    assert narrow.memory.peak <= 0.85 * tight.memory < wide.memory.peak
    assert (narrow.microbatch_tokens, narrow.gradient_checkpointing) != (
        wide.microbatch_tokens,
        wide.gradient_checkpointing,
    )


@pytest.mark.parametrize(("warmup", "steps"), [(100, 4), (3, 3), (0.4, 2), (0, 0)])
def test_warm_up_ends_before_the_last_step(warmup: float, steps: int) -> None:
    made = plan("sft", training={"warmup": warmup, "max_steps": 5})
    assert made.warmup_steps == steps
    sentence = (
        f"training.warmup = {warmup} steps, but the run has 5: the learning rate reaches its peak "
        "only at the end"
    )
    assert (sentence in made.warnings) == (warmup == 100)


@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo"])
def test_what_fits_depends_on_the_precision(stage: str) -> None:
    narrow, wide = (
        recipe(stage, model={"base": "m", "dtype": dtype}) for dtype in ("bfloat16", "float32")
    )
    sizes = [dataclasses.replace(HARDWARE, memory=size * 10**8) for size in range(1, 400)]
    found = [(fits(narrow, MODEL, size), fits(wide, MODEL, size)) for size in sizes]
    # More memory never stops fitting; between the two bounds only bfloat16 fits.
    assert found == sorted(found)
    assert set(found) == {(False, False), (True, False), (True, True)}
