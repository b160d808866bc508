"""Planted faults are found and near misses are not; near-duplicates at a known similarity."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from commandline import CommandLine
from planted import plant, plant_more, plant_pairs, sentence
from running import write_rows

from alignkit.curation import duplicates
from alignkit.curation.check import CheckOptions, check_files
from alignkit.curation.duplicates import Groups, join_near, pieces, similarity
from alignkit.curation.overlap import Measured
from alignkit.curation.page import render_page
from alignkit.curation.patterns import personal_data
from alignkit.curation.quality import repetition
from alignkit.curation.records import Record
from alignkit.errors import DataError


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Any:
    rows, _ = plant(300)
    path = write_rows(tmp_path_factory.mktemp("planted") / "rows.jsonl", rows)
    return check_files([str(path)], CheckOptions()), path


EXPECTED = {
    plant: (
        "placeholders",
        "answers that stand in their prompt",
        "refusals and talk of being a model",
        "repetitive answers",
        "personal data",
        "equal rows",
        "near-duplicates",
    ),
    plant_more: (
        "unreadable rows",
        "rows without an answer",
        "answers whose lines repeat",
        "answers of unfinished lines",
    ),
    plant_pairs: (
        "pairs that differ only in length",
        "pairs whose answers hardly differ",
        "rows that contradict one before them",
    ),
}


@pytest.mark.parametrize("made", EXPECTED, ids=lambda made: made.__name__)
def test_every_planted_fault_is_found_and_no_other(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignkit.curation.findings.PLACES", 10_000)
    rows, faults = made(600)
    report = check_files([str(write_rows(tmp_path / "rows.jsonl", rows))], CheckOptions())
    found = {
        one.name: {int(place.rpartition(":")[2]) - 1 for place in one.places}
        for one in report.findings
    }
    too = {  # these are the others as well
        "rows that contradict one before them": "near-duplicates",
        "answers whose lines repeat": "repetitive answers",
    }
    for name in EXPECTED[made]:
        assert found[name] == faults[name], name
    others = found.keys() - {*EXPECTED[made], "prompts with several answers"}
    assert others <= {too[name] for name in too if name in EXPECTED[made]}


def test_near_duplicates_at_a_known_similarity() -> None:
    rng = random.Random(0)
    texts, alike = [], set()
    for _ in range(400):
        text = sentence(rng, 30)
        other = text
        aim = rng.choice([0.5, 0.65, 0.85, 0.95])
        while similarity(pieces(text), pieces(other)) > aim:
            words = other.split()
            words[rng.randrange(len(words))] = rng.choice(["zebra", "quartz", "jigsaw", "vortex"])
            other = " ".join(words)
        texts += [text, other]
        if similarity(pieces(text), pieces(other)) >= 0.8:
            alike.add((len(texts) - 2, len(texts) - 1))
    groups = Groups(len(texts))
    join_near(groups, texts, 0.8)
    found = {(int(one), n) for n, one in enumerate(groups.leaders()) if one != n}
    assert len(alike) > 100
    assert len(found & alike) >= 0.95 * len(alike)  # recall
    assert found <= alike  # compared exactly


def test_a_set_without_faults(tmp_path: Path) -> None:
    rng = random.Random(1)
    rows = [{"prompt": sentence(rng, 9), "completion": sentence(rng, 20)} for _ in range(30)]
    report = check_files([str(write_rows(tmp_path / "rows.jsonl", rows))], CheckOptions())
    assert (report.rows, report.findings, report.faults) == (30, (), 0)
    assert report.facts["kinds"] == {"answers": 30}


def test_pairs_labels_and_rows_that_cannot_be_read(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "chosen": "One two three four.", "rejected": "One two three four. Five."},
        {
            "prompt": "b",
            "chosen": "It is a very long answer here",
            "rejected": "here answer long very a is It",
        },
        {"prompt": "c", "chosen": "Certainly not today.", "rejected": "Yes."},
        {"prompt": "d", "chosen": "same", "rejected": "same"},
        {"prompt": "e", "completion": "x", "label": True},
        {"question": "?"},
    ]
    report = check_files([str(write_rows(tmp_path / "rows.jsonl", rows))], CheckOptions())
    found = {one.name: one for one in report.findings}
    assert found["pairs that differ only in length"].count == 1
    assert found["pairs whose answers hardly differ"].count == 1
    unread = found["unreadable rows"]
    assert unread.count == 2
    assert unread.places[0].endswith("rows.jsonl:4")
    assert report.facts["labels"] == {"true": 1}
    assert report.facts["chosen is longer"] == pytest.approx(0.333)


def findings(folder: Path, rows: list[dict[str, Any]]) -> dict[str, int]:
    report = check_files([str(write_rows(folder / "rows.jsonl", rows))], CheckOptions())
    return {one.name: one.count for one in report.findings}


def test_rows_are_equal_only_if_they_teach_the_same(tmp_path: Path) -> None:
    def calling(city: str, tool: str = "weather") -> dict[str, Any]:
        call = {"function": {"name": tool, "arguments": {"city": city}}}
        turns = [
            {"role": "user", "content": "How is it there?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        return {"messages": turns, "tools": [{"name": tool, "parameters": {}}]}

    assert "equal rows" not in findings(tmp_path, [calling("Oslo"), calling("Rome")])
    assert "equal rows" not in findings(tmp_path, [calling("Oslo"), calling("Oslo", "climate")])
    assert findings(tmp_path, [calling("Oslo")] * 2)["equal rows"] == 1


def test_rows_that_contradict_each_other(tmp_path: Path) -> None:
    said = {"prompt": "Is it so?", "completion": "It is so, as everybody can see."}
    labelled = [said | {"label": True}, said | {"label": False}, said | {"label": True}]
    assert findings(tmp_path, labelled) == {
        "equal rows": 1,
        "prompts with several answers": 1,
        "rows that contradict one before them": 1,
    }
    pair = {"prompt": "Is it so?", "chosen": "It is.", "rejected": "No, not at all."}
    turned = pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]}
    assert findings(tmp_path, [pair, turned])["rows that contradict one before them"] == 1
    assert "rows that contradict one before them" not in findings(tmp_path, [pair, pair])


def test_columns_are_renamed(tmp_path: Path, alignkit: CommandLine) -> None:
    rows = [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(3)]
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    report = check_files([path], CheckOptions())
    assert [one.name for one in report.findings] == ["unreadable rows"]
    options = ["--columns", "prompt=question", "--columns", "completion=answer"]
    done = alignkit("data", "check", path, *options, cwd=tmp_path)
    assert "answers 3" in done.stdout
    assert "unreadable" not in done.stdout
    targets = ["--train", "t.jsonl", "--eval", "e.jsonl", "--share", "0.3"]
    assert alignkit("data", "split", path, *targets, *options, cwd=tmp_path).code == 0
    assert "prompt" in (tmp_path / "t.jsonl").read_text(encoding="utf-8")
    wrong = alignkit("data", "check", path, "--columns", "prompt", cwd=tmp_path)
    assert wrong.code == 2
    assert "--columns prompt must be a new and an old name" in wrong.stderr


def test_rows_of_the_held_out_files() -> None:
    long = " ".join(f"word{i}" for i in range(20))

    def row(prompt: str, answer: str, place: str = "") -> Record:
        return Record(place, "", prompt, (answer,), (), None, {})

    measured = Measured([row("What is it?", "That.", "eval:1"), row("", long, "eval:2")])
    assert measured.place_of(row("what  IS it?", "Other.")) == "eval:1"
    assert measured.place_of(row("q", f"before {' '.join(long.split()[3:17])} after")) == "eval:2"
    assert measured.place_of(row("q", " ".join(long.split()[:12]))) is None


def test_personal_data_has_its_check_digits() -> None:
    kinds = [kind for kind, _, _ in personal_data("4111111111111111 and 4111111111111112")]
    assert kinds == ["card"]
    assert [k for k, _, _ in personal_data("GB82 WEST 1234 5698 7654 32")] == ["iban"]
    assert [k for k, _, _ in personal_data("a.b@c.de, sk-" + "a" * 24)] == ["email", "key"]
    assert list(personal_data("10.0.0.1, 2024-11-30, 3.14159, x@y")) == []


def test_repetition() -> None:
    assert repetition("the same four words " * 10) > 0.8
    assert repetition(" ".join(f"w{i}" for i in range(50))) == 0.0
    assert repetition("short " * 5) == 0.0


def test_the_command(alignkit: CommandLine, tmp_path: Path, report: Any) -> None:
    _, path = report
    done = alignkit("data", "check", str(path), "--html", "page.html", "--strict", cwd=tmp_path)
    assert done.code == 2
    assert "fault: 20 placeholders" in done.stdout
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "20 placeholders" in page
    assert "http" not in page.replace("http-equiv", "")
    as_json = alignkit("data", "check", str(path), "--json", "--no-near", cwd=tmp_path)
    assert as_json.code == 0
    assert json.loads(as_json.stdout)["rows"] == 300 + 12 * 20
    held = alignkit("data", "check", str(path), "--held-out", str(path), "--no-near", cwd=tmp_path)
    assert "rows of the held-out files" in held.stdout
    wrong = alignkit("data", "check", str(path), "--threshold", "2", cwd=tmp_path)
    assert wrong.code == 2
    assert "--threshold must be between 0.3 and 1" in wrong.stderr


def test_foreign_text_is_escaped_on_the_page(tmp_path: Path) -> None:
    bad = "[Your Name] <script>alert(1)</script> and four more words"
    rows = [{"prompt": bad, "completion": bad}] * 2
    page = render_page(check_files([str(write_rows(tmp_path / "r.jsonl", rows))], CheckOptions()))
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(duplicates, "MinHash", None)
    with pytest.raises(DataError, match="needs the package datasketch") as caught:
        join_near(Groups(2), ["a", "b"], 0.8)
    assert caught.value.hint == "pip install 'alignkit[data]'"
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 2)
    found = check_files([str(rows)], CheckOptions())
    assert [one.name for one in found.findings] == ["equal rows"]
    assert "alignkit[data]" in found.facts["near-duplicates"]
