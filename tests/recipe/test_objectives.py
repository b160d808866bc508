"""Objectives in a recipe: each kind has its own fields, a reference where it needs one."""

from __future__ import annotations

import inspect
import typing
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from alignkit.errors import RecipeError
from alignkit.objectives.bradley_terry import bradley_terry_loss
from alignkit.objectives.kto import kto_loss
from alignkit.objectives.preference import PREFERENCE_OBJECTIVES
from alignkit.recipe import objectives
from alignkit.recipe.reading.load import LoadedRecipe, load_recipe
from alignkit.recipe.reading.problems import sections_of
from alignkit.recipe.reading.stored import render_recipe
from alignkit.recipe.stages.base import ReferenceSpec
from alignkit.recipe.stages.dpo import DpoRecipe
from alignkit.recipe.stages.registry import stages
from alignkit.recipe.training import LoopSpec

FAMILY = {
    typing.get_args(spec.model_fields["kind"].annotation)[0]: spec
    for spec in sections_of(objectives.PreferenceSpec)
    if spec is not objectives.CustomPairSpec
}
KINDS = (
    "'dpo', 'ipo', 'cdpo', 'robust', 'hinge', 'simpo', 'orpo', 'cpo', 'apo_zero', 'apo_down', "
    "'sppo', 'nca' or 'custom'"
)
BETA_HINT = (
    "\nhint: 0.1 is the value of the DPO paper; smaller lets the policy move further from the "
    "reference"
)
TAU_HINT = "\nhint: the target margin is 1 / (2 tau) nats; 0.01 to 1 is usual"
NO_USE = "\nhint: remove the key, or choose an objective with a reference, such as dpo"


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")


def load(stage: str, *lines: str, overrides: tuple[str, ...] = ()) -> LoadedRecipe:
    """A recipe whose own lines begin with line 5."""
    head = (f"stage: {stage}", "output: runs/x", "model: {base: some/model}")
    data = "data: {train: [{path: rows.jsonl}]}"
    more = ["reward: {rule: json}"] if stage in ("ppo", "grpo") else []
    Path("r.yaml").write_text("\n".join([*head, data, *lines, *more]) + "\n", encoding="utf-8")
    return load_recipe("r.yaml", list(overrides))


