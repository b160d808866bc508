"""YAML text -> plain values, each with the place where it was written.

Time and memory are bounded, whatever the text is, and no tag makes anything but plain values.
Numbers and booleans are those of YAML 1.2, so that `yes`, `1:30` and dates stay text; a number that
the two versions of YAML read differently is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from alignkit.errors import AlignkitError, RecipeError
from alignkit.recipe.assets import show_file

KeyPath = tuple[str | int, ...]

LARGEST = 1_000_000
"""Bytes of a file; the longest shipped recipe has a thousandth."""
MOST = 20_000
"""Keys and values of a text, those that aliases repeat included."""
DEEPEST = 40
"""Levels of mappings and lists in each other."""
LONGEST_NUMBER = 100
"""Characters."""

_TAG = "tag:yaml.org,2002:"
_OCTAL = "leading zero"
_PATTERNS = {
    _OCTAL: r"[-+]?0[0-9_]+",
    "int": r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)|0x[0-9a-fA-F]+",
    "float": r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "null": r"~|null|Null|NULL|",
}
"""Tag -> what a plain scalar looks like that has it; the first that fits counts."""

_HINT = "check the indentation, the quotes and the brackets on that line and the one before"


class _RefusedError(yaml.MarkedYAMLError):
    """A text that is YAML, but not what is read here."""

    def __init__(self, node: Any, rule: str, hint: str) -> None:
        super().__init__(problem=rule, problem_mark=node.start_mark)
        self.hint = hint


class _Loader(yaml.SafeLoader):
    """Composes nodes, as long as there are not too many."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.nodes = self.level = 0

    def compose_node(self: Any, parent: Any, index: Any) -> Any:
        """One node with all in it."""
        self.nodes += 1
        self.level += 1
        _require_small(self.nodes, self.level, self.peek_event())
        node = super().compose_node(parent, index)
        self.level -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read as text, too."""


_Loader.yaml_implicit_resolvers = {}
for _name, _pattern in _PATTERNS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"(?:{_pattern})\\Z"), None)


def _require_small(values: int, levels: int, here: Any) -> None:
    if levels > DEEPEST:
        hint = "a recipe has four levels; an alias must not stand inside its own anchor"
        raise _RefusedError(here, f"is nested more than {DEEPEST} levels deep", hint)
    if values > MOST:
        rule = f"holds more than {MOST:,} keys and values, what aliases repeat included"
        raise _RefusedError(here, rule, "a recipe has about thirty; is this another file?")


@dataclass
class YamlValues:
    """What a text holds.

    Args:
        values: nested mappings, lists and scalars; None for an empty text.
        places: key path -> `file:line`.
        problems: keys that are written twice.
    """

    values: Any = None
    places: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[AlignkitError] = field(default_factory=list)


def show_path(path: KeyPath) -> str:
    """`("data", "train", 0, "path")` as `data.train[0].path`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def read_text(path: Path) -> str:
    """The text of a file that a person writes.

    Raises:
        RecipeError: it cannot be read, is larger than `LARGEST`, or is not UTF-8.
    """
    name = show_file(path)
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            rule, hint = f"is larger than {LARGEST:,} bytes", "is this another file?"
            raise RecipeError([AlignkitError(f"{name}: {rule}", hint=hint)])
        return content.decode()
    except UnicodeDecodeError as error:
        rule, hint = f"is not UTF-8 text ({error.reason})", "save the file as UTF-8"
    except OSError as error:
        rule, hint = f"cannot be read: {error.strerror}", "check its name and its permissions"
    raise RecipeError([AlignkitError(f"{name}: {rule}", hint=hint)])


