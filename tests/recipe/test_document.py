"""YAML with places: what a scalar means, what `extends` and overrides merge, whose line wins."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest

from alignkit.errors import RecipeError
from alignkit.recipe.reading.document import Document, apply_overrides, read_document
from alignkit.recipe.reading.yaml_values import read_text, show_path, write_values


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # names in messages are relative to the working folder


def read(text: str, name: str = "r.yaml") -> Document:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    return read_document(Path(name))


def errors(text: str, name: str = "r.yaml") -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read(text, name)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # YAML 1.1 would read the first three as text, and `yes`, dates and `on` as something else.
        ("2e-4", 2e-4),
        ("1E5", 1e5),
        ("-3e+2", -300.0),
        ("2.0e-4", 2e-4),
        (".5", 0.5),
        ("5.", 5.0),
        ("-.inf", -math.inf),
        ("16", 16),
        ("-1", -1),
        ("0", 0),
        ("true", True),
        ("False", False),
        ("yes", "yes"),
        ("on", "on"),
        ("no", "no"),
        ("2024-05-01", "2024-05-01"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
        ("'2e-4'", "2e-4"),
        ("null", None),
        ("~", None),
        ("", None),
        ("[1, 2e-4, a]", [1, 2e-4, "a"]),
        ("1:30", "1:30"),  # YAML 1.1: 90
        ("1_000", 1000),
        ("0x1F", 31),
        ("0x_", "0x_"),
        ("0b11", "0b11"),
        ("+5", 5),
        ("00.5", 0.5),
        ("'010'", "010"),
        ("!!int '5'", 5),
        ("!!str 5", "5"),
        ("!!float 1", 1.0),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    found = read(f"key: {text}").values["key"]
    assert found == value
    assert type(found) is type(value)


def test_places_are_lines_of_keys_and_items() -> None:
    document = read("a: 1\n\n# note\nb:\n  c: {d: 2}\n  e:\n    - x\n    - f: 3\n")
    assert document.values == {"a": 1, "b": {"c": {"d": 2}, "e": ["x", {"f": 3}]}}
    lines = {show_path(path): place for path, place in document.places.items() if path}
    assert lines == {
        "a": "r.yaml:1",
        "b": "r.yaml:4",
        "b.c": "r.yaml:5",
        "b.c.d": "r.yaml:5",
        "b.e": "r.yaml:6",
        "b.e[0]": "r.yaml:7",
        "b.e[1]": "r.yaml:8",
        "b.e[1].f": "r.yaml:8",
    }


def test_a_missing_key_stands_where_its_parent_stands() -> None:
    document = read("a: 1\nb:\n  c: 2\n")
    assert document.place(("b", "x", 0, "y")) == "r.yaml:2"
    assert document.place(("z",)) == "r.yaml"


def test_names_are_shown_relative_to_the_working_folder(tmp_path: Path) -> None:
    assert read("a: 1", "sub/r.yaml").place(("a",)) == "sub/r.yaml:1"
    assert read_document(tmp_path / "sub" / "r.yaml").name == "sub/r.yaml"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            "r.yaml: must be a mapping of keys to values, got nothing\n"
            "hint: start from `alignkit recipes copy quickstart/sft.yaml my.yaml`",
        ),
        (
            "- a\n- b",
            "r.yaml: must be a mapping of keys to values, got a single value or a list\n"
            "hint: start from `alignkit recipes copy quickstart/sft.yaml my.yaml`",
        ),
        (
            "a: 1\nb: [1, 2\nc: 3\n",
            "r.yaml:3: is not valid YAML: expected ',' or ']', but got ':'\n"
            "hint: check the indentation, the quotes and the brackets on that line and the one "
            "before",
        ),
        (
            "a: 1\nb: !thing 2\n",
            "r.yaml:2: the tag '!thing' has no use here\nhint: write the value without a tag",
        ),
        (
            "a: 1\nb: \x07\n",
            "r.yaml:2: is not valid YAML: special characters are not allowed\n"
            "hint: check the indentation, the quotes and the brackets on that line and the one "
            "before",
        ),
    ],
    ids=["empty", "list", "bracket", "tag", "control character"],
)
def test_what_is_no_recipe(text: str, message: str) -> None:
    assert errors(text) == [message]


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)
DEEP = "is nested more than 40 levels deep"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("a: !!int four", "1: 'four' is not a value of !!int"),
        ("a: !!int ''", "1: '' is not a value of !!int"),
        ("a: 1\nb: !!float x", "2: 'x' is not a value of !!float"),
        ("a: !!bool maybe", "1: 'maybe' is not a value of !!bool"),
        ("a: !!null x", "1: 'x' is not a value of !!null"),
        ("a: !!timestamp 2020-99-99", "1: the tag '!!timestamp' has no use here"),
        ("a: !!binary AAAA", "1: the tag '!!binary' has no use here"),
        ("a: !!python/object:os.system {b: 1}", "the tag '!!python/object:os.system' has no use"),
        ("a: !!set {b: 1}", "1: the tag '!!set' has no use here"),
        ("a: 010", "1: '010' starts with a zero, which some programs read as octal"),
        ("a: -007", "1: '-007' starts with a zero"),
        (f"a: {'1' * 5000}", "is a number of 5,000 characters"),
        (f"a: 0x{'f' * 5000}", "is a number of 5,002 characters"),
        ("a: &a [*a]", DEEP),
        ("a: &a {b: *a}", DEEP),
        (f"a: {'[' * 3000}", DEEP),
        (f"a: {'[' * 60}{']' * 60}", DEEP),
        (BOMB, "holds more than 20,000 keys and values, what aliases repeat included"),
        ("".join(f"k{n}: 1\n" for n in range(100_000)), "holds more than 20,000 keys"),
        ("? [a, b]\n: 1", "1: has a key that is not text"),
        ('a: "\\0"', "1: holds the character NUL"),
        ('"\\0": 1', "1: holds the character NUL"),
        ('a: "\\ud83d"', "1: holds half a character ('\\ud83d')"),
        ("a: 1\n---\nb: 2", "is not valid YAML: but found another document"),
        (f"# {'x' * 1_000_000}\na: 1", "r.yaml: is larger than 1,000,000 bytes"),
    ],
)
def test_what_is_not_read(text: str, rule: str) -> None:
    started = time.monotonic()
    [problem] = errors(text)
    message, hint = problem.split("\nhint: ")
    assert rule in message
    assert "\n" not in message
    assert hint
    assert time.monotonic() - started < 20  # tens of minutes, and gigabytes, without the limits


@pytest.mark.parametrize("text", ["2e-4", "1e5", "010", "1:30", "yes", "null", "", "0x_", "'", "5"])
def test_what_is_written_is_read_as_it_was(text: str) -> None:
    values = {"text": text, text or "x": [1, 2e-4, 1e-5, -3, True, None, math.inf, "a: b"]}
    assert read(write_values(values)).values == values


def test_a_file_that_cannot_be_read() -> None:
    Path("r.yaml").symlink_to("/proc/self/mem")
    with pytest.raises(RecipeError, match=r"r\.yaml: cannot be read: .*\nhint: check its name"):
        read_text(Path("r.yaml"))


def test_not_utf8() -> None:
    Path("r.yaml").write_bytes("a: Zürich".encode("latin-1"))
    with pytest.raises(RecipeError) as caught:
        read_document(Path("r.yaml"))
    assert str(caught.value) == (
        "r.yaml: is not UTF-8 text (invalid start byte)\nhint: save the file as UTF-8"
    )


def test_every_key_written_twice_is_named() -> None:
    hint = "\nhint: keep one of the two; YAML would silently use the last"
    assert errors("a: 1\nb:\n  c: 1\n  c: 2\n  d: [{e: 1, e: 2}]\na: 3\n") == [
        f"r.yaml:4: b.c is written twice, first on line 3{hint}",
        f"r.yaml:5: b.d[0].e is written twice, first on line 5{hint}",
        f"r.yaml:6: a is written twice, first on line 1{hint}",
    ]


# extends -------------------------------------------------------------------------------------


def test_the_child_wins_key_by_key_and_replaces_lists() -> None:
    read("a: {x: 1, y: 2}\nlist: [1, 2, 3]\nkept: old\n", "base.yaml")
    document = read("extends: base.yaml\na:\n  y: 3\n  z: 4\nlist: [9]\n")
    assert document.values == {"a": {"x": 1, "y": 3, "z": 4}, "list": [9], "kept": "old"}
    assert document.place(("a", "x")) == "base.yaml:1"
    assert document.place(("a", "y")) == "r.yaml:3"
    assert document.place(("a",)) == "r.yaml:2"
    assert document.place(("list", 0)) == "r.yaml:5"
    assert document.place(("list", 1)) == "r.yaml:5"  # the parent's second item is gone
    assert document.place(("kept",)) == "base.yaml:3"


@pytest.mark.parametrize(
    ("child", "merged"),
    [
        ("{kind: full}", {"kind": "full"}),  # rank belongs to lora and must not survive
        ("{kind: lora, alpha: 8}", {"kind": "lora", "rank": 4, "alpha": 8}),
        ("{alpha: 8}", {"kind": "lora", "rank": 4, "alpha": 8}),
        ("null", None),
    ],
)
def test_another_kind_replaces_the_mapping(child: str, merged: Any) -> None:
    read("adapter: {kind: lora, rank: 4}\n", "base.yaml")
    assert read(f"extends: base.yaml\nadapter: {child}\n").values == {"adapter": merged}


def test_extends_is_taken_from_the_files_own_folder_and_goes_on() -> None:
    read("a: 1\nb: 1\nc: 1\n", "shared/root.yaml")
    read("extends: root.yaml\nb: 2\nc: 2\n", "shared/middle.yaml")
    document = read("extends: ../shared/middle.yaml\nc: 3\n", "mine/r.yaml")
    assert document.values == {"a": 1, "b": 2, "c": 3}
    assert document.place(("a",)) == "shared/root.yaml:1"
    assert document.place(("b",)) == "shared/middle.yaml:2"
    assert document.folders[0] == Path("mine").resolve()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"r.yaml": "a: 1\nextends: r.yaml"},
            "r.yaml: extends itself through r.yaml\nhint: remove `extends` from one of the files",
        ),
        (
            {"b.yaml": "extends: r.yaml", "r.yaml": "extends: b.yaml"},
            "r.yaml: extends itself through b.yaml\nhint: remove `extends` from one of the files",
        ),
        (
            {"r.yaml": "a: 1\nextends: gone.yaml"},
            "r.yaml:2: extends 'gone.yaml', which does not exist\n"
            "hint: the name is relative to the file that extends it",
        ),
        (
            {"r.yaml": "extends: [a.yaml, b.yaml]"},
            "r.yaml:1: extends must be a file name, got ['a.yaml', 'b.yaml']\n"
            "hint: a recipe extends one file, as in extends: base.yaml",
        ),
        (
            {"r.yaml": "extends: r0.yaml"}
            | {f"r{n}.yaml": f"extends: r{n + 1}.yaml" for n in range(1500)},
            "r20.yaml: is the last of more than 20 files that extend one another\n"
            "hint: write the keys of some of them into one file",
        ),
        (
            {"r.yaml": f"extends: {'x' * 300}.yaml"},
            f"r.yaml:1: extends '{'x' * 300}.yaml', which does not exist\n"
            "hint: the name is relative to the file that extends it",
        ),
        (
            {"b.yaml": "a: 1\na: 2", "r.yaml": "extends: b.yaml"},
            "b.yaml:2: a is written twice, first on line 1\n"
            "hint: keep one of the two; YAML would silently use the last",
        ),
    ],
    ids=["itself", "cycle", "missing", "list", "chain", "long", "broken parent"],
)
def test_extends_errors(files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        Path(name).write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        read_document(Path("r.yaml"))
    assert str(caught.value) == message


# overrides -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("a=2", {"a": 2, "b": {"c": [1, {"d": 2}]}}),
        ("a=2e-4", {"a": 2e-4, "b": {"c": [1, {"d": 2}]}}),
        ("a=", {"a": None, "b": {"c": [1, {"d": 2}]}}),
        ("a=x=y", {"a": "x=y", "b": {"c": [1, {"d": 2}]}}),
        ("a={x: [1]}", {"a": {"x": [1]}, "b": {"c": [1, {"d": 2}]}}),
        ("b.c=[]", {"a": 1, "b": {"c": []}}),
        ("b.c.0=7", {"a": 1, "b": {"c": [7, {"d": 2}]}}),
        ("b.c.1.d=7", {"a": 1, "b": {"c": [1, {"d": 7}]}}),
        ("b.new.deep=7", {"a": 1, "b": {"c": [1, {"d": 2}], "new": {"deep": 7}}}),
    ],
)
def test_overrides_set_one_value(override: str, values: dict[str, Any]) -> None:
    document = read("a: 1\nb:\n  c: [1, {d: 2}]\n")
    apply_overrides(document, [override])
    assert document.values == values


def test_an_override_stands_on_the_command_line_with_all_it_holds() -> None:
    document = read("a: 1\nb:\n  c: {d: 1}\n")
    apply_overrides(document, ["b={c: {e: 1}}", "a=1", "a=2"])
    assert document.values == {"a": 2, "b": {"c": {"e": 1}}}
    for path in [("a",), ("b",), ("b", "c"), ("b", "c", "e")]:
        assert document.place(path) == "command line"


def test_an_override_wins_over_the_parent() -> None:
    read("a: {x: 1}\n", "base.yaml")
    document = read("extends: base.yaml\n")
    apply_overrides(document, ["a.x=5"])
    assert document.values == {"a": {"x": 5}}


SETTABLE = "\nhint: set a key of a mapping, or an existing list item, as in data.train.0.take=100"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "a",
            "command line: 'a' is not an override\n"
            "hint: write overrides as key.sub=value, for example training.learning_rate=1e-4",
        ),
        (
            "=3",
            "command line: '=3' is not an override\n"
            "hint: write overrides as key.sub=value, for example training.learning_rate=1e-4",
        ),
        (
            "a=[1, 2",
            "command line: the value of a is not YAML: '[1, 2'\n"
            "hint: quote the value for the shell, as in 'data.train=[{path: a.jsonl}]'",
        ),
        (
            "a=!thing 2",
            "command line: a: the tag '!thing' has no use here\n"
            "hint: write the value without a tag",
        ),
        (
            "a=010",
            "command line: a: '010' starts with a zero, which some programs read as octal\n"
            "hint: write the number without it, or quote it if it is text",
        ),
        ("list.².x=1", f"command line: list.².x: there is no list.² to set{SETTABLE}"),
        (
            "a={x: 1, x: 2}",
            "command line:1: a.x is written twice, first on line 1\n"
            "hint: keep one of the two; YAML would silently use the last",
        ),
        ("a.b=1", f"command line: a.b names nothing that can be set{SETTABLE}"),
        ("a.b.c=1", f"command line: a.b.c: there is no a.b to set{SETTABLE}"),
        ("list.2=1", f"command line: list[2] names nothing that can be set{SETTABLE}"),
        ("list.5.x=1", f"command line: list[5].x: there is no list[5] to set{SETTABLE}"),
        ("list.x=1", f"command line: list.x names nothing that can be set{SETTABLE}"),
    ],
)
def test_override_errors(override: str, message: str) -> None:
    document = read("a: 1\nlist: [1, 2]\n")
    with pytest.raises(RecipeError) as caught:
        apply_overrides(document, [override])
    assert str(caught.value) == message


def test_every_broken_override_is_named() -> None:
    with pytest.raises(RecipeError) as caught:
        apply_overrides(read("a: 1\n"), ["x", "a=2", "a=[", "a.b=1"])
    assert [problem.message for problem in caught.value.problems] == [
        "command line: 'x' is not an override",
        "command line: the value of a is not YAML: '['",
        "command line: a.b names nothing that can be set",
    ]