def failure(stage: str, *lines: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(stage, *lines)
    return str(caught.value)


# schema and losses ---------------------------------------------------------------------------


def keyword_arguments(function: Any) -> dict[str, inspect.Parameter]:
    found = inspect.signature(function).parameters
    return {name: p for name, p in found.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def test_the_schema_knows_every_objective_and_no_other() -> None:
    assert list(FAMILY) == list(PREFERENCE_OBJECTIVES)


@pytest.mark.parametrize("kind", PREFERENCE_OBJECTIVES)
def test_the_fields_of_a_kind_are_the_arguments_of_its_loss(kind: str) -> None:
    fields = {name: f for name, f in FAMILY[kind].model_fields.items() if name != "kind"}
    arguments = keyword_arguments(PREFERENCE_OBJECTIVES[kind].loss)
    assert set(fields) == set(arguments)
    for name, parameter in arguments.items():
        if parameter.default is not inspect.Parameter.empty:
            assert fields[name].default == parameter.default


@pytest.mark.parametrize(
    ("spec", "loss"),
    [(objectives.BradleyTerrySpec, bradley_terry_loss), (objectives.KtoSpec, kto_loss)],
)
def test_the_fields_of_other_stages_are_the_arguments_of_their_loss(
    spec: type[BaseModel], loss: Any
) -> None:
    assert set(spec.model_fields) - {"kind"} == set(keyword_arguments(loss))


def test_every_stage_has_its_objective_when_none_is_named() -> None:
    defaults = {"sft": "cross_entropy", "reward": "bradley_terry"}
    for stage in stages():
        kind = defaults.get(stage, stage)
        assert load(stage).recipe.objective.kind == kind
        named = load(stage, f"objective: {{kind: {kind}}}").recipe
        assert named.objective == load(stage).recipe.objective
        assert load(stage, "objective: {}").recipe == named


@pytest.mark.parametrize(
    ("stage", "line", "fields"),
    [
        ("dpo", "{beta: 0.3}", {"kind": "dpo", "beta": 0.3}),
        ("dpo", "{kind: ipo}", {"kind": "ipo", "tau": 0.1, "per_token": False}),
        ("dpo", "{kind: cdpo}", {"kind": "cdpo", "beta": 0.1, "label_smoothing": 0.1}),
        ("dpo", "{kind: robust}", {"kind": "robust", "beta": 0.1, "label_smoothing": 0.1}),
        ("dpo", "{kind: hinge}", {"kind": "hinge", "beta": 0.1}),
        ("dpo", "{kind: simpo}", {"kind": "simpo", "beta": 2.0, "gamma": 1.0}),
        ("dpo", "{kind: orpo}", {"kind": "orpo", "beta": 0.1}),
        ("dpo", "{kind: cpo}", {"kind": "cpo", "beta": 0.1, "nll_weight": 1.0}),
        ("dpo", "{kind: apo_zero}", {"kind": "apo_zero", "beta": 0.1}),
        ("dpo", "{kind: apo_down}", {"kind": "apo_down", "beta": 0.1}),
        ("dpo", "{kind: sppo}", {"kind": "sppo", "beta": 0.001}),
        ("dpo", "{kind: nca}", {"kind": "nca", "beta": 0.1}),
        ("reward", "{center: 0}", {"kind": "bradley_terry", "center": 0.0}),
        (
            "kto",
            "{desirable_weight: 1.2}",
            {"kind": "kto", "beta": 0.1, "desirable_weight": 1.2, "undesirable_weight": 1.0},
        ),
    ],
)
def test_an_objective_with_its_defaults(stage: str, line: str, fields: dict[str, Any]) -> None:
    assert load(stage, f"objective: {line}").recipe.objective.model_dump() == fields


def test_an_override_names_a_field_or_a_kind() -> None:
    changed = load("dpo", overrides=("objective.kind=simpo", "objective.gamma=0.5")).recipe
    assert changed.objective == objectives.SimpoSpec(kind="simpo", beta=2.0, gamma=0.5)
    assert load("dpo", overrides=("objective.beta=0.5",)).recipe.objective == objectives.DpoSpec(
        kind="dpo", beta=0.5
    )


# what is refused -----------------------------------------------------------------------------


def other_kind(key: str, keys: str) -> str:
    return (
        f"r.yaml:7: objective.{key} is not a key of a recipe\n"
        f"hint: it belongs to another kind; keys here: {keys}"
    )


@pytest.mark.parametrize(
    ("kind", "key", "message"),
    [
        ("ipo", "beta", other_kind("beta", "kind, tau, per_token")),
        ("ipo", "gamma", other_kind("gamma", "kind, tau, per_token")),
        ("dpo", "tau", other_kind("tau", "kind, beta")),
        ("dpo", "label_smoothing", other_kind("label_smoothing", "kind, beta")),
        ("dpo", "per_token", other_kind("per_token", "kind, beta")),
        ("hinge", "nll_weight", other_kind("nll_weight", "kind, beta")),
        ("orpo", "gamma", other_kind("gamma", "kind, beta")),
        ("simpo", "label_smoothing", other_kind("label_smoothing", "kind, beta, gamma")),
        ("cpo", "gamma", other_kind("gamma", "kind, beta, nll_weight")),
        ("robust", "tau", other_kind("tau", "kind, beta, label_smoothing")),
        ("sppo", "nll_weight", other_kind("nll_weight", "kind, beta")),
        (
            "dpo",
            "betta",
            "r.yaml:7: objective.betta is not a key of a recipe\n"
            "hint: did you mean objective.beta?",
        ),
        (
            "dpo",
            "zzz",
            "r.yaml:7: objective.zzz is not a key of a recipe\nhint: keys here: kind, beta",
        ),
    ],
)
def test_a_field_of_another_kind(kind: str, key: str, message: str) -> None:
    assert failure("dpo", "objective:", f"  kind: {kind}", f"  {key}: 0.1") == message


@pytest.mark.parametrize("kind", PREFERENCE_OBJECTIVES)
def test_no_kind_takes_a_field_that_is_not_its_own(kind: str) -> None:
    every = {name for spec in FAMILY.values() for name in spec.model_fields}
    foreign = sorted(every - set(FAMILY[kind].model_fields))
    text = failure("dpo", f"objective: {{kind: {kind}, {', '.join(f'{n}: 0.1' for n in foreign)}}}")
    lines = [line for line in text.splitlines() if line.startswith("r.yaml")]
    assert lines == [f"r.yaml:5: objective.{name} is not a key of a recipe" for name in foreign]


@pytest.mark.parametrize(
    ("stage", "line", "message"),
    [
        (
            "dpo",
            "{kind: simp}",
            f"objective.kind must be {KINDS}, got 'simp'\nhint: did you mean simpo?",
        ),
        (
            "dpo",
            "{kind: apo-zero}",
            f"objective.kind must be {KINDS}, got 'apo-zero'\nhint: did you mean apo_zero?",
        ),
        ("dpo", "{kind: xyzzy}", f"objective.kind must be {KINDS}, got 'xyzzy'"),
        ("dpo", "{kind: 3}", f"objective.kind must be {KINDS}, got 3"),
        ("dpo", "{kind: kto}", f"objective.kind must be {KINDS}, got 'kto'"),
        ("dpo", "dpo", "objective must be a mapping, got 'dpo'"),
        ("sft", "{kind: dpo}", "objective.kind must be 'cross_entropy' or 'custom', got 'dpo'"),
        ("reward", "{kind: dpo}", "objective.kind must be 'bradley_terry' or 'custom', got 'dpo'"),
        ("kto", "{kind: dpo}", "objective.kind must be 'kto', got 'dpo'"),
        (
            "reward",
            "{beta: 0.1}",
            "objective.beta is not a key of a recipe\nhint: keys here: kind, center",
        ),
        (
            "kto",
            "{tau: 0.1}",
            "objective.tau is not a key of a recipe\n"
            "hint: keys here: kind, beta, desirable_weight, undesirable_weight",
        ),
        ("dpo", "{beta: 0}", f"objective.beta must be greater than 0, got 0{BETA_HINT}"),
        ("dpo", "{beta: -1}", f"objective.beta must be greater than 0, got -1{BETA_HINT}"),
        ("dpo", "{beta: .nan}", f"objective.beta must be a finite number, got nan{BETA_HINT}"),
        ("dpo", "{beta: high}", f"objective.beta must be a number, got 'high'{BETA_HINT}"),
        ("dpo", "{beta: true}", f"objective.beta must be a number, got true{BETA_HINT}"),
        ("kto", "{beta: 0}", f"objective.beta must be greater than 0, got 0{BETA_HINT}"),
        ("dpo", "{kind: ipo, tau: 0}", f"objective.tau must be greater than 0, got 0{TAU_HINT}"),
        ("dpo", "{kind: simpo, gamma: -1}", "objective.gamma must be at least 0, got -1"),
        ("dpo", "{kind: cpo, nll_weight: -1}", "objective.nll_weight must be at least 0, got -1"),
        (
            "dpo",
            "{kind: cdpo, label_smoothing: 0.5}",
            "objective.label_smoothing must be less than 0.5, got 0.5\n"
            "hint: the share of wrong labels; 0.1 is usual",
        ),
        (
            "dpo",
            "{kind: ipo, per_token: 1}",
            "objective.per_token must be true or false, got 1",
        ),
        ("reward", "{center: -1}", "objective.center must be at least 0, got -1"),
        (
            "kto",
            "{undesirable_weight: 0}",
            "objective.undesirable_weight must be greater than 0, got 0",
        ),
    ],
)
def test_an_objective_that_is_refused(stage: str, line: str, message: str) -> None:
    assert failure(stage, f"objective: {line}") == f"r.yaml:5: {message}"


# reference -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["{kind: cached}", "{kind: auto}", "{}"])
@pytest.mark.parametrize("kind", ["simpo", "orpo", "cpo"])
def test_a_reference_that_is_not_used(kind: str, reference: str) -> None:
    shown = "{}" if reference == "{}" else "{kind}"
    found = failure("dpo", "seed: 1", f"objective: {{kind: {kind}}}", f"reference: {reference}")
    assert found == (
        f"r.yaml:7: reference is not used: `{kind}` has no reference model, got {shown}{NO_USE}"
    )


def test_the_order_of_the_keys_does_not_matter() -> None:
    found = failure("dpo", "reference: {kind: cached}", "objective: {kind: orpo}")
    assert found.startswith("r.yaml:5: reference is not used: `orpo` has no reference model")


@pytest.mark.parametrize("kind", PREFERENCE_OBJECTIVES)
def test_every_other_kind_has_a_reference(kind: str) -> None:
    recipe = load("dpo", f"objective: {{kind: {kind}}}").recipe
    assert isinstance(recipe, DpoRecipe)
    assert recipe.needs_reference is (kind not in ("simpo", "orpo", "cpo"))
    assert recipe.reference == (ReferenceSpec(kind="auto") if recipe.needs_reference else None)


@pytest.mark.parametrize("stage", ["dpo", "kto"])
@pytest.mark.parametrize("kind", ["auto", "adapter_off", "frozen_copy", "cached"])
def test_a_reference_is_named(stage: str, kind: str) -> None:
    recipe = load(stage, f"reference: {{kind: {kind}}}").recipe
    assert recipe.reference == ReferenceSpec(kind=kind)  # type: ignore[arg-type,union-attr]


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_other_stages_have_no_reference(stage: str) -> None:
    assert not load(stage).recipe.needs_reference
    assert failure(stage, "reference: {kind: cached}") == (
        "r.yaml:5: reference is not a key of a recipe\n"
        "hint: keys here: stage, output, seed, model, adapter, data, objective, training, merge"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "{kind: cashed}",
            "reference.kind must be 'auto', 'adapter_off', 'frozen_copy' or 'cached', got "
            "'cashed'\nhint: did you mean cached?",
        ),
        (
            "{model: x}",
            "reference.model is not a key of a recipe\nhint: did you mean model?",
        ),
    ],
)
def test_a_reference_that_is_refused(line: str, message: str) -> None:
    assert failure("dpo", f"reference: {line}") == f"r.yaml:5: {message}"


