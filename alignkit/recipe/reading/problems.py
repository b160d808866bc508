"""Turns pydantic's errors into sentences: where, which rule, which value, what to do."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from alignkit.errors import AlignkitError
from alignkit.recipe.addresses import hide_secrets
from alignkit.recipe.reading.document import Document
from alignkit.recipe.reading.yaml_values import KeyPath, show_path
from alignkit.recipe.rewards import RULES, SOURCE_KEYS, SOURCE_TAGS, source_keys
from alignkit.recipe.stages.base import Recipe
from alignkit.recipe.stages.registry import stages

HINTS = {
    "training.learning_rate": "usual for SFT: 1e-4 to 5e-4 with LoRA, 5e-6 to 5e-5 for full "
    "weights; about a tenth of that for dpo and kto",
    "training.batch_size": "examples per optimizer step over all processes; 8 to 64 is usual",
    "training.microbatch_tokens": "`auto` fits it to the memory; the result does not depend on it",
    "training.decay": "0.1 to 0.2 is usual",
    "training.min_rate": "0.1 is usual",
    "training.betas": "[0.9, 0.999] is usual, with lion [0.9, 0.99]",
    "training.warmup": "below 1 a share of the steps (0.03), from 1 a number of steps",
    "data.max_length": "in tokens; 1024 to 4096 is usual",
    "data.train": "a list of sources, as in [{path: data.jsonl}]",
    "adapter": "as in {kind: lora, rank: 16}",
    "adapter.rank": "8 to 64 is usual",
    "model.quantization": "`nf4` keeps the frozen base in 4 bits, `int8` in 8; `none` in "
    "model.dtype",
}

_LIMITS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "tuple_type": "a list",
    "list_type": "a list",
    "finite_number": "a finite number",
}


def describe_problems(
    error: ValidationError, document: Document, model: type[BaseModel]
) -> list[AlignkitError]:
    """Every broken rule as one error.

    Args:
        error: raised by pydantic.
        document: the checked values, with their places.
        model: the schema.

    Returns:
        One error for each place that breaks a rule; alternatives of a union are joined by "or".
        They are unsorted: see `file_order`.
    """
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for details in map(_name_kind, error.errors(include_url=False)):
        by_path.setdefault(_user_path(details, document.values), []).append(details)
    problems = []
    parents = {path[:length] for path in by_path for length in range(len(path))}
    for path, group in by_path.items():
        if path in parents and group[0]["type"] in {*_TYPES, "too_short"}:
            continue  # a list with a broken item is also reported as too short, or as not a string
        where, name = document.place(path), show_path(path)
        if group[0]["type"] == "extra_forbidden":
            rule = f"{name} is not a key of a recipe"
            hint = _nearest_key(str(path[-1]), path[:-1], group[0]["loc"][:-1], model)
        elif group[0]["type"] == "missing":
            rule, hint = f"{name} is required and missing", _hint(path, model)
        else:
            first, *others = dict.fromkeys(_rule(details) for details in group)
            rules = " or ".join([first, *(other.removeprefix("must be ") for other in others)])
            rule = f"{name} {rules}, got {show_value(group[0]['input'])}".strip()
            hint = _nearest_value(group) or _hint(path, model)
        problems.append(AlignkitError(f"{where}: {rule}", hint=hint))
    return problems


def file_order(message: str) -> tuple[str, int]:
    """Sort key that puts messages in file order: by file, then by line number."""
    file, _, rest = message.partition(":")
    number = rest.partition(":")[0]
    return file, int(number) if number.isdigit() else 0


def _name_kind(details: ErrorDetails) -> ErrorDetails:
    """An unknown kind as an error of the key `kind`; for an unknown stage, with all stage names."""
    if details["loc"] == ("stage",) and details["type"] == "literal_error":
        return {**details, "ctx": {"expected": _any_of(map(repr, stages()))}}
    if details["type"] == "reward_source" and _sources_in(details["input"]) == ["rule"]:
        return {
            **details,
            "type": "literal_error",
            "loc": (*details["loc"], "rule"),
            "input": details["input"]["rule"],
            "ctx": {"expected": _any_of(map(repr, RULES))},
        }
    if details["type"] != "union_tag_invalid":
        return details
    key = details["ctx"]["discriminator"].strip("'")
    tags = " or ".join(details["ctx"]["expected_tags"].rsplit(", ", 1))
    return {
        **details,
        "type": "literal_error",
        "loc": (*details["loc"], key),
        "input": details["input"][key],
        "ctx": {"expected": tags},
    }


def _any_of(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}"


def _sources_in(value: Any) -> list[str]:
    return source_keys(value) if isinstance(value, dict) else []


def _hint(path: KeyPath, model: type[BaseModel]) -> str:
    if path[:1] in (("reward",), ("task",)):  # a mapping or a list of mappings
        path = tuple(part for part in path if isinstance(part, str))
    if path == ("stage",):
        return _any_of(stages())
    own = model.hints if issubclass(model, Recipe) else {}
    return {**HINTS, **own}.get(show_path(path), "")


def _user_path(details: ErrorDetails, values: Any) -> KeyPath:
    """pydantic's location without its union tags."""
    path: list[str | int] = []
    here, value, end = values, details["input"], len(details["loc"]) - 1
    for position, part in enumerate(details["loc"]):
        known = (isinstance(here, dict) and part in here) or (
            isinstance(here, list) and isinstance(part, int) and part < len(here)
        )
        if known:
            path.append(part)
            here = here[part]
        elif position == end and (details["type"] == "missing" or isinstance(value, BaseModel)):
            path.append(part)
    return tuple(path)


