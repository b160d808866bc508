"""All stages: name -> recipe class.

Packages add stages through the entry-point group `alignkit.stages`, which names a recipe class that
does not import torch and names its definition as a string.
"""

from __future__ import annotations

import difflib
import functools
import re
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from alignkit.errors import AlignkitError
from alignkit.recipe.stages.base import Recipe
from alignkit.recipe.stages.built_in import BUILT_IN, GROUP


def stages() -> dict[str, type[Recipe]]:
    """Name -> recipe class of every usable stage, those of installed packages last."""
    return _find()[0]


def broken_stages() -> dict[str, AlignkitError]:
    """Name -> error, for stages of installed packages that cannot be used."""
    return _find()[1]


def find_stage(name: str) -> type[Recipe]:
    """The recipe class of a stage, or of the one with the closest name.

    Raises:
        AlignkitError: the stage's package is broken.
        KeyError: no name is close.
    """
    known, broken = _find()
    near = difflib.get_close_matches(name, [*known, *broken], n=1)
    if near and near[0] in broken:
        raise broken[near[0]]
    return known[near[0] if near else name]


@functools.cache
def _find() -> tuple[dict[str, type[Recipe]], dict[str, AlignkitError]]:
    own = [EntryPoint(name, value, GROUP) for name, (value, _) in BUILT_IN.items()]
    known: dict[str, type[Recipe]] = {entry.name: entry.load() for entry in own}
    broken: dict[str, AlignkitError] = {}
    for entry in entry_points(group=GROUP):
        package = "a package" if entry.dist is None else entry.dist.name
        where = f"stage {entry.name} of {package}"
        if entry.name in known:
            broken[f"{entry.name} of {package}"] = AlignkitError(
                f"{where} has the name of another stage",
                hint=f"rename its entry point in the group {GROUP}",
            )
            continue
        try:
            recipe = entry.load()
        except Exception as error:  # a package may raise anything while it is imported
            broken[entry.name] = AlignkitError(
                f"{where} cannot be loaded: {type(error).__name__}: {error}",
                hint=f"its entry point is {entry.value}; reinstall or remove the package",
            )
            continue
        fault = _fault(recipe)
        if fault:
            hint = "see docs/architecture.md, A new stage"
            broken[entry.name] = AlignkitError(f"{where} {fault}: {entry.value}", hint=hint)
        else:
            known[entry.name] = recipe
    return known, broken


def _fault(recipe: Any) -> str:
    """Why an object cannot be the recipe class of a stage; empty if it can."""
    if not (isinstance(recipe, type) and issubclass(recipe, Recipe)):
        return "is not a class that extends Recipe"
    if not re.fullmatch(r"[\w.]+:\w+", getattr(recipe, "definition", "")):
        return "names no definition as `module:name`"
    return "" if getattr(recipe, "rates", None) else "names no learning rates"