# stages --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "rates"),
    [
        (
            "sft",
            {"lora": 2.0e-4, "ia3": 3.0e-3, "prefix": 3.0e-2, "projection": 5.0e-4, "full": 2.0e-5},
        ),
        ("reward", {"lora": 1.0e-4, "ia3": 3.0e-3, "full": 1.0e-5}),
        (
            "dpo",
            {"lora": 2.0e-5, "ia3": 5.0e-4, "prefix": 3.0e-3, "projection": 1.0e-4, "full": 5.0e-7},
        ),
        (
            "kto",
            {"lora": 2.0e-5, "ia3": 5.0e-4, "prefix": 3.0e-3, "projection": 1.0e-4, "full": 1.0e-6},
        ),
    ],
)
def test_default_learning_rates(stage: str, rates: dict[str, float]) -> None:
    assert load(stage).recipe.training.learning_rate == rates["lora"]
    for kind, rate in rates.items():
        text = "kind: prefix, projection: true" if kind == "projection" else f"kind: {kind}"
        assert load(stage, f"adapter: {{{text}}}").recipe.training.learning_rate == rate
    table = stages()[stage].rates
    assert {kind: rate.default for kind, rate in table.items()} == rates
    for rate in table.values():
        assert rate.low < rate.default < rate.high
    given = load(stage, "training: {learning_rate: 3e-4}").recipe
    assert given.training.learning_rate == 3e-4