def _rule(details: ErrorDetails) -> str:
    kind, context = details["type"], details.get("ctx", {})
    if kind in _LIMITS:
        words, key = _LIMITS[kind]
        limit = context[key]
        return f"must be {words} {limit if isinstance(limit, int) else format(limit, 'g')}"
    if kind in _TYPES:
        return f"must be {_TYPES[kind]}"
    if kind == "literal_error":
        return f"must be {context['expected']}"
    if kind == "too_short":
        return "must not be empty"
    if kind == "string_too_short":
        return "must not be empty text"
    if kind == "value_error":
        return str(context["error"])
    return details["msg"][0].lower() + details["msg"][1:]


def show_value(value: Any) -> str:
    """A value as a recipe would have it, shortened."""
    if isinstance(value, BaseModel):
        return str(getattr(value, "kind", "the default"))
    if isinstance(value, dict):
        return "{" + ", ".join(map(str, value)) + "}"
    words = {"None": "null", "True": "true", "False": "false"}  # as written in YAML
    text = words.get(str(value), repr(value))
    if isinstance(value, str):
        text = repr(hide_secrets(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _nearest_value(group: list[ErrorDetails]) -> str:
    for details in group:
        value = details["input"]
        if details["type"] == "literal_error" and isinstance(value, str):
            options = [part.strip("' ") for part in _split(details["ctx"]["expected"])]
            near = difflib.get_close_matches(value, options, n=1)
            if near:
                return f"did you mean {near[0]}?"
        if details["type"] == "reward_source" and isinstance(value, dict):
            if len(_sources_in(value)) > 1:
                return "a source has exactly one of these keys; write several sources as a list"
            for key in value:
                near = difflib.get_close_matches(key, SOURCE_KEYS, n=1)
                if near:
                    return f"did you mean {near[0]} instead of {key}?"
    return ""


def _split(expected: str) -> list[str]:
    return [part for chunk in expected.split(",") for part in chunk.split(" or ")]


def _nearest_key(
    key: str, parent: KeyPath, raw_parent: tuple[int | str, ...], model: type[BaseModel]
) -> str:
    siblings = list(_model_at(model, raw_parent).model_fields)
    if issubclass(model, Recipe) and show_path((*parent, key)) in model.counterparts:
        return model.counterparts[show_path((*parent, key))]
    near = difflib.get_close_matches(key, siblings, n=1)
    if near:
        return f"did you mean {show_path((*parent, near[0]))}?"
    # In a section, do not suggest keys of sections that are null by default.
    known = list(iter_keys(model, unset=not parent))
    elsewhere = list(dict.fromkeys(show_path(path) for path in known if path[-1] == key))
    if show_path((*(part for part in parent if isinstance(part, str)), key)) in elsewhere:
        other = "reward" if parent[:1] == ("reward",) else "kind"
        return f"it belongs to another {other}; keys here: {', '.join(siblings)}"
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    near = difflib.get_close_matches(key, [path[-1] for path in known], n=1, cutoff=0.9)
    if near:
        full = next(path for path in known if path[-1] == near[0])
        return f"did you mean {show_path(full)}?"
    return f"keys here: {', '.join(siblings)}"


def iter_keys(
    model: type[BaseModel], parent: tuple[str, ...] = (), *, unset: bool = True
) -> Iterator[tuple[str, ...]]:
    """Key paths of the schema, depth first, without list levels. `unset=False` skips the contents
    of sections that are null by default."""
    for name, field in model.model_fields.items():
        yield (*parent, name)
        if unset or field.is_required() or field.default is not None:
            for section in sections_of(field.annotation):
                yield from iter_keys(section, (*parent, name), unset=unset)


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The recipe sections in an annotation, also inside unions, lists and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in typing.get_args(annotation) for section in sections_of(part)]


def _model_at(model: type[BaseModel], raw_path: tuple[int | str, ...]) -> type[BaseModel]:
    candidates: list[type[BaseModel]] = [model]
    for part in raw_path:
        if isinstance(part, int):
            continue
        tagged = [section for section in candidates if part in _tags(section)]
        if tagged and part not in candidates[0].model_fields:
            candidates = tagged
            continue
        for section in candidates:
            if part in section.model_fields:
                candidates = sections_of(section.model_fields[part].annotation) or candidates
                break
    return candidates[0]


def _tags(section: type[BaseModel]) -> tuple[str, ...]:
    """Names of a union's section in pydantic's locations."""
    if section in SOURCE_TAGS:
        return (SOURCE_TAGS[section],)
    choice = choice_of(section)
    return choice[1:] if choice else ()


def choice_of(section: type[BaseModel]) -> tuple[str, str] | None:
    """Key and value that select a section from its union.

    Args:
        section: class of a part of a recipe.

    Returns:
        `("kind", "lora")`, `("rule", "exact")`, or, for other reward sources, the key that
        distinguishes them, twice; None for a section that no key selects.
    """
    for name in ("kind", "rule", "stage"):
        if name in section.model_fields:
            values = typing.get_args(section.model_fields[name].annotation)
            return (name, str(values[0])) if values else None
    tag = SOURCE_TAGS.get(section)
    named = tag.removeprefix("reward:") if tag else ""
    return (named, named) if named else None
