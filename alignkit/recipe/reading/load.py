"""A recipe file and the command line's overrides -> a validated Recipe, or every error at once."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from alignkit.errors import AlignkitError, RecipeError
from alignkit.recipe.adapters import continues
from alignkit.recipe.assets import assets_root, find_path, show_file
from alignkit.recipe.reading.document import (
    Document,
    KeyPath,
    apply_overrides,
    part_of,
    read_document,
    show_path,
)
from alignkit.recipe.reading.problems import describe_problems, file_order
from alignkit.recipe.rewards import FunctionReward, ModelReward, RewardSource
from alignkit.recipe.rows import SourceSpec
from alignkit.recipe.stages.schema import (
    DEFAULT_KINDS,
    STAGES,
    PpoRecipe,
    Recipe,
    as_dict,
    with_defaults,
)


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe with the file it came from.

    Args:
        recipe: validated; paths of existing files are absolute or relative to the assets.
        name: the file as shown in messages.
        document: values and places, for errors found later.
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
    """A file with `stages` is a pipeline, wherever it lies."""
    root = assets_root() / "recipes"
    found = []
    for path in root.rglob("*.yaml"):
        lines = path.read_text(encoding="utf-8").splitlines()
        if any(line.startswith("stages:") for line in lines) is pipelines:
            found.append(str(path.relative_to(root)))
    return sorted(found)


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
        if candidate.is_file():
            return candidate
    if Path(name).is_dir():
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
        The recipe with its defaults filled in and its files found.

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
    """The recipe that a document holds.

    Args:
        document: merged; sections without a `kind` get the stage's own.
        stage: assumed where the document names none.
        pending: keys of files and folders that are still to be made, which need not exist.

    Returns:
        The recipe with its defaults filled in and its files found.

    Raises:
        RecipeError: holds every broken rule of the document, in file order.
    """
    named = str(document.values.get("stage") or stage or "sft")
    near = difflib.get_close_matches(named, STAGES, n=1)  # its schema finds the other errors
    named = near[0] if near else stage or "sft"
    for key, kinds in DEFAULT_KINDS.items():
        section = document.values.get(key)
        if isinstance(section, dict):
            section.setdefault("kind", kinds[named])
    model = STAGES[named]
    problems = _missing_files(without(document, pending))
    try:
        recipe = model.model_validate_json(json.dumps(document.values, allow_nan=True))
    except ValidationError as error:
        problems = describe_problems(error, document, model) + problems
    if problems:
        raise RecipeError(sorted(problems, key=lambda problem: file_order(problem.message)))
    return _with_paths(with_defaults(recipe), document)


def without(document: Document, keys: Collection[KeyPath]) -> Document:
    """The document with null at these keys."""
    if not keys:
        return document
    less = part_of(document, ())
    for *parents, last in keys:
        here: Any = less.values
        for part in parents:
            here = here[part]
        here[last] = None
    return less


def stored_recipe(path: Path) -> Recipe:
    """The recipe that a run folder keeps, without looking for the files it names.

    Args:
        path: its recipe.yaml, written by `render_recipe`.

    Raises:
        RecipeError: the file is no resolved recipe.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        return STAGES[values["stage"]].model_validate_json(json.dumps(values))
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValidationError) as error:
        reason = str(error).split("\n")[0]
        problem = AlignkitError(f"{path}: is no recipe of a run: {reason}")
        raise RecipeError([problem]) from None


def _with_paths(recipe: Recipe, document: Document) -> Recipe:
    """The recipe with existing files as absolute paths (shipped ones keep their short name)."""

    def place(source: SourceSpec) -> SourceSpec:
        found = place_path(source.path, document) if source.path else None
        return source.model_copy(update={"path": found}) if found else source

    data = recipe.data
    sources = {"train": tuple(map(place, data.train)), "eval": tuple(map(place, data.eval))}
    template = recipe.model.chat_template
    placed = place_path(template, document, folders=False) if template else None
    model = {
        "base": place_path(recipe.model.base, document) or recipe.model.base,
        "chat_template": placed or template,
    }
    before = continues(recipe.adapter)
    adapter = {"from": place_path(before, document) or before} if before else {}
    changes: dict[str, Any] = {
        "adapter": recipe.adapter.model_copy(update=adapter),
        "model": recipe.model.model_copy(update=model),
        "data": data.model_copy(update=sources),
    }
    if isinstance(recipe, PpoRecipe):
        changes["reward"] = tuple(_placed_reward(source, document) for source in recipe.reward)
    return recipe.model_copy(update=changes)


