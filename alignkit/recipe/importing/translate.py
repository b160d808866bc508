"""The values of a foreign file and its toolkit's table -> the values of a recipe."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit.errors import AlignkitError, RecipeError
from alignkit.recipe.importing.commands import SCRIPTS
from alignkit.recipe.importing.fields import (
    Field,
    Foreign,
    Rule,
    Settings,
    Toolkit,
    Translated,
    show,
)
from alignkit.recipe.importing.optimizing import ENDS
from alignkit.recipe.importing.sampling import in_rollouts
from alignkit.recipe.reading.yaml_values import KeyPath
from alignkit.recipe.stages.base import Recipe
from alignkit.recipe.stages.registry import find_stage

_UNKNOWN = "not a key that alignkit knows of; look whether it is a typo"


@dataclass
class Draft:
    """The values of a recipe before they are checked.

    Args:
        values: nested, in the order of a recipe.
        places: key of the recipe -> the foreign place and key that it comes from.
        translated: foreign keys that have become keys of the recipe.
        off: foreign keys that are off, or say what is so here anyway.
    """

    values: Settings = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)
    translated: list[Translated] = field(default_factory=list)
    off: list[str] = field(default_factory=list)


def set_stage(foreign: Foreign, toolkit: Toolkit, wanted: str | None) -> None:
    """Find the stage of a file, and with it the toolkit's defaults.

    Args:
        foreign: gets both.
        toolkit: the file's.
        wanted: the stage, or TRL's name of a command, if the user says so.

    Raises:
        RecipeError: nobody says the stage, or two say different ones.
    """
    said = toolkit.stage_of(foreign)
    if said is None and wanted is not None:
        foreign.script = wanted
        said = toolkit.stage_of(foreign)
    hint = f"--stage is one of {', '.join(SCRIPTS)}"
    if said is None:
        rule = f"does not say which of {toolkit.title}'s trainers reads it"
        if wanted is not None:
            rule = f"{toolkit.title} has no stage {wanted} that alignkit imports"
        raise RecipeError([AlignkitError(f"{foreign.file}: {rule}", hint=hint)])
    if wanted not in (None, said, foreign.script):
        rule = f"is for the stage {said}, not {wanted}"
        raise RecipeError([AlignkitError(f"{foreign.file}: {rule}", hint="leave out --stage")])
    foreign.stage = said
    foreign.defaults = toolkit.defaults(foreign)


def translate(foreign: Foreign, toolkit: Toolkit) -> Draft:
    """Apply a toolkit's table to the values of a file.

    Args:
        foreign: with its stage; gets notes of what has no counterpart or is done differently.
        toolkit: the file's.

    Returns:
        The recipe's values: what the file says, and the toolkit's defaults that differ from
        alignkit's.

    Raises:
        RecipeError: a value cannot be read, or the file names no model, rows or reward.
    """
    draft = Draft()
    foreign.values = _without_nulls(foreign, draft)
    recipe = find_stage(foreign.stage)
    settings: Settings = {"stage": foreign.stage, "output": f"runs/{Path(foreign.file).stem}"}
    everything = toolkit.trains_all(foreign)
    rules = _rules(toolkit, foreign.stage)
    for rule, rows in rules.items():
        given = [row for row in rows if row.key in foreign]
        if everything and all(_of_adapter(ours) for ours in rule.ours) and rule.ours:
            for row in given:
                foreign.lose(row.key, "all weights are trained: there is no adapter")
            continue
        key = (given or rows)[0].key
        made = in_rollouts(foreign, key, rule.run(foreign, key), settings)
        for row in given:
            _note(foreign, draft, row, made, alone=len(given) == 1)
        for ours, value in made.items():
            by = next((row.key for row in given if ours in row.ours), None)
            if by is None and value == default_of(recipe, ours):
                continue
            if by is None:
                foreign.differ("", f"{ours}: {_plain(value)}, their default")
            settings[ours] = value
            where = foreign.place(by) if by else f"{foreign.file}: their default"
            draft.places[tuple(ours.split("."))] = where
    if foreign.stage == "reward":
        _center(foreign, settings)
    _ending(foreign, draft, settings)
    _rest(foreign, draft, toolkit, rules)
    _require(foreign, toolkit, recipe, settings)
    for says in toolkit.always:
        foreign.differ("", says)
    draft.values = _nested(settings, recipe)
    return draft


def _without_nulls(foreign: Foreign, draft: Draft) -> dict[str, Any]:
    for key in [key for key, value in foreign.values.items() if value is None]:
        usual = foreign.defaults.get(key)
        if usual is None:
            draft.off.append(key)
        else:
            foreign.differ(key, f"null; {_plain(usual)} is taken, which is their default")
    return {key: value for key, value in foreign.values.items() if value is not None}


def _rules(toolkit: Toolkit, stage: str) -> dict[Rule, list[Field]]:
    """Rule -> its rows, in the order of the table."""
    rules: dict[Rule, list[Field]] = {}
    for row in toolkit.table:
        if row.rule is not None and (not row.stages or stage in row.stages):
            rules.setdefault(row.rule, []).append(row)
    return rules


def _of_adapter(ours: str) -> bool:
    return ours.startswith("adapter.") and ours != "adapter.kind"


def _note(foreign: Foreign, draft: Draft, row: Field, made: Settings, *, alone: bool) -> None:
    """What became of a key of the file that has a rule; a switch that is off beside others has not
    made what they have made."""
    off = foreign.values[row.key] is False and row.example is True and not alone
    if made and not off:
        lost = any(entry.key == row.key for entry in foreign.lost)
        if not lost:
            shown = show(row.key, foreign.values[row.key])
            own = {ours: value for ours, value in made.items() if ours in row.ours}
            draft.translated.append(Translated(row.key, shown, own or made))
        if row.says and not row.quiet:
            foreign.differ(row.key, row.says)
    elif row.key not in foreign.handled:
        draft.off.append(row.key)


def _center(foreign: Foreign, settings: Settings) -> None:
    """Reward models of the others are not centred unless a file says so."""
    if "objective.center" not in settings:
        settings["objective.center"] = 0.0
        foreign.differ("", "objective.center: 0, their default")


def _ending(foreign: Foreign, draft: Draft, settings: Settings) -> None:
    """What ends a run early, or keeps its best weights, needs evaluations."""
    held_out = "data.eval" in settings or "data.eval_fraction" in settings
    if held_out and "training.eval_every" in settings:
        return
    for ours in ENDS:
        if settings.pop(ours, None) is None:
            continue
        for row in [one for one in draft.translated if ours in one.settings]:
            draft.translated.remove(row)
            foreign.lose(row.key, "needs held-out rows and eval_steps")


def _rest(foreign: Foreign, draft: Draft, toolkit: Toolkit, rules: dict[Rule, list[Field]]) -> None:
    """Keys of the file that no rule has read."""
    read = {row.key for rows in rules.values() for row in rows}
    known = {row.key: row for row in reversed(toolkit.table) if row.rule is None}
    elsewhere = {row.key for row in toolkit.table}
    for key, value in foreign.values.items():
        if key in read:
            continue
        row = known.get(key)
        if row is not None:
            if value in row.fine or (_is_off(value) and True not in row.fine):
                draft.off.append(key)
            else:
                foreign.lose(key, row.says)
        elif key in elsewhere and _is_off(value):
            draft.off.append(key)
        elif key in elsewhere:
            foreign.lose(key, f"means nothing in {foreign.stage}")
        else:
            near = difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.75)
            foreign.lose(key, f"{_UNKNOWN}{f' of {near[0]}' if near else ''}")


def _is_off(value: Any) -> bool:
    return value in (False, "", 0) or value in ([], {}) or str(value).lower() in _OFF


_OFF = ("no", "none", "false", "off")


def _require(foreign: Foreign, toolkit: Toolkit, recipe: type[Recipe], settings: Settings) -> None:
    """The file must name what a recipe cannot do without."""
    problems = []
    for ours, theirs in toolkit.needed.items():
        wanted = ours != "reward" or "reward" in recipe.model_fields
        if wanted and ours not in settings:
            what = {"model.base": "model", "data.train": "rows"}.get(ours, "reward")
            problem = f"{foreign.file}: names no {what}: {theirs} is missing"
            problems.append(AlignkitError(problem, hint=f"add {theirs}, or write {ours} by hand"))
    if problems:
        raise RecipeError(problems)


def default_of(recipe: type[Recipe], ours: str) -> Any:
    """The value that a recipe has if it does not set a key; None if that cannot be said.

    Args:
        recipe: class of the stage.
        ours: the key, as in `training.epochs`.
    """
    first, *rest = ours.split(".")
    section = recipe.model_fields[first]
    value: Any = None if section.is_required() else section.default
    if value is None and rest and isinstance(section.annotation, type):
        fields = getattr(section.annotation, "model_fields", {})
        return fields[rest[0]].default if rest[0] in fields else None
    spelled = getattr(value, "spelled_out", None)
    value = spelled() if spelled else value
    for part in rest:
        value = getattr(value, part, None)
    return list(value) if isinstance(value, tuple) else value


def _plain(value: Any) -> str:
    return "null" if value is None else show("", value)


def _nested(settings: Settings, recipe: type[Recipe]) -> Settings:
    """The values as sections, in the order of the schema."""
    values: Settings = {}
    for first in recipe.model_fields:
        for ours in _ordered(settings, first):
            *parents, last = ours.split(".")
            here = values
            for part in parents:
                here = here.setdefault(part, {})
            here[last] = settings[ours]
    return values


def _ordered(settings: Settings, first: str) -> Iterable[str]:
    """Keys of a section; what selects its kind comes first."""
    keys = [ours for ours in settings if ours.split(".")[0] == first]
    return sorted(keys, key=lambda ours: not ours.endswith(".kind"))
