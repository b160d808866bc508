"""A recipe file and the command line's overrides -> a validated Recipe, or every error at once."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from alignkit.errors import AlignkitError, RecipeError
from alignkit.recipe.assets import assets_root, find_path
from alignkit.recipe.document import Document, apply_overrides, read_document, show_file
from alignkit.recipe.problems import describe_problems, file_order
from alignkit.recipe.rows import SourceSpec
from alignkit.recipe.schema import DEFAULT_KINDS, STAGES, Recipe, as_dict, with_defaults


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
    root = assets_root() / "recipes"
    return sorted(str(path.relative_to(root)) for path in root.rglob("*.yaml"))


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
    near = difflib.get_close_matches(name, shipped_recipes(), n=1, cutoff=0.5)
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
    apply_overrides(document, overrides or [])
    named = str(document.values.get("stage") or stage or "sft")
    near = difflib.get_close_matches(named, STAGES, n=1)  # its schema finds the other errors
    named = near[0] if near else stage or "sft"
    for key, kinds in DEFAULT_KINDS.items():
        section = document.values.get(key)
        if isinstance(section, dict):
            section.setdefault("kind", kinds[named])
    model = STAGES[named]
    problems = _missing_files(document)
    try:
        recipe = model.model_validate_json(json.dumps(document.values, allow_nan=True))
    except ValidationError as error:
        problems = describe_problems(error, document, model) + problems
    if problems:
        raise RecipeError(sorted(problems, key=lambda problem: file_order(problem.message)))
    if stage is not None and recipe.stage != stage:
        where = document.place(("stage",))
        hint = f"run `alignkit {recipe.stage} {name}`"
        problem = AlignkitError(f"{where}: stage is {recipe.stage}, not {stage}", hint=hint)
        raise RecipeError([problem])
    recipe = _with_paths(with_defaults(recipe), document)
    return LoadedRecipe(recipe, show_file(path), document)


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
        found = _place_path(source.path, document) if source.path else None
        return source.model_copy(update={"path": found}) if found else source

    data = recipe.data
    sources = {"train": tuple(map(place, data.train)), "eval": tuple(map(place, data.eval))}
    template = recipe.model.chat_template
    placed = _place_path(template, document, folders=False) if template else None
    model = {
        "base": _place_path(recipe.model.base, document) or recipe.model.base,
        "chat_template": placed or template,
    }
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update=model),
            "data": data.model_copy(update=sources),
        }
    )


def _missing_files(document: Document) -> list[AlignkitError]:
    """One error for each named file that does not exist; wrong types are the schema's business."""
    problems: list[AlignkitError] = []
    data = document.values.get("data")
    for key in ("train", "eval"):
        sources = data.get(key) if isinstance(data, dict) else None
        for index, source in enumerate(sources if isinstance(sources, list) else []):
            path = source.get("path") if isinstance(source, dict) else None
            if isinstance(path, str) and find_path(path, document.folders) is None:
                where = document.place(("data", key, index, "path"))
                near = _near_file(path, document.folders)
                hint = "looked in the recipe's folder, the working folder and the shipped examples"
                problems.append(
                    AlignkitError(
                        f"{where}: data.{key}[{index}].path names no file: {path!r}",
                        hint=f"did you mean {near}?" if near else hint,
                    )
                )
    model = document.values.get("model")
    template = model.get("chat_template") if isinstance(model, dict) else None
    if isinstance(template, str):
        problems += _missing_template(template, document)
    return problems


def _place_path(value: str, document: Document, *, folders: bool = True) -> str | None:
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
