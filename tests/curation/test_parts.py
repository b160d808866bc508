"""Two parts without anything in common, some rows, and what changed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from commandline import CommandLine
from planted import plant, sentence
from running import write_rows

from alignkit.curation.duplicates import Groups, join_near
from alignkit.curation.parts import compare_files, sample_rows, split_files
from alignkit.curation.records import Record, read_records
from alignkit.errors import DataError


def records(path: Path) -> list[Record]:
    return [one for one in read_records(str(path)) if isinstance(one, Record)]


def test_a_split_has_nothing_in_common(tmp_path: Path) -> None:
    rows, _ = plant(300)
    source = str(write_rows(tmp_path / "rows.jsonl", rows))
    train, held = tmp_path / "train.jsonl", tmp_path / "held.jsonl"
    done = split_files([source], train, held, share=0.2)
    one, two = records(train), records(held)
    assert len(one) + len(two) == done.rows == len(rows)
    assert done.kept == len(one)
    assert 0.2 * len(rows) <= len(two) <= 0.25 * len(rows)
    assert not {r.prompt.strip().casefold() for r in one} & {
        r.prompt.strip().casefold() for r in two
    }
    texts = [r.text for r in (*one, *two)]
    groups = Groups(len(texts))
    join_near(groups, texts, 0.8)
    for second, first in enumerate(groups.leaders()):
        assert (first < len(one)) == (second < len(one))
    assert done.together >= 40
    again = tmp_path / "again"
    split_files([source], again / "train.jsonl", again / "held.jsonl", share=0.2)
    assert (again / "held.jsonl").read_bytes() == held.read_bytes()
    split_files([source], again / "train.jsonl", again / "held.jsonl", share=0.2, seed=1)
    assert (again / "held.jsonl").read_bytes() != held.read_bytes()


def test_what_cannot_be_split(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": c} for c in "bcd"])
    targets = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    with pytest.raises(DataError, match="all 3 rows are one group"):
        split_files([str(rows)], *targets, share=0.5)
    with pytest.raises(DataError, match="--share must be between 0 and 1"):
        split_files([str(rows)], *targets, share=1.0)
    assert not any(target.exists() for target in targets)


def test_some_rows_are_the_same_each_time(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"q{n}", "completion": "a"} for n in range(50)]
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    found = sample_rows([path], 5)
    assert found == sample_rows([path], 5)
    assert found != sample_rows([path], 5, seed=1)
    assert all(rows[int(one["place"].rpartition(":")[2]) - 1] == one["row"] for one in found)
    assert len(sample_rows([path], 99)) == 50


def test_what_changed(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [{"prompt": sentence(rng, 6), "completion": sentence(rng, 6)} for _ in range(10)]
    later = [*rows[2:9], {**rows[9], "completion": "other"}, {"prompt": "new", "completion": "x"}]
    before, after = (
        str(write_rows(tmp_path / name, some))
        for name, some in (("before.jsonl", rows), ("after.jsonl", later))
    )
    same, findings = compare_files(before, after)
    counts = {one.name: one.count for one in findings}
    assert same == 7
    assert counts == {"only before": 2, "only after": 1, "another answer": 1}


def test_the_commands(alignkit: CommandLine, tmp_path: Path) -> None:
    rows, _ = plant(60)
    write_rows(tmp_path / "rows.jsonl", rows)
    command = ["data", "split", "rows.jsonl", "--train", "t.jsonl", "--eval", "e.jsonl"]
    done = alignkit(*command, cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert "rows to train on and" in done.stderr
    assert alignkit(*command, cwd=tmp_path).code == 2
    shown = alignkit("data", "sample", "rows.jsonl", "-n", "2", cwd=tmp_path)
    assert shown.stdout.count("rows.jsonl:") == 2
    changed = alignkit("data", "diff", "rows.jsonl", "t.jsonl", "--json", cwd=tmp_path)
    found = json.loads(changed.stdout)
    assert found["same"] > 100
    assert "only before" in {one["name"] for one in found["findings"]}
