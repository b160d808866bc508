"""A foreign file -> the text of a recipe that alignkit has read and checked, and the list of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.recipe.importing.fields import Different, Foreign, Lost, Translated
from alignkit.recipe.importing.read import read_foreign, toolkit_of
from alignkit.recipe.importing.translate import Draft, set_stage, translate
from alignkit.recipe.reading.document import Document
from alignkit.recipe.reading.load import resolve_recipe
from alignkit.recipe.reading.yaml_values import read_values, write_values


@dataclass(frozen=True)
class Imported:
    """A recipe, and what became of the foreign keys.

    Args:
        toolkit: title of the toolkit.
        stage: of the recipe.
        text: the recipe, as YAML.
        translated: foreign keys that have become keys of the recipe.
        no_counterpart: foreign keys that have none, each with a reason.
        different: what is done differently here.
        off: foreign keys that are off, or say what is so here anyway.
        first: commands to run before the recipe.
        not_found: named files and folders that do not exist here.
    """

    toolkit: str
    stage: str
    text: str
    translated: tuple[Translated, ...]
    no_counterpart: tuple[Lost, ...]
    different: tuple[Different, ...]
    off: tuple[str, ...]
    first: tuple[str, ...]
    not_found: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "toolkit": self.toolkit,
            "stage": self.stage,
            "recipe": self.text,
            "translated": [
                {"key": one.key, "value": one.value, "recipe": one.settings}
                for one in self.translated
            ],
            "no_counterpart": [
                {"key": one.key, "value": one.value, "reason": one.reason}
                for one in self.no_counterpart
            ],
            "different": [{"key": one.key, "says": one.says} for one in self.different],
            "off": list(self.off),
            "first": list(self.first),
            "not_found": list(self.not_found),
        }


def import_file(
    path: Path,
    *,
    toolkit: str | None = None,
    stage: str | None = None,
    processes: int | None = None,
) -> Imported:
    """Translate one foreign file.

    Args:
        path: YAML or JSON of LLaMA-Factory, YAML of Axolotl or TRL, or a command line of TRL.
        toolkit: whose file it is; None finds that out from its keys.
        stage: for a file that does not say.
        processes: that share a step, for a file that does not say.

    Returns:
        The recipe and the list of what was done. It has been read and checked; files that it names
        may still be missing.

    Raises:
        RecipeError: the file cannot be read, fits no toolkit, or holds a value that a recipe
            cannot have; with the foreign file, line and key.
    """
    foreign = read_foreign(path, processes)
    theirs = toolkit_of(foreign, toolkit)
    set_stage(foreign, theirs, stage)
    draft = translate(foreign, theirs)
    comment = f"# From {foreign.file} of {theirs.title}, by `alignkit recipes import`.\n"
    text = comment + write_values(draft.values)
    _check(text, draft, foreign)
    return Imported(
        theirs.title,
        foreign.stage,
        text,
        tuple(draft.translated),
        tuple(foreign.lost),
        tuple(foreign.different),
        tuple(draft.off),
        tuple(dict.fromkeys(foreign.first)),
        tuple(dict.fromkeys(foreign.missing)),
    )


def _check(text: str, draft: Draft, foreign: Foreign) -> None:
    """Read the recipe as alignkit will; errors name the foreign file, line and key."""
    values = read_values(text, foreign.file).values
    places = {(): foreign.file, **draft.places}
    document = Document(copy.deepcopy(values), places, foreign.file, (Path.cwd(),))
    resolve_recipe(document, pending=foreign.pending)
    if values != draft.values:
        raise AssertionError("a recipe must read as it was written")
