"""Command lines of TRL in a text or shell file -> its arguments, each with its line."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from alignkit.errors import AlignkitError, RecipeError
from alignkit.recipe.reading.yaml_values import read_values

_ASSIGNED = re.compile(r"^(?:export\s+)?([A-Za-z_]\w*)=(\S*|\"[^\"]*\"|'[^']*')\s*$")
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_PROCESSES = ("--num_processes", "--nproc_per_node")
_JOINTS = ("&&", "||", ";", "|", "&")
SCRIPTS = ("sft", "dpo", "kto", "reward", "reward_modeling", "grpo", "rloo", "cpo", "orpo")
"""Commands of `trl`, and names of its scripts."""


@dataclass
class CommandLine:
    """One command line.

    Args:
        script: what it calls, one of `SCRIPTS`.
        values: argument -> value.
        lines: argument -> line number.
        processes: that its launcher starts; None if it does not say.
        others: further commands of TRL in the same text, which are not read, as `file:line: words`.
    """

    script: str
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    processes: int | None = None
    others: list[str] = field(default_factory=list)


def find_command(text: str, name: str) -> CommandLine | None:
    """The first command line of TRL in a text.

    Args:
        text: of a shell script, or only the command.
        name: of the file, for messages.

    Returns:
        The command; None if there is none.

    Raises:
        RecipeError: a quote is not closed, or a shell variable has no value in the file.
    """
    found = [
        (words, at)
        for line in _commands(text, name)
        for words in _parts(line)
        if (at := next((n for n in range(len(words)) if _script(words, n)), None)) is not None
    ]
    if not found:
        return None
    command = _arguments(*found[0], name)
    command.others = [f"{name}:{words[at][1]}: {words[at][0]}" for words, at in found[1:]]
    return command


def _parts(words: list[tuple[str, int]]) -> list[list[tuple[str, int]]]:
    """The commands that a line of a shell joins."""
    parts: list[list[tuple[str, int]]] = [[]]
    for word, line in words:
        if word in _JOINTS:
            parts.append([])
        else:
            parts[-1].append((word, line))
    return parts


def _commands(text: str, name: str) -> list[list[tuple[str, int]]]:
    """Words of each command with their lines; a backslash at the end goes on with the next line."""
    commands: list[list[tuple[str, int]]] = []
    variables: dict[str, str] = {}
    goes_on = False
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip().rstrip("\\").strip()
        assigned = _ASSIGNED.match(stripped)
        if assigned and not goes_on:
            value = assigned[2].strip("\"'")
            literal = assigned[2].startswith("'")
            variables[assigned[1]] = value if literal else _filled(value, variables)
            continue
        try:
            words = [(word, number) for word in shlex.split(stripped, comments=True)]
        except ValueError:
            if "--" not in stripped:  # words of a person, with an apostrophe
                continue
            problem = AlignkitError(
                f"{name}:{number}: a quote is not closed", hint="close it on the same line"
            )
            raise RecipeError([problem]) from None
        filled = [(_filled(word, variables), line) for word, line in words]
        if goes_on and commands:
            commands[-1] += filled
        else:
            commands.append(filled)
        goes_on = line.rstrip().endswith("\\")
    return commands


def _filled(word: str, variables: dict[str, str]) -> str:
    return _VARIABLE.sub(lambda match: variables.get(match[1] or match[2], match[0]), word)


def _script(words: list[tuple[str, int]], at: int) -> str:
    """The script that a word calls; empty if it calls none."""
    word, before = words[at][0], words[at - 1][0] if at else ""
    if word in SCRIPTS and PurePath(before).name == "trl":
        return word
    module = word.rpartition(".")[2]
    if before == "-m" and module in SCRIPTS:
        return module
    path = PurePath(word)
    known = path.stem in SCRIPTS or re.fullmatch(rf"({'|'.join(SCRIPTS)})_\w+", path.stem)
    return path.stem if path.suffix == ".py" and known and not word.startswith("-") else ""


def _arguments(words: list[tuple[str, int]], at: int, name: str) -> CommandLine:
    stem = _script(words, at)
    script = stem if stem in SCRIPTS else next(one for one in SCRIPTS if stem.startswith(one))
    command = CommandLine(script, processes=_processes([word for word, _ in words[:at]]))
    key = ""
    given: dict[str, list[str]] = {}
    for word, line in words[at + 1 :]:
        if word in (">", ">>", "2>&1"):
            break
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")
            given[key] = [value] if equals else []
            command.lines[key] = line
        elif key:
            given[key].append(word)
    for key, values in given.items():
        _require_value(values, f"{name}:{command.lines[key]}: --{key}")
        read = [_plain(value) for value in values]
        if not read and key.startswith("no_"):
            key, read = key.removeprefix("no_"), [False]
            command.lines[key] = command.lines.pop(f"no_{key}")
        command.values[key] = True if not read else read[0] if len(read) == 1 else read
    return command


def _require_value(values: list[str], where: str) -> None:
    unset = [match[0] for value in values for match in _VARIABLE.finditer(value)]
    if unset:
        problem = AlignkitError(
            f"{where} holds {unset[0]}, which the file does not set",
            hint="write its value in place of it",
        )
        raise RecipeError([problem])


def _plain(value: str) -> Any:
    """A word as YAML reads it, if that is a number, true, false or a mapping; else the text."""
    try:
        read = read_values(value, "command line").values
    except RecipeError:
        return value
    unread = read is None and value != "null"  # null is a value; an empty text is one too
    return value if unread or isinstance(read, list) else read


def _processes(launcher: list[str]) -> int | None:
    """How many processes a launcher starts, by its own arguments: those of all its nodes."""
    given: dict[str, str] = {}
    for at, word in enumerate(launcher):
        option, equals, value = word.partition("=")
        value = value if equals else "".join(launcher[at + 1 : at + 2])
        given[option.replace("-", "_").replace("__", "--", 1)] = value
    count = next((given[option] for option in _PROCESSES if option in given), "")
    nodes = given.get("--nnodes", "1") if "--nproc_per_node" in given else "1"
    whole = all(re.fullmatch("[0-9]+", value) for value in (count, nodes))
    return int(count) * int(nodes) if whole else None
