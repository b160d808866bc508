"""YAML documents that remember where every value was written.

A `Document` merges a recipe file, the parents it extends and the overrides of the command line, and
keeps the place of each key for messages to the user.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from os.path import isfile
from pathlib import Path
from typing import Any

from alignkit.errors import AlignkitError, RecipeError
from alignkit.recipe.addresses import hide_secrets
from alignkit.recipe.assets import show_file
from alignkit.recipe.reading.yaml_values import KeyPath, read_text, read_values, show_path

_SETTABLE = "set a key of a mapping, or an existing list item, as in data.train.0.take=100"
"""Hint for an override that names nothing that can be set."""


MOST_PARENTS = 20
"""Files that extend one another."""


@dataclass
class Document:
    """Plain values with the place where each was written.

    Args:
        values: nested mappings, lists and scalars.
        places: key path -> `file:line`, or `command line`.
        name: the file's name as shown in messages.
        folders: folders in which relative paths are looked up first: the file's own, then those
            of the files that it extends.
        files: the file, and those that it extends.
    """

    values: dict[str, Any]
    places: dict[KeyPath, str]
    name: str
    folders: tuple[Path, ...]
    files: tuple[Path, ...] = ()

    def place(self, path: KeyPath) -> str:
        """The place of the value at `path`, or of its nearest parent that was written."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return self.name


def read_document(path: Path) -> Document:
    """Read one YAML file and every parent it extends.

    Args:
        path: an existing file.

    Returns:
        The merged document: the child's values win, mappings merge key by key; lists, and mappings
        of another `kind`, are replaced as a whole.

    Raises:
        RecipeError: the file is not a YAML mapping, repeats a key, or extends itself.
    """
    return _read(path.resolve(), ())


def _read(path: Path, children: tuple[Path, ...]) -> Document:
    name = show_file(path)
    if path in children:
        rule = f"extends itself through {show_file(children[-1])}"
        hint = "remove `extends` from one of the files"
        raise RecipeError([AlignkitError(f"{name}: {rule}", hint=hint)])
    if len(children) > MOST_PARENTS:
        rule = f"is the last of more than {MOST_PARENTS} files that extend one another"
        hint = "write the keys of some of them into one file"
        raise RecipeError([AlignkitError(f"{name}: {rule}", hint=hint)])
    read = read_values(read_text(path), name)
    if not isinstance(read.values, dict):
        hint = "start from `alignkit recipes copy quickstart/sft.yaml my.yaml`"
        content = "nothing" if read.values is None else "a single value or a list"
        rule = f"must be a mapping of keys to values, got {content}"
        raise RecipeError([AlignkitError(f"{name}: {rule}", hint=hint)])
    if read.problems:
        raise RecipeError(read.problems)
    places = {(): name, **read.places}
    document = Document(read.values, places, name, (path.parent,), (path,))
    parent_name = document.values.pop("extends", None)
    if parent_name is None:
        return document
    return _extend(document, parent_name, (*children, path))


def _extend(document: Document, parent_name: Any, children: tuple[Path, ...]) -> Document:
    where = document.place(("extends",))
    if not isinstance(parent_name, str):
        rule = f"extends must be a file name, got {parent_name!r}"
        hint = "a recipe extends one file, as in extends: base.yaml"
        raise RecipeError([AlignkitError(f"{where}: {rule}", hint=hint)])
    parent_path = document.folders[0] / parent_name
    if not isfile(parent_path):
        hint = "the name is relative to the file that extends it"
        raise RecipeError(
            [AlignkitError(f"{where}: extends {parent_name!r}, which does not exist", hint=hint)]
        )
    return lay_over(_read(parent_path.resolve(), children), document)


def lay_over(parent: Document, child: Document) -> Document:
    """The two documents as one: the child's values win, mappings merge key by key.

    Args:
        parent: consumed; its values are changed.
        child: gives the name, and the folders that come first.
    """
    folders = (*child.folders, *parent.folders)
    files = (*child.files, *parent.files)
    merged = Document(parent.values, dict(parent.places), child.name, folders, files)
    _merge(merged, child.values, child.places, ())
    return merged


