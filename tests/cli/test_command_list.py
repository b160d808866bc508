"""The list of commands: each line in it belongs to a command that says the same of itself."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from commandline import CommandLine

from alignkit.cli.commands import COMMANDS, STAGES, load_command


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_says_what_the_command_says(name: str) -> None:
    command = load_command(name)
    assert command.name == name
    if command.callback is None:  # a group: its commands are its own
        assert command.commands
    else:
        assert inspect.getdoc(command.callback) == COMMANDS[name][1]


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_takes_a_recipe(name: str) -> None:
    assert [option.name for option in load_command(name).params][:3] == [
        "recipe",
        "overrides",
        "resume",
    ]


def test_a_misspelt_command(alignkit: CommandLine, tmp_path: Path) -> None:
    done = alignkit("sftt", "recipe.yaml", cwd=tmp_path, COLUMNS="160")
    assert (done.code, done.stdout) == (2, "")
    assert "No such command 'sftt'. Did you mean 'sft'" in done.stderr


def test_the_shell_completes_what_is_imported_later(alignkit: CommandLine, tmp_path: Path) -> None:
    def complete(words: str, count: int) -> str:
        shell = {"COMP_WORDS": words, "COMP_CWORD": str(count)}
        return alignkit(cwd=tmp_path, _ALIGNKIT_COMPLETE="complete_bash", **shell).stdout

    assert complete("alignkit re", 1).split() == ["reward", "report", "recipes"]
    assert complete("alignkit data la", 2).split() == ["label"]
    assert complete("alignkit sft --res", 2).split() == ["--resume"]
