"""The types that tables of foreign keys are made of, and the values of one foreign file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from alignkit.errors import AlignkitError, RecipeError
from alignkit.recipe.addresses import hide_secrets
from alignkit.recipe.reading.yaml_values import KeyPath

Settings = dict[str, Any]
"""Key of a recipe, as in `training.epochs` -> its value."""

_SECRET = re.compile(r"token$|api_?key|secret|password|webhook", re.IGNORECASE)
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True, eq=False)
class Rule:
    """How one or more foreign keys become keys of a recipe.

    Rows of a table that share a rule are read together, as the parts of a batch size are.

    Args:
        ours: the keys that it may set, as documentation shows them.
        run: the values of the file and the key of the row -> settings; none where nothing is left
            to set.
    """

    ours: tuple[str, ...]
    run: Callable[[Foreign, str], Settings]


@dataclass(frozen=True)
class Field:
    """One row of a toolkit's table: a foreign key.

    Args:
        key: theirs; a dot stands for a mapping in another.
        rule: how it is translated; None if there is no counterpart.
        says: what is done differently here, or why there is no counterpart, in a few words.
        gives: those keys of the rule that this one decides; empty for all.
        quiet: `says` only explains; nothing is done differently.
        example: a value that has an effect; tests try every row with it.
        beside: further keys that the example needs.
        stages: the recipe's stages in which the key means something; empty for all.
        fine: values of a key without counterpart that lose nothing.
    """

    key: str
    rule: Rule | None
    says: str = ""
    example: Any = True
    beside: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[str, ...] = ()
    fine: tuple[Any, ...] = ()
    gives: tuple[str, ...] = ()
    quiet: bool = False

    @property
    def ours(self) -> tuple[str, ...]:
        """The keys of a recipe that it may set."""
        return self.gives or (self.rule.ours if self.rule else ())


@dataclass(frozen=True)
class Toolkit:
    """What is known of one toolkit.

    Args:
        name: as `--from` has it.
        title: as sentences have it.
        table: its keys.
        defaults: of a file whose stage is known: foreign key -> the value if it is left out.
        stage_of: the stage of a file, or None if the file does not say.
        trains_all: whether all weights are trained.
        always: what is done differently whatever the file says.
        needed: key of a recipe -> the foreign keys that could name it.
        nested: foreign keys whose mappings are read as keys of their own.
    """

    name: str
    title: str
    table: tuple[Field, ...]
    defaults: Callable[[Foreign], Settings]
    stage_of: Callable[[Foreign], str | None]
    trains_all: Callable[[Foreign], bool]
    always: tuple[str, ...]
    needed: Mapping[str, str]
    nested: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lost:
    """A foreign key without counterpart: its value as shown, and the reason."""

    key: str
    value: str
    reason: str


@dataclass(frozen=True)
class Translated:
    """A foreign key with its value as shown, and what it became."""

    key: str
    value: str
    settings: Settings


@dataclass(frozen=True)
class Different:
    """What is done differently here; `key` is the foreign key, or empty."""

    key: str
    says: str


@dataclass
class Foreign:
    """The values of a foreign file, and what reading them has brought up.

    Args:
        file: as shown in messages.
        folders: where relative paths are looked for.
        values: foreign key -> value; a key whose value is null is left out.
        places: foreign key -> `file:line`.
        processes: that share a step; None if nobody said.
        script: name of the command or script that a command line calls; else empty.
        stage: of the recipe.
        defaults: foreign key -> value where the file has none.
        lost: keys without counterpart.
        different: what is done differently.
        first: commands to run before the recipe can run.
        missing: named files and folders that were not found.
        pending: keys of the recipe whose files do not exist yet.
        handled: keys of which something was said.
        sources: `train` and `eval` -> the sources read so far.
    """

    file: str
    folders: tuple[Path, ...]
    values: dict[str, Any]
    places: dict[str, str]
    processes: int | None = None
    script: str = ""
    stage: str = ""
    defaults: Settings = field(default_factory=dict)
    lost: list[Lost] = field(default_factory=list)
    different: list[Different] = field(default_factory=list)
    first: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    pending: list[KeyPath] = field(default_factory=list)
    handled: set[str] = field(default_factory=set)
    sources: dict[str, list[Settings]] = field(default_factory=lambda: {"train": [], "eval": []})

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def get(self, key: str) -> Any:
        """The file's value, else the toolkit's default, else None."""
        return self.values.get(key, self.defaults.get(key))

    def place(self, key: str) -> str:
        """Where the key stands, for a message."""
        return f"{self.places.get(key, self.file)}: {key}"

    def wrong(self, key: str, rule: str, hint: str = "") -> NoReturn:
        """Refuse a value of the file.

        Raises:
            RecipeError: always.
        """
        shown = show(key, self.get(key))
        problem = AlignkitError(f"{self.place(key)} {rule}, got {shown}", hint=hint)
        raise RecipeError([problem])

    def whole(self, key: str) -> int:
        """A whole number; text and floats that are one count.

        Raises:
            RecipeError: it is none.
        """
        value = self.number(key)
        if not isinstance(value, int):
            self.wrong(key, "must be a whole number")
        return value

    def number(self, key: str) -> float:
        """A number; text that is one counts.

        Raises:
            RecipeError: it is none.
        """
        value = self.get(key)
        try:
            number = float(value)
            if isinstance(value, bool) or number - number != 0:  # infinite, or not a number
                raise ValueError
        except (TypeError, ValueError):
            self.wrong(key, "must be a number")
        return int(number) if number == int(number) else number

    def flag(self, key: str) -> bool:
        """True or false, however YAML or a command line spells it; false if there is no value.

        Raises:
            RecipeError: it is neither.
        """
        text = str(self.get(key) or False).lower()
        if text not in (*_TRUE, *_FALSE):
            self.wrong(key, "must be true or false")
        return text in _TRUE

    def text(self, key: str) -> str:
        """Text; empty if there is no value.

        Raises:
            RecipeError: it is a mapping or a list.
        """
        value = self.get(key)
        if isinstance(value, dict | list):
            self.wrong(key, "must be text")
        return "" if value is None else str(value)

    def names(self, key: str) -> list[str]:
        """A list of texts, or one text with commas.

        Raises:
            RecipeError: it is neither.
        """
        value = self.get(key)
        parts = value if isinstance(value, list) else self.text(key).split(",")
        if any(isinstance(part, dict | list) for part in parts):
            self.wrong(key, "must be a list of names")
        return [str(part).strip() for part in parts if str(part).strip()]

    def lose(self, key: str, reason: str) -> None:
        """Note that a key of the file has no counterpart; nothing if the file has no such key."""
        self.handled.add(key)
        if key in self.values:
            self.lost.append(Lost(key, show(key, self.values[key]), reason))

    def differ(self, key: str, says: str) -> None:
        """Note what is done differently here."""
        self.handled.add(key)
        if Different(key, says) not in self.different:
            self.different.append(Different(key, says))


def show(key: str, value: Any) -> str:
    """A foreign value in one short line; a secret is not shown."""
    if _SECRET.search(key):
        return "(hidden)"
    if isinstance(value, dict):
        return "{" + ", ".join(map(str, value)) + "}"
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        return f"{len(value)} item{'s' * (len(value) > 1)}"
    if isinstance(value, list):
        return "[" + _shortened(", ".join(show("", part) for part in value)) + "]"
    words = {"None": "null", "True": "true", "False": "false"}
    return _shortened(hide_secrets(words.get(str(value), str(value)).replace("\n", " ")))


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
