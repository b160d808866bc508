"""Resolves the texts of a pipeline's stage: `${name}` to the output of an earlier stage, relative
paths to files next to the recipe that names them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from os.path import exists
from pathlib import Path
from typing import Any

from alignkit.errors import AlignkitError, RecipeError
from alignkit.recipe.reading.document import Document
from alignkit.recipe.reading.yaml_values import KeyPath, show_path
from alignkit.recipe.rewards import SOURCE_FILES

STAGE_NAME = re.compile(r"[A-Za-z_][\w-]*")
"""Valid names of stages."""

_FILES = (
    ("model", "base"),
    ("model", "chat_template"),
    ("adapter", "from"),
    ("data", "train", "path"),
    ("data", "eval", "path"),
    ("reward", "model"),
    *((section, key) for section in ("reward", "task") for key in SOURCE_FILES),
)
"""Recipe keys that name files, without list positions."""

_REFERENCE = re.compile(r"\$\$\{|\$\{([^{}]*)(\}?)")


def replace_references(
    document: Document, name: str, outputs: Mapping[str, str], stages: Collection[str]
) -> dict[KeyPath, tuple[str, ...]]:
    """Replace references to earlier stages by paths, and `$${` by `${`.

    Args:
        document: the stage's; changed in place.
        name: the stage's name.
        outputs: earlier stage -> its output, relative to the working folder.
        stages: names of all stages.

    Returns:
        Keys that contained references, and the stages they name.

    Raises:
        RecipeError: holds every reference that names no earlier stage.
    """
    references = {}
    problems = []
    for key, text in list(_texts(document.values, ())):
        names = []
        for match in _REFERENCE.finditer(text):
            if match[0] == "$${":
                continue
            names.append(match[1])
            fault = _fault(match, name, outputs, stages)
            if fault:
                rule, hint = fault
                where = document.place(key)
                problems.append(AlignkitError(f"{where}: {show_path(key)} {rule}", hint=hint))
        here: Any = document.values
        for part in key[:-1]:
            here = here[part]
        here[key[-1]] = _REFERENCE.sub(lambda match: _path(match, outputs), text)
        if names:
            references[key] = tuple(names)
    if problems:
        raise RecipeError(problems)
    return references


def _fault(
    match: re.Match[str], name: str, outputs: Mapping[str, str], stages: Collection[str]
) -> tuple[str, str] | None:
    """Rule and hint for a reference that names no earlier stage."""
    wanted = match[1]
    if not match[2] or not STAGE_NAME.fullmatch(wanted):
        hint = "write a reference as ${name}, and $${ for the characters ${ themselves"
        return f"contains a malformed reference: {match[0]}", hint
    if wanted in outputs:
        return None
    if wanted == name:
        return f"refers to its own stage: {match[0]}", "name an earlier stage"
    if wanted in stages:
        hint = f"write {wanted} before {name}: stages run in the order of the file"
        return f"refers to a later stage: {match[0]}", hint
    near = difflib.get_close_matches(wanted, outputs, n=1)
    earlier = ", ".join(outputs) or "none, this is the first"
    hint = f"did you mean ${{{near[0]}}}?" if near else f"earlier stages: {earlier}"
    return f"refers to an unknown stage: {match[0]}", hint


def _path(match: re.Match[str], outputs: Mapping[str, str]) -> str:
    if match[0] == "$${":
        return "${"
    return str(Path.cwd() / outputs.get(match[1], match[0]))


def _texts(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    """Every text in nested values, with its key."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict | list):
        items: Any = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _texts(inner, (*path, key))


def anchor_files(document: Document) -> Document:
    """The document with absolute paths for files next to it, so that it can be merged with another.

    Args:
        document: of a recipe; paths that exist in none of its folders are kept.
    """
    values = _anchored(document.values, document.folders, ())
    return replace(document, values=values)


def _anchored(value: Any, folders: tuple[Path, ...], keys: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {
            key: inner
            if "judge" in value and key == "model"
            else _anchored(inner, folders, (*keys, key))
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [_anchored(inner, folders, keys) for inner in value]
    if not isinstance(value, str) or keys not in _FILES:
        return value
    file, colon, function = value.rpartition(":") if keys[-1] == "function" else (value, "", "")
    for folder in folders:
        if file and exists(folder / file):
            return str((folder / file).resolve()) + colon + function
    return value