def part_of(document: Document, path: KeyPath) -> Document:
    """The mapping at `path` as a document of its own.

    Args:
        document: not changed.
        path: a mapping in it.
    """
    values: Any = document.values
    for part in path:
        values = values[part]
    length = len(path)
    places = {
        known[length:]: place for known, place in document.places.items() if known[:length] == path
    }
    values = copy.deepcopy(values)
    return Document(values, places, document.name, document.folders, document.files)


def _merge(
    target: Document, values: dict[str, Any], places: dict[KeyPath, str], path: KeyPath
) -> None:
    """Merge `values`, which belong at `path`, into the target."""
    here: Any = target.values
    for part in path:
        here = here[part]
    for key, value in values.items():
        child = (*path, key)
        old = here.get(key)
        same_kind = isinstance(value, dict) and isinstance(old, dict)
        if same_kind and not ("kind" in value and value["kind"] != old.get("kind")):
            target.places[child] = places.get(child, target.place(child))
            _merge(target, value, places, child)
            continue
        here[key] = value
        for known in [known for known in target.places if known[: len(child)] == child]:
            del target.places[known]
        target.places.update({k: v for k, v in places.items() if k[: len(child)] == child})


def apply_overrides(document: Document, overrides: list[str]) -> None:
    """Apply `key.sub=value` arguments of the command line to the document.

    Args:
        document: changed in place.
        overrides: each `path=value`; values are read as YAML, list items are named by number.

    Raises:
        RecipeError: an override has no `=`, is not YAML, or names nothing that can be set.
    """
    problems: list[AlignkitError] = []
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals or not key:
            hint = "write overrides as key.sub=value, for example training.learning_rate=1e-4"
            problems.append(AlignkitError(f"command line: {text!r} is not an override", hint=hint))
            continue
        path: KeyPath = tuple(
            int(part) if part.isascii() and part.isdigit() else part for part in key.split(".")
        )
        try:
            read = read_values(raw, "command line", path)
        except RecipeError as error:
            problems += [_of_override(problem, key, raw) for problem in error.problems]
            continue
        problems += read.problems
        problem = _set(document, path, read.values)
        if problem:
            problems.append(problem)
    if problems:
        raise RecipeError(problems)


def _of_override(problem: AlignkitError, key: str, raw: str) -> AlignkitError:
    """A problem with the value of an override, which has no lines."""
    rule = problem.message.partition(": ")[2]
    if rule.startswith("is not valid YAML"):
        shown = hide_secrets(raw)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        hint = "quote the value for the shell, as in 'data.train=[{path: a.jsonl}]'"
        return AlignkitError(f"command line: the value of {key} is not YAML: {shown!r}", hint=hint)
    return AlignkitError(f"command line: {key}: {rule}", hint=problem.hint)


def _set(document: Document, path: KeyPath, value: Any) -> AlignkitError | None:
    here: Any = document.values
    for depth, part in enumerate(path[:-1]):
        if isinstance(here, dict) and isinstance(part, str):
            if here.get(part) is None:
                here[part] = {}
                document.places[path[: depth + 1]] = "command line"
            here = here[part]
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            here = here[part]
        else:
            broken = show_path(path[: depth + 1])
            rule = f"{show_path(path)}: there is no {broken} to set"
            return AlignkitError(f"command line: {rule}", hint=_SETTABLE)
    last = path[-1]
    fits = (isinstance(here, dict) and isinstance(last, str)) or (
        isinstance(here, list) and isinstance(last, int) and last < len(here)
    )
    if not fits:
        rule = f"{show_path(path)} names nothing that can be set"
        return AlignkitError(f"command line: {rule}", hint=_SETTABLE)
    here[last] = value
    for known in [known for known in document.places if known[: len(path)] == path]:
        del document.places[known]
    document.places[path] = "command line"
    return None