def read_values(text: str, name: str, root: KeyPath = ()) -> YamlValues:
    """The values in a text.

    Args:
        text: YAML.
        name: of the file, or `command line`.
        root: key path of the whole.

    Raises:
        RecipeError: it is not YAML, or passes a limit of this module.
    """
    read = YamlValues()
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            read.values = _Builder(name, read).build(node, root)
    except yaml.YAMLError as error:
        line, rule = _problem(error, text)
        refused = isinstance(error, _RefusedError)
        rule = rule if refused else f"is not valid YAML: {rule}"
        hint = getattr(error, "hint", _HINT)
        raise RecipeError([AlignkitError(f"{name}:{line}: {rule}", hint=hint)]) from None
    return read


def write_values(values: Any) -> str:
    """Plain values as YAML, which `read_values` reads as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _problem(error: yaml.YAMLError, text: str) -> tuple[int, str]:
    """Line and rule of a YAML error."""
    if isinstance(error, yaml.reader.ReaderError):
        return text[: error.position].count("\n") + 1, str(error.reason)
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    return (mark.line + 1 if mark else 1), str(getattr(error, "problem", error))


class _Builder:
    """Makes plain values of nodes; an alias is built again wherever it stands."""

    def __init__(self, name: str, read: YamlValues) -> None:
        self.name, self.read = name, read
        self.count = self.level = 0

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        """The value of one node; its keys and items are noted with their places."""
        self.count += 1
        self.level += 1
        _require_small(self.count, self.level, node)
        value = self._value(node, path)
        self.level -= 1
        return value

    def _value(self, node: yaml.Node, path: KeyPath) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node, kind)
        if kind != ("map" if isinstance(node, yaml.MappingNode) else "seq"):
            raise _unknown_tag(node)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        items = []
        for index, child in enumerate(node.value):
            self.read.places[*path, index] = self._place(child)
            items.append(self.build(child, (*path, index)))
        return items

    def _mapping(self, node: yaml.Node, path: KeyPath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _RefusedError(key_node, "has a key that is not text", "write key: value")
            key = _clean(key_node)
            here, place = (*path, key), self._place(key_node)
            if key in mapping:
                first = self.read.places[here].rsplit(":", 1)[-1]
                rule = f"{show_path(here)} is written twice, first on line {first}"
                hint = "keep one of the two; YAML would silently use the last"
                self.read.problems.append(AlignkitError(f"{place}: {rule}", hint=hint))
            self.read.places[here] = place
            mapping[key] = self.build(value_node, here)
        return mapping

    def _place(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}"


def _scalar(node: yaml.Node, kind: str) -> Any:
    text = _clean(node)
    if kind == "str":
        return text
    if kind == _OCTAL:
        rule = f"{_shortened(text)} starts with a zero, which some programs read as octal"
        raise _RefusedError(node, rule, "write the number without it, or quote it if it is text")
    if kind not in _PATTERNS:
        raise _unknown_tag(node)
    if not re.fullmatch(_PATTERNS[kind], text):
        hint = f"remove the tag !!{kind}"
        raise _RefusedError(node, f"{_shortened(text)} is not a value of !!{kind}", hint)
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if len(text) > LONGEST_NUMBER:
        rule = f"{_shortened(text)} is a number of {len(text):,} characters"
        raise _RefusedError(node, rule, "write it as in 1e6, or quote it if it is text")
    if kind == "float":
        return float(re.sub(r"\.(?=[iInN])", "", text))
    return int(text, 16) if "x" in text else int(text)


def _clean(node: yaml.Node) -> str:
    """A scalar's text, which can be a file name and can be written as UTF-8."""
    text = str(node.value)
    odd = next((char for char in text if char == "\0" or "\ud800" <= char <= "\udfff"), None)
    if odd is not None:
        what = "the character NUL" if odd == "\0" else f"half a character ({odd!r})"
        raise _RefusedError(node, f"holds {what}", "remove it, or write the whole character")
    return text


def _unknown_tag(node: yaml.Node) -> _RefusedError:
    tag = node.tag.replace(_TAG, "!!")
    rule = f"the tag {_shortened(tag)} has no use here"
    return _RefusedError(node, rule, "write the value without a tag")


def _shortened(text: str) -> str:
    return repr(text) if len(text) <= 40 else f"{text[:37]!r}..."
