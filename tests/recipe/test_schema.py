"""The schema: what it accepts, what it refuses, and the defaults that depend on other keys."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from alignkit.recipe.adapters import FullSpec, LoraSpec
from alignkit.recipe.reading.problems import iter_keys, sections_of
from alignkit.recipe.rows import DataSpec, SourceSpec
from alignkit.recipe.stages.registry import stages
from alignkit.recipe.stages.sft import SftRecipe


def recipe(**changes: Any) -> SftRecipe:
    values = {
        "stage": "sft",
        "output": "runs/x",
        "model": {"base": "some/model"},
        "data": {"train": [{"path": "rows.jsonl"}]},
    }
    return SftRecipe.model_validate_json(json.dumps({**values, **changes}))


@pytest.mark.parametrize(
    ("adapter", "rate"), [({"kind": "lora"}, 2.0e-4), ({"kind": "full"}, 2.0e-5)]
)
def test_learning_rate_defaults_to_the_adapters_own(adapter: dict[str, str], rate: float) -> None:
    assert recipe().training.learning_rate is None
    assert recipe(adapter=adapter).with_defaults().training.learning_rate == rate


def test_a_given_learning_rate_stays() -> None:
    given = recipe(adapter={"kind": "full"}, training={"learning_rate": 3e-4, "epochs": 2})
    assert given.with_defaults() == given


def test_with_defaults_changes_nothing_else() -> None:
    before, after = recipe().as_dict(), recipe().with_defaults().as_dict()
    before["training"]["learning_rate"] = 2.0e-4
    assert after == before


def test_the_resolved_recipe_validates_to_itself() -> None:
    resolved = recipe(adapter={"kind": "lora", "targets": ["q_proj", "v_proj"]}).with_defaults()
    assert SftRecipe.model_validate_json(json.dumps(resolved.as_dict())) == resolved


def test_default_adapter_is_lora() -> None:
    assert recipe().adapter == LoraSpec(rank=16, alpha=32.0, dropout=0.0, targets="all-linear")
    assert recipe(adapter={"kind": "full"}).adapter == FullSpec(kind="full")


def test_recipes_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        recipe().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("places", [{}, {"path": "a.jsonl", "hub": "b/c"}])
def test_a_source_is_in_one_place(places: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="must have exactly one of `path` and `hub`"):
        SourceSpec(**places)


@pytest.mark.parametrize(
    ("places", "label"), [({"path": "a.jsonl"}, "a.jsonl"), ({"hub": "b/c"}, "hub:b/c")]
)
def test_a_source_is_called_by_its_place(places: dict[str, str], label: str) -> None:
    assert SourceSpec(**places).label == label


def test_eval_rows_come_from_one_place() -> None:
    rows = (SourceSpec(path="a.jsonl"),)
    with pytest.raises(ValidationError, match="only one of `eval` and `eval_fraction`"):
        DataSpec(train=rows, eval=rows, eval_fraction=0.1)


def test_full_weights_have_no_rank() -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        recipe(adapter={"kind": "full", "rank": 8})


def test_the_json_schema_documents_every_key_and_forbids_others() -> None:
    schema = SftRecipe.model_json_schema()
    sections = {"SftRecipe": schema, **schema["$defs"]}
    assert set(sections) >= {"ModelSpec", "LoraSpec", "FullSpec", "SourceSpec", "TrainingSpec"}
    for name, section in sections.items():
        assert section["additionalProperties"] is False, name
        for key, value in section["properties"].items():
            # A section that says the same as its key is only referred to.
            described = value.get("description") or "$ref" in value
            assert described, f"{name}.{key} has no docstring"
    json.dumps(schema)


def test_stages_are_named_as_their_recipes_name_them() -> None:
    for name, model in stages().items():
        assert model.model_fields["stage"].annotation.__args__ == (name,)


def test_iter_keys_reaches_list_items_and_every_kind_of_a_union() -> None:
    keys = set(iter_keys(SftRecipe))
    assert {("data", "train", "path"), ("adapter", "rank"), ("training", "warmup")} <= keys
    assert ("adapter", "lora") not in keys


def test_sections_of_looks_through_unions_and_lists() -> None:
    class A(BaseModel):
        pass

    class B(BaseModel):
        pass

    assert sections_of(A | B | None) == [A, B]
    assert sections_of(tuple[A, ...]) == [A]
    assert sections_of(int | str) == []
