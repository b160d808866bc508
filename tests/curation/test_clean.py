"""What is removed was named, everything else stays, and the same rows give the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commandline import CommandLine
from planted import plant
from running import write_rows

from alignkit.curation.check import CheckOptions, check_files
from alignkit.curation.clean import DROPS, CleanOptions, clean_files, mask, side_of
from alignkit.errors import DataError


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def cleaned(
    folder: Path, rows: list[dict[str, Any]], **options: Any
) -> tuple[list[Any], list[Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    source = str(write_rows(folder / "rows.jsonl", rows))
    clean_files([source], folder / "out.jsonl", CleanOptions(**options))
    return lines(folder / "out.jsonl"), lines(side_of(folder / "out.jsonl"))


def test_what_was_planted_goes_and_nothing_else(tmp_path: Path) -> None:
    rows, faults = plant(600)
    names = {
        "equal": "equal rows",
        "placeholders": "placeholders",
        "leaks": "answers that stand in their prompt",
        "refusals": "refusals and talk of being a model",
        "repetition": "repetitive answers",
        "personal-data": "personal data",
    }
    for name, finding in names.items():
        kept, gone = cleaned(tmp_path / name, rows, drop=[name])
        numbers = {int(one["place"].rpartition(":")[2]) - 1 for one in gone}
        assert numbers == faults[finding], name
        assert {one["reason"] for one in gone} == {name}
        assert kept == [row for number, row in enumerate(rows) if number not in numbers]
    kept, gone = cleaned(tmp_path / "all", rows, drop=list(DROPS))
    again = tmp_path / "all" / "out.jsonl"
    report = check_files([str(again)], CheckOptions())
    known = {"prompts with several answers", "answers that begin alike"}
    assert {one.name for one in report.findings} <= known
    assert len(kept) + len(gone) == len(rows)
    partners = {one["partner"] for one in gone if one["reason"] in ("equal", "near")}
    assert all(place.startswith(str(tmp_path)) for place in partners)


def test_the_partner_of_an_equal_row_stays(tmp_path: Path) -> None:
    # The first has capitals that make it a placeholder; the second is equal but for these.
    rows = [{"prompt": "TODO: ask", "completion": "a"}, {"prompt": "todo: ask", "completion": "a"}]
    kept, gone = cleaned(tmp_path, rows, drop=["equal", "placeholders"])
    assert kept == [rows[1]]
    assert [one["reason"] for one in gone] == ["placeholders"]


def test_rows_of_other_labels_are_no_duplicates(tmp_path: Path) -> None:
    said = "The river of the valley is long and its bridge is old"
    rows = [
        {"prompt": "Tell me.", "completion": said, "label": True},
        {"prompt": "Tell me.", "completion": f"{said}.", "label": False},
        {"prompt": "Tell me.", "completion": f"{said}!", "label": True},
    ]
    kept, gone = cleaned(tmp_path, rows, drop=["near"])
    assert kept == rows[:2]
    assert [one["reason"] for one in gone] == ["near"]


def test_rows_without_an_answer(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": ""}]
    kept, gone = cleaned(tmp_path, rows, drop=["unanswered"])
    assert kept == rows[:1]
    assert [one["reason"] for one in gone] == ["unanswered"]
    report = check_files([str(tmp_path / "rows.jsonl")], CheckOptions())
    assert {one.name: one.count for one in report.findings} == {"rows without an answer": 1}


def test_the_same_bytes(tmp_path: Path) -> None:
    rows, _ = plant(100)
    for folder in ("one", "two"):
        cleaned(tmp_path / folder, rows, drop=list(DROPS))
    one, two = ((tmp_path / f / "out.jsonl").read_bytes() for f in ("one", "two"))
    assert one == two


def test_personal_data_is_masked_wherever_it_stands(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "I am a@b.org"}, {"role": "assistant", "content": "Hi."}]
    rows = [{"messages": turns, "id": 7}, {"prompt": "a", "completion": "b"}]
    kept, gone = cleaned(tmp_path, rows, mask=True)
    assert kept[0]["messages"][0]["content"] == "I am [EMAIL]"
    assert kept[0]["id"] == 7
    assert kept[1] == rows[1]
    assert [one["reason"] for one in gone] == ["masked"]
    assert gone[0]["row"] == rows[0]
    masked, counts = mask({"x": ["call +44 20 7946 0958", 3, None]})
    assert masked == {"x": ["call [PHONE]", 3, None]}
    assert counts == {"phone": 1}


def test_held_out_rows_and_rows_that_cannot_be_read(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "What is it?", "completion": "That."},
        {"prompt": "Who?", "completion": "Me."},
        {"nothing": 1},
    ]
    held = str(write_rows(tmp_path / "held.jsonl", [{"prompt": "what is IT?", "completion": "x"}]))
    with pytest.raises(DataError, match=r"rows\.jsonl:3") as caught:
        cleaned(tmp_path / "a", rows, held_out=[held])
    assert "--drop unreadable" in caught.value.hint
    kept, gone = cleaned(tmp_path / "b", rows, held_out=[held], drop=["unreadable"])
    assert kept == [rows[1]]
    assert [one["reason"] for one in gone] == ["held-out", "unreadable"]
    assert gone[0]["partner"].endswith("held.jsonl:1")
    write_rows(tmp_path / "held.jsonl", [{"question": "What is it?", "answer": "That."}])
    with pytest.raises(DataError, match=r"held\.jsonl:1: no known row format"):
        cleaned(tmp_path / "d", rows, held_out=[held], drop=["unreadable"])
    with pytest.raises(DataError, match="--drop equals is not known"):
        cleaned(tmp_path / "c", rows, drop=["equals"])


def test_the_command(alignkit: CommandLine, tmp_path: Path) -> None:
    rows, _ = plant(50)
    write_rows(tmp_path / "rows.jsonl", rows)
    done = alignkit("data", "clean", "rows.jsonl", "-o", "out.jsonl", cwd=tmp_path)
    assert done.code == 2
    assert "nothing to remove or change was named" in done.stderr
    command = ["data", "clean", "rows.jsonl", "-o", "out.jsonl", "--preset", "standard"]
    done = alignkit(*command, cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert "preset standard: unreadable, placeholders, repetition, equal, near" in done.stderr
    assert "20 removed: placeholders" in done.stderr
    assert (tmp_path / "out.removed.jsonl").exists()
    again = alignkit(*command, cwd=tmp_path)
    assert again.code == 2
    assert "out.jsonl exists" in again.stderr
