"""The recipe that a run folder keeps: plain values, whoever wrote them.

What it names (files, data sets, code) is used only if a run of the user's on this machine has had
the very same recipe, or the user asks for it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import yaml
from pydantic import ValidationError

from alignkit.errors import AlignkitError, RecipeError
from alignkit.recipe.assets import alignkit_home
from alignkit.recipe.stages.base import Recipe
from alignkit.recipe.stages.registry import find_stage

NAME = "recipe.yaml"
"""Its file in a run folder."""


def render_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every key, in the schema's order."""
    header = "# Resolved recipe: every key with the value that was used.\n"
    return header + yaml.safe_dump(recipe.as_dict(), sort_keys=False, allow_unicode=True)


def stored_recipe(path: Path) -> Recipe:
    """The recipe stored in a run folder; the files it names need not exist.

    Args:
        path: its recipe.yaml, written by `render_recipe`.

    Returns:
        The recipe. It never asks for code that comes with a model: only a recipe that the user
        names, or the command line, may.

    Raises:
        RecipeError: the file is not a resolved recipe.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise ValueError("it has aliases, which no run writes: a few can stand for gigabytes")
        values = yaml.safe_load(text)
        values["model"]["trust_remote_code"] = False
        return find_stage(values["stage"]).model_validate_json(json.dumps(values))
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError, ValidationError) as error:
        reason = str(error).split("\n")[0]
        problem = AlignkitError(
            f"{path}: is not a recipe of a run: {reason}",
            hint="it is written by the run; restore it, or train again with --overwrite",
        )
        raise RecipeError([problem]) from None


def remember_recipe(text: str) -> None:
    """Note that a run of the user's on this machine has this resolved recipe."""
    mark = _mark(text.encode())
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()


def is_remembered(path: Path) -> bool:
    """Whether a run of the user's on this machine had just this recipe.

    Args:
        path: the recipe.yaml of a run folder, which may have come from anywhere.
    """
    return _mark(path.read_bytes()).exists()


def _mark(content: bytes) -> Path:
    return alignkit_home() / "recipes" / hashlib.sha256(content).hexdigest()
