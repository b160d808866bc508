"""What rows have in common without being alike, chains, columns, files: each was wrong once."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from commandline import CommandLine
from planted import sentence
from running import write_rows

from alignkit.curation import duplicates
from alignkit.curation.check import CheckOptions, check_files
from alignkit.curation.clean import CleanOptions, clean_files
from alignkit.curation.duplicates import repeated
from alignkit.curation.parts import compare_files, split_files
from alignkit.curation.patterns import personal_data
from alignkit.curation.records import as_line
from alignkit.data.sources import load_source
from alignkit.errors import DataError
from alignkit.recipe.rows import SourceSpec

RNG = random.Random(0)
LONG = " ".join(sentence(RNG, 9) for _ in range(20))


def chats(count: int) -> list[dict[str, Any]]:
    system = {"role": "system", "content": f"You are {{{{name}}}}. {LONG}"}
    return [
        {
            "messages": [
                system,
                {"role": "user", "content": sentence(RNG, 12)},
                {"role": "assistant", "content": sentence(RNG, 20)},
            ]
        }
        for _ in range(count)
    ]


def cleaned(folder: Path, rows: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    source = str(write_rows(folder / "rows.jsonl", rows))
    clean_files([source], folder / "out.jsonl", CleanOptions(**options))
    return [json.loads(x) for x in (folder / "out.jsonl").read_text("utf-8").splitlines()]


def test_what_the_system_says_makes_no_rows_alike(tmp_path: Path) -> None:
    rows, held = chats(20), str(write_rows(tmp_path / "held.jsonl", chats(10)))
    drop = ["placeholders", "near"]
    assert cleaned(tmp_path, rows, drop=drop, held_out=[held]) == rows
    report = check_files([str(tmp_path / "rows.jsonl")], CheckOptions(held_out=[held]))
    assert {one.name for one in report.findings} <= {"personal data"}
    assert report.facts["lengths"]["median"] > 180  # but it takes room
    done = split_files([str(tmp_path / "rows.jsonl")], tmp_path / "a", tmp_path / "b", share=0.2)
    assert done.held_out == 4


def test_of_a_chain_every_other_text_may_stay() -> None:
    words = [f"word{number:03}" for number in range(400)]
    texts = [" ".join(words[3 * n : 3 * n + 40]) for n in range(40)]
    found = repeated(texts, 0.8)
    assert found
    for later, kept in found.items():
        assert kept not in found
        one, other = (duplicates.pieces(texts[n]) for n in (later, kept))
        assert duplicates.similarity(one, other) >= 0.8
    left = [n for n in range(40) if n not in found]
    assert repeated([texts[n] for n in left], 0.8) == {}


def test_marks_and_borders_make_rows_differ(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    turns += [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    unmarked = [dict(turn) for turn in turns]
    turns[1]["weight"] = 0
    rows: list[dict[str, Any]] = [
        {"prompt": "List: a b", "completion": "c d"},
        {"prompt": "List: a", "completion": "b c d"},
        {"messages": turns},
        {"messages": unmarked},
    ]
    assert cleaned(tmp_path, rows, drop=["equal"]) == rows


def test_a_pair_the_other_way_round_is_no_duplicate(tmp_path: Path) -> None:
    one, two = sentence(RNG, 20), sentence(RNG, 20)
    rows = [{"prompt": "Which?", "chosen": x, "rejected": y} for x, y in ((one, two), (two, one))]
    assert cleaned(tmp_path, rows, drop=["near", "equal"]) == rows


def test_a_chat_that_the_user_ends_has_an_answer(tmp_path: Path) -> None:
    turns = [{"role": r, "content": r} for r in ("user", "assistant", "user")]
    rows = [{"messages": turns}, {"messages": turns[:1]}, {"messages": turns[:2]}]
    assert cleaned(tmp_path, rows, drop=["unanswered"]) == [rows[0], rows[2]]


def test_each_row_is_compared_once(tmp_path: Path) -> None:
    def row(prompt: str, answer: str) -> dict[str, str]:
        return {"prompt": prompt, "completion": answer}

    old = [row("p", "a1"), row("p", "a2"), row("q", "x"), row("q", "x")]
    before = str(write_rows(tmp_path / "before.jsonl", old))
    after = str(write_rows(tmp_path / "after.jsonl", [row("p", "a1"), row("q", "x")]))
    same, found = compare_files(before, after)
    assert (same, {one.name: one.count for one in found}) == (2, {"only before": 2})
    same, found = compare_files(after, before)
    assert (same, {one.name: one.count for one in found}) == (2, {"only after": 2})


def test_a_column_is_not_renamed_over_another() -> None:
    write_rows(Path("r.jsonl"), [{"prompt": "old", "question": "new"}])
    with pytest.raises(DataError, match=r"r\.jsonl:1: columns calls 'question' 'prompt', and the"):
        _ = load_source(SourceSpec(path="r.jsonl", columns={"prompt": "question"})).rows


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("value", [b"x", float("nan"), {"a": {1, 2}}], ids=["bytes", "nan", "set"])
def test_a_value_without_json_is_an_error(value: Any) -> None:
    with pytest.raises(DataError, match=r"r:1: holds a value that JSON has no place for"):
        as_line({"x": value}, "r:1")


def test_a_full_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match="rows cannot be kept there: No space left") as caught:
        repeated(["a", "b"], 0.8)
    assert "TMPDIR" in caught.value.hint


def test_many_hits_in_a_row() -> None:
    text = " ".join(f"8.8.{n // 250}.{n % 250}" for n in range(20_000))
    assert len(list(personal_data(text))) == 20_000
    local = "10.0.0.1 127.0.0.1 172.16.0.9 169.254.1.1 192.168.1.1 100.64.0.1"
    assert list(personal_data(local)) == []


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("split r.jsonl --train a.jsonl --eval ./a.jsonl", "is named twice"),
        ("clean r.jsonl -o out.csv --drop equal", "rows are written as .jsonl"),
        ("convert r.jsonl -o folder.jsonl --overwrite", "folder.jsonl is a folder"),
        ("convert r.jsonl -o a.jsonl --encoding hex", "--encoding hex is not known"),
        ("check r.jsonl --columns prompt=a --columns prompt=b", "--columns names prompt twice"),
        ("check r.jsonl --columns prompt=a --columns text=a", "--columns names a twice"),
        ("clean r.jsonl -o a.jsonl --held-out r.jsonl", "no row is left"),
        ("split one.jsonl --train a.jsonl --eval b.jsonl", "one row cannot be divided"),
        ("check deep.jsonl", "nested too deeply"),
    ],
)
def test_what_cannot_be_done_is_said(
    command: str, said: str, alignkit: CommandLine, tmp_path: Path
) -> None:
    rows = [{"prompt": f"q{n}", "completion": sentence(RNG, 9)} for n in range(5)]
    write_rows(tmp_path / "r.jsonl", rows)
    write_rows(tmp_path / "one.jsonl", rows[:1])
    (tmp_path / "folder.jsonl").mkdir()
    deep = '{"prompt": "a", "completion": "b", "x": ' + "[" * 900 + "]" * 900 + "}\n"
    (tmp_path / "deep.jsonl").write_text(deep, encoding="utf-8")
    before = sorted(path.name for path in tmp_path.iterdir())
    done = alignkit("data", *command.split(), cwd=tmp_path)
    assert done.code == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before
