"""The stages there are: name -> its recipe class.

Packages add theirs through the entry-point group `alignkit.stages`, which names a recipe class
without torch; that names its definition as a string.
"""

from __future__ import annotations

import functools
from importlib.metadata import EntryPoint, entry_points

from alignkit.errors import AlignkitError
from alignkit.recipe.stages.base import Recipe
from alignkit.recipe.stages.built_in import BUILT_IN, GROUP


@functools.cache
def stages() -> dict[str, type[Recipe]]:
    """Name -> recipe class of every stage, those of installed packages last.

    Raises:
        AlignkitError: a package's stage cannot be loaded, is not a recipe, or takes a name that is
            taken already.
    """
    own = [EntryPoint(name, value, GROUP) for name, (value, _) in BUILT_IN.items()]
    found: dict[str, type[Recipe]] = {}
    for entry in (*own, *entry_points(group=GROUP)):
        where = "" if entry.dist is None else f" of {entry.dist.name}"
        if entry.name in found:
            raise AlignkitError(
                f"stage {entry.name}{where} has the name of another stage",
                hint=f"rename its entry point in the group {GROUP}",
            )
        try:
            recipe = entry.load()
        except (ImportError, AttributeError) as error:
            raise AlignkitError(
                f"stage {entry.name}{where} cannot be loaded: {error}",
                hint=f"its entry point is {entry.value}; reinstall or remove the package",
            ) from error
        if not (isinstance(recipe, type) and issubclass(recipe, Recipe)):
            raise AlignkitError(
                f"stage {entry.name}{where} is not a recipe: {entry.value}",
                hint="name a class that extends alignkit.recipe.stages.base.Recipe",
            )
        found[entry.name] = recipe
    return found
