"""Finds the files that a recipe names, and reports missing ones."""

from __future__ import annotations

import difflib
from os.path import isdir, isfile
from pathlib import Path
from typing import Any

from alignkit.errors import AlignkitError
from alignkit.recipe.adapters import continues
from alignkit.recipe.assets import assets_root, find_path
from alignkit.recipe.objectives import CustomSpec
from alignkit.recipe.reading.document import Document
from alignkit.recipe.reading.yaml_values import KeyPath, show_path
from alignkit.recipe.rewards import SOURCE_FILES, ModelReward, RewardSource, file_of
from alignkit.recipe.rows import SourceSpec
from alignkit.recipe.stages.base import Recipe


def with_paths(recipe: Recipe, document: Document) -> Recipe:
    """The recipe with absolute paths for existing files (shipped ones keep their short name)."""

    def place(source: SourceSpec) -> SourceSpec:
        path = place_path(source.path, document) if source.path else None
        return source.model_copy(update={"path": path}) if path else source

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
    if recipe.reward_sources:
        placed_rewards = (_placed_reward(source, document) for source in recipe.reward_sources)
        changes["reward"] = tuple(placed_rewards)
    if recipe.task_source is not None:
        changes["task"] = _placed_reward(recipe.task_source, document)
    if isinstance(recipe.objective, CustomSpec):
        file = find_path(recipe.objective.file, document.folders)
        changes["objective"] = recipe.objective.model_copy(update={"file": str(file)})
    return recipe.model_copy(update=changes)


def _placed_reward(source: RewardSource, document: Document) -> RewardSource:
    if isinstance(source, ModelReward):
        placed = place_path(source.model, document)
        return source.model_copy(update={"model": placed or source.model})
    changes = {}
    for key in SOURCE_FILES:
        value = getattr(source, key, None) or ""
        file = file_of(key, value)
        path = find_path(file, document.folders) if file else None
        if path is not None:
            changes[key] = f"{path}{value[len(file) :]}"
    return source.model_copy(update=changes)


def missing_files(document: Document) -> list[AlignkitError]:
    """One error for each named file that does not exist; the schema reports wrong types."""
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
    objective = document.values.get("objective")
    file = objective.get("file") if isinstance(objective, dict) else None
    if isinstance(file, str) and file.endswith(".py"):
        script = find_path(file, document.folders)
        if not (script and script.is_file()):
            problems.append(no_file(("objective", "file"), file, document))
    return problems + _missing_sources(document)


def _missing_sources(document: Document) -> list[AlignkitError]:
    """One error for each file of a reward source or a task that does not exist."""
    problems = []
    reward = document.values.get("reward")
    sources: list[tuple[KeyPath, Any]] = (
        [*((("reward", index), source) for index, source in enumerate(reward or []))]
        if isinstance(reward, list)
        else [(("reward",), reward)]
    )
    for path, source in [*sources, (("task",), document.values.get("task"))]:
        for key in SOURCE_FILES if isinstance(source, dict) else ():
            value = source.get(key)
            file = file_of(key, value) if isinstance(value, str) else ""
            found = find_path(file, document.folders) if file else None
            if file and not (found and found.is_file()):
                suffix = str(value)[len(file) :]
                problems.append(no_file((*path, key), file, document, suffix=suffix))
    return problems


def no_file(path: KeyPath, value: str, document: Document, *, suffix: str = "") -> AlignkitError:
    """The error for a key whose file does not exist; suggests a file with a similar name."""
    near = _near_file(value, document.folders)
    hint = "looked in the recipe's folder, the working folder and the shipped examples"
    if value == "-":
        hint = "rows cannot come from standard input, since --resume reads them again: name a file"
    return AlignkitError(
        f"{document.place(path)}: {show_path(path)} names no file: {value!r}",
        hint=f"did you mean {near}{suffix}?" if near else hint,
    )


def place_path(value: str, document: Document, *, folders: bool = True) -> str | None:
    """The absolute path of an existing file or folder; shipped ones keep their short name."""
    path = find_path(value, document.folders)
    if path is None or not (folders or path.is_file()):
        return None
    shipped = path.is_relative_to(assets_root()) and path == (assets_root() / value).resolve()
    return value if shipped and not Path(value).is_absolute() else str(path)


def _near_file(value: str, recipe_folders: tuple[Path, ...]) -> str:
    path = Path(value)
    for folder in (*recipe_folders, Path.cwd(), assets_root()):
        parent = (folder / path).parent
        if isdir(parent):
            names = [child.name for child in parent.iterdir() if child.is_file()]
            near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.7)
            if near:
                return str(path.parent / near[0])
    return ""


def _missing_template(value: str, document: Document) -> list[AlignkitError]:
    path = find_path(value, document.folders)
    shipped = assets_root() / "data_templates" / "chat"
    if (path is not None and path.is_file()) or isfile(shipped / f"{value}.jinja"):
        return []
    names = sorted(path.stem for path in shipped.glob("*.jinja"))
    near = difflib.get_close_matches(value, names, n=1)
    where = document.place(("model", "chat_template"))
    problem = AlignkitError(
        f"{where}: model.chat_template names no file and no shipped template: {value!r}",
        hint=f"did you mean {near[0]}?" if near else f"shipped templates: {', '.join(names)}",
    )
    return [problem]