def test_what_explain_says_of_learning_rates_is_true() -> None:
    text = LoopSpec.model_fields["learning_rate"].description or ""
    for stage, recipe in stages().items():
        for rate in recipe.rates.values():
            shown = f"{rate.default:.0e}".replace("e-0", "e-")
            assert shown in text, (stage, shown)


FIELDS = ("stage", "output", "seed", "model", "adapter", "data", "objective", "training", "merge")


@pytest.mark.parametrize("stage", stages())
def test_fields_of_every_stage_in_their_order(stage: str) -> None:
    more: tuple[str, ...] = ("reference",) if stage in ("dpo", "kto") else ()
    if stage in ("ppo", "grpo"):
        value = ("value",) if stage == "ppo" else ()
        more = ("reward", "task", "rollout", *value, "guard")
    assert tuple(stages()[stage].model_fields) == (*FIELDS, *more)


@pytest.mark.parametrize("stage", stages())
def test_the_rendered_recipe_of_every_stage_loads_to_itself(stage: str) -> None:
    recipe = load(stage).recipe
    Path("again.yaml").write_text(render_recipe(recipe), encoding="utf-8")
    assert load_recipe("again.yaml", stage=stage).recipe == recipe


@pytest.mark.parametrize("kind", PREFERENCE_OBJECTIVES)
def test_the_rendered_recipe_of_every_objective_loads_to_itself(kind: str) -> None:
    recipe = load("dpo", f"objective: {{kind: {kind}}}").recipe
    Path("again.yaml").write_text(render_recipe(recipe), encoding="utf-8")
    assert load_recipe("again.yaml").recipe == recipe


