"""A recipe file and command-line overrides -> a validated Recipe, or every error at once."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection
from dataclasses import dataclass
from os.path import isdir, isfile
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from alignkit.errors import AlignkitError, RecipeError
from alignkit.recipe.assets import assets_root, show_file
from alignkit.recipe.reading.document import Document, apply_overrides, part_of, read_document
from alignkit.recipe.reading.files import missing_files, with_paths
from alignkit.recipe.reading.problems import describe_problems, file_order
from alignkit.recipe.reading.yaml_values import KeyPath
from alignkit.recipe.stages.base import Recipe
from alignkit.recipe.stages.registry import find_stage


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and the file it came from.

    Args:
        recipe: validated; paths of existing files are absolute, or short names of shipped files.
        name: the file as shown in messages.
        document: values and their places, for errors found later.
    """

    recipe: Recipe
    name: str
    document: Document


def shipped_recipes() -> list[str]:
    """Names of the shipped recipes, such as `quickstart/sft.yaml`, sorted."""
    return _shipped(pipelines=False)


def shipped_pipelines() -> list[str]:
    """Names of the shipped pipelines, such as `quickstart/rlhf.yaml`, sorted."""
    return _shipped(pipelines=True)


def _shipped(*, pipelines: bool) -> list[str]:
    """Names of the shipped pipelines (files with the key `stages`) or of the other recipes."""
    root = assets_root() / "recipes"
    names = []
    for path in root.rglob("*.yaml"):
        lines = path.read_text(encoding="utf-8").splitlines()
        if any(line.startswith("stages:") for line in lines) is pipelines:
            names.append(str(path.relative_to(root)))
    return sorted(names)


def find_recipe(name: str) -> Path:
    """The file that a recipe argument names.

    Args:
        name: a path, or the name of a shipped recipe with or without `.yaml`.

    Returns:
        An existing file.

    Raises:
        RecipeError: there is no such file.
    """
    shipped = assets_root() / "recipes"
    for candidate in (Path(name), shipped / name, shipped / f"{name}.yaml", assets_root() / name):
        if isfile(candidate):
            return candidate
    if isdir(name):
        problem = AlignkitError(f"{name}: is a folder, not a recipe", hint="name the .yaml file")
        raise RecipeError([problem])
    near = difflib.get_close_matches(
        name, [*shipped_recipes(), *shipped_pipelines()], n=1, cutoff=0.5
    )
    hint = f"did you mean {near[0]}? " if near else ""
    hint += "`alignkit recipes list` shows the shipped ones"
    raise RecipeError([AlignkitError(f"{name}: no such recipe", hint=hint)])


def load_recipe(
    name: str, overrides: list[str] | None = None, *, stage: str | None = None
) -> LoadedRecipe:
    """Read, merge and validate a recipe.

    Args:
        name: file or shipped name.
        overrides: `key.sub=value` arguments; they win over the file.
        stage: the stage that the command runs; None accepts any.

    Returns:
        The recipe with its defaults filled in and its files located.

    Raises:
        RecipeError: holds every broken rule of the file, each with line, value and hint.
    """
    path = find_recipe(name)
    document = read_document(path)
    if isinstance(document.values.get("stages"), dict):
        problem = AlignkitError(
            f"{show_file(path)}: is a pipeline, not a recipe", hint=f"run `alignkit run {name}`"
        )
        raise RecipeError([problem])
    apply_overrides(document, overrides or [])
    recipe = resolve_recipe(document, stage=stage)
    if stage is not None and recipe.stage != stage:
        where = document.place(("stage",))
        hint = f"run `alignkit {recipe.stage} {name}`"
        problem = AlignkitError(f"{where}: stage is {recipe.stage}, not {stage}", hint=hint)
        raise RecipeError([problem])
    return LoadedRecipe(recipe, show_file(path), document)


def resolve_recipe(
    document: Document, *, stage: str | None = None, pending: Collection[KeyPath] = ()
) -> Recipe:
    """The recipe in a document.

    Args:
        document: merged; sections without a `kind` get the stage's default.
        stage: used if the document names none.
        pending: keys of files and folders that an earlier stage will create.

    Returns:
        The recipe with its defaults filled in and its files located.

    Raises:
        RecipeError: holds every broken rule of the document, in file order.
    """
    named = str(document.values.get("stage") or stage or "sft")
    try:
        model = find_stage(named)  # the schema reports an unknown stage
    except KeyError:
        model = find_stage(stage or "sft")
    for key in ("adapter", "objective"):
        section = document.values.get(key)
        if isinstance(section, dict):
            default = model.model_fields[key].default
            if hasattr(default, "kind"):
                section.setdefault("kind", default.kind)
    problems = missing_files(without(document, pending))
    try:
        recipe = model.model_validate_json(json.dumps(document.values, allow_nan=True))
    except ValidationError as error:
        problems = describe_problems(error, document, model) + problems
    if problems:
        raise RecipeError(sorted(problems, key=lambda problem: file_order(problem.message)))
    return with_paths(recipe.with_defaults(), document)


def without(document: Document, keys: Collection[KeyPath]) -> Document:
    """A copy of the document with null at these keys."""
    if not keys:
        return document
    copy = part_of(document, ())
    for *parents, last in keys:
        here: Any = copy.values
        for part in parents:
            here = here[part]
        here[last] = None
    return copy
