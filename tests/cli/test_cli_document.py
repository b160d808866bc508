"""docs/cli.md: its list of commands is the program's own.

    python tests/cli/test_cli_document.py --write

writes it anew after a change of commands, options or help.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

from alignkit.cli.commands import COMMANDS, STAGES, load_command

DOCUMENT = Path(__file__).parents[2] / "docs" / "cli.md"
START, END = "<!-- commands: start -->", "<!-- commands: end -->"


def test_the_document_shows_every_command() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text == with_commands(text), "python tests/cli/test_cli_document.py --write"


def with_commands(text: str) -> str:
    """The document with the commands of today between its marks."""
    head, _, rest = text.partition(START)
    written = "\n\n".join(commands_text())
    return f"{head}{START}\n\n{written}\n\n{END}{rest.partition(END)[2]}"


def commands_text() -> Iterator[str]:
    """Markdown of all commands; the stages have one command in common."""
    first, *others = STAGES
    names = ", ".join(f"`{name}`" for name in others)
    for name in (first, *COMMANDS):
        command = load_command(name)
        inner = getattr(command, "commands", None)
        if inner is None:
            yield from command_text(f"alignkit {name}", command)
        else:
            yield f"## alignkit {name}"
            yield command.help
            for part in inner.values():
                yield from command_text(f"alignkit {name} {part.name}", part, level=3)
        if name == first:
            yield f"{names} take the same arguments and options:"
            yield "\n".join(f"- `alignkit {stage}`: {STAGES[stage]}" for stage in others)


def command_text(title: str, command: Any, level: int = 2) -> Iterator[str]:
    """Markdown of one command."""
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option" and not one.hidden]
    types = get_type_hints(command.callback)
    needed = [option_name(one.opts[0], one, types) for one in options if one.required]
    further = ["[OPTIONS]"] if len(options) > len(needed) else []
    yield f"{'#' * level} {title}"
    yield command.help
    yield "```\n" + " ".join([title, *map(usage, arguments), *needed, *further]) + "\n```"
    if arguments:
        rows = [f"| `{argument_name(one)}` | {one.help} |" for one in arguments]
        yield "\n".join(["| argument | |", "|---|---|", *rows])
    if options:
        rows = [
            f"| {option_names(one, types)} | {default_of(one)} | {one.help} |"
            for one in sorted(options, key=lambda one: not one.required)
        ]
        yield "\n".join(["| option | default | |", "|---|---|---|", *rows])


def argument_name(argument: Any) -> str:
    """As `--help` shows it."""
    name = str(argument.metavar or argument.name.upper()).rstrip(".")
    return f"{name}..." if argument.nargs == -1 else name


def usage(argument: Any) -> str:
    name = argument_name(argument)
    return name if argument.required else f"[{name}]"


VALUES = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
"""Type of an option -> what stands for its value."""


def option_names(option: Any, types: dict[str, Any]) -> str:
    return ", ".join(f"`{option_name(name, option, types)}`" for name in option.opts)


def option_name(name: str, option: Any, types: dict[str, Any]) -> str:
    """A name of an option with what stands for its value."""
    if option.is_flag:
        return name
    return f"{name} {option.metavar or VALUES[one_value(types[option.name])]}"


def one_value(annotation: Any) -> type:
    """Type of one value: of an element of a list, and without None."""
    while inner := get_args(annotation):
        annotation = next(part for part in inner if part is not type(None))
    return cast(type, annotation)


def default_of(option: Any) -> str:
    if option.required:
        return "required"
    return "" if option.is_flag or option.default is None else f"`{option.default}`"


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    DOCUMENT.write_text(with_commands(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