def _placed_reward(source: RewardSource, document: Document) -> RewardSource:
    if isinstance(source, FunctionReward):
        file, _, name = source.function.rpartition(":")
        found = find_path(file, document.folders)
        return source.model_copy(update={"function": f"{found or file}:{name}"})
    if isinstance(source, ModelReward):
        placed = place_path(source.model, document)
        return source.model_copy(update={"model": placed or source.model})
    return source


def _missing_files(document: Document) -> list[AlignkitError]:
    """One error for each named file that does not exist; wrong types are the schema's business."""
    problems: list[AlignkitError] = []
    data = document.values.get("data")
    for key in ("train", "eval"):
        sources = data.get(key) if isinstance(data, dict) else None
        for index, source in enumerate(sources if isinstance(sources, list) else []):
            path = source.get("path") if isinstance(source, dict) else None
            if isinstance(path, str) and find_path(path, document.folders) is None:
                problems.append(no_file(("data", key, index, "path"), path, document))
    model = document.values.get("model")
    template = model.get("chat_template") if isinstance(model, dict) else None
    if isinstance(template, str):
        problems += _missing_template(template, document)
    return problems + _missing_functions(document)


def _missing_functions(document: Document) -> list[AlignkitError]:
    """One error for each reward function whose file does not exist."""
    problems = []
    reward = document.values.get("reward")
    one: list[tuple[KeyPath, Any]] = [(("reward",), reward)]
    many = enumerate(reward) if isinstance(reward, list) else []
    for path, source in [*one, *((("reward", index), source) for index, source in many)]:
        function = source.get("function") if isinstance(source, dict) else None
        file, _, name = function.rpartition(":") if isinstance(function, str) else ("", "", "")
        found = find_path(file, document.folders)
        if file.endswith(".py") and name.isidentifier() and not (found and found.is_file()):
            problems.append(no_file((*path, "function"), file, document, suffix=f":{name}"))
    return problems


def no_file(path: KeyPath, value: str, document: Document, *, suffix: str = "") -> AlignkitError:
    """The error of a key whose file is nowhere; names a file that is spelled alike."""
    near = _near_file(value, document.folders)
    hint = "looked in the recipe's folder, the working folder and the shipped examples"
    return AlignkitError(
        f"{document.place(path)}: {show_path(path)} names no file: {value!r}",
        hint=f"did you mean {near}{suffix}?" if near else hint,
    )


def place_path(value: str, document: Document, *, folders: bool = True) -> str | None:
    """Where an existing file or folder is; shipped ones keep their short name."""
    found = find_path(value, document.folders)
    if found is None or not (folders or found.is_file()):
        return None
    shipped = found.is_relative_to(assets_root()) and found == (assets_root() / value).resolve()
    return value if shipped and not Path(value).is_absolute() else str(found)


def _near_file(value: str, recipe_folders: tuple[Path, ...]) -> str:
    path = Path(value)
    for folder in (*recipe_folders, Path.cwd(), assets_root()):
        parent = (folder / path).parent
        if parent.is_dir():
            names = [child.name for child in parent.iterdir() if child.is_file()]
            near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.7)
            if near:
                return str(path.parent / near[0])
    return ""


def _missing_template(value: str, document: Document) -> list[AlignkitError]:
    found = find_path(value, document.folders)
    shipped = assets_root() / "data_templates" / "chat"
    if (found is not None and found.is_file()) or (shipped / f"{value}.jinja").is_file():
        return []
    names = sorted(path.stem for path in shipped.glob("*.jinja"))
    near = difflib.get_close_matches(value, names, n=1)
    where = document.place(("model", "chat_template"))
    problem = AlignkitError(
        f"{where}: model.chat_template names no file and no shipped template: {value!r}",
        hint=f"did you mean {near[0]}?" if near else f"shipped templates: {', '.join(names)}",
    )
    return [problem]


def render_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every key written out, in the schema's order."""
    header = "# Resolved recipe: every key with the value that was used.\n"
    return header + yaml.safe_dump(as_dict(recipe), sort_keys=False, allow_unicode=True)