@pytest.mark.parametrize("stage", ["reward", "dpo", "kto"])
def test_only_sft_says_what_is_trained_on(stage: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(stage, overrides=("data.train_on=everything",))
    assert str(caught.value) == (
        "command line: data.train_on is not a key of a recipe\nhint: did you mean data.train?"
    )


@pytest.mark.parametrize(
    ("stage", "command", "hint"),
    [
        ("dpo", "sft", "alignkit dpo"),
        ("kto", "dpo", "alignkit kto"),
        ("sft", "kto", "alignkit sft"),
    ],
)
def test_a_recipe_of_another_stage(stage: str, command: str, hint: str) -> None:
    load(stage)
    with pytest.raises(RecipeError) as caught:
        load_recipe("r.yaml", stage=command)
    assert str(caught.value) == (
        f"r.yaml:1: stage is {stage}, not {command}\nhint: run `{hint} r.yaml`"
    )


@pytest.mark.parametrize(
    ("stage", "line", "messages"),
    [
        # A misspelt stage: the rest is checked as the stage that was meant.
        ("dop", "objective: {kind: ipo, tau: 1}", []),
        (
            "rewrad",
            "objective: {center: -1}",
            ["r.yaml:5: objective.center must be at least 0, got -1"],
        ),
        ("ktoo", "objective: {beta: 1}", []),
    ],
)
def test_a_misspelt_stage(stage: str, line: str, messages: list[str]) -> None:
    meant = {"dop": "dpo", "rewrad": "reward", "ktoo": "kto"}[stage]
    assert failure(stage, line).splitlines() == [
        f"r.yaml:1: stage must be 'sft', 'reward', 'dpo', 'kto', 'ppo' or 'grpo', got '{stage}'",
        f"hint: did you mean {meant}?",
        *messages,
    ]
