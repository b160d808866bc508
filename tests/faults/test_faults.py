"""A few faults of fixed seeds; `make faults` makes many."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from commandline import CommandLine

from faults.engine import END, START, Drawn, Outcome, draw, make, table, write_table
from faults.kinds import KINDS, can_mount
from faults.works import WORKS
from faults.workshop import Workshop

pytestmark = pytest.mark.slow

FAULTS = [
    Drawn("killed at a file call", "sft", 5),
    Drawn("killed at a file call", "merge again", 2),
    Drawn("killed at a file call", "export", 3),
    Drawn("killed at any moment", "sft", 4),
    Drawn("killed while resuming", "kto", 3),
    Drawn("interrupted", "kto", 6),
    Drawn("a file of the newest checkpoint damaged", "sft", 7),
    Drawn("checkpoints gone or strange", "kto", 8),
    Drawn("run.json, recipe, plan or metrics damaged", "sft", 9),
    Drawn("base, rows or template changed", "kto", 10),
    Drawn("recipe changed", "sft", 11),
    Drawn("disk full", "sft", 12),
    Drawn("files limited in size", "merge", 13),
    Drawn("a second process", "kto", 14),
    Drawn("project folder renamed", "kto", 15),
]


@pytest.fixture(scope="module")
def shop(alignkit: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    shop = Workshop(tmp_path_factory.mktemp("faults").resolve() / "work", alignkit)
    yield shop
    shop.close()


@pytest.mark.parametrize("drawn", FAULTS, ids=lambda drawn: f"{drawn.kind}, {drawn.work}")
def test_a_fault(drawn: Drawn, shop: Workshop) -> None:
    if drawn.kind == "disk full" and not can_mount(shop.home):
        pytest.skip("no file system can be mounted")
    outcome = make(shop, drawn)
    print(outcome.line())
    assert not outcome.wrong, outcome.line()


def test_a_seed_draws_the_same_faults() -> None:
    drawn = draw(200, 1)
    assert drawn == draw(200, 1)
    assert drawn != draw(200, 2)
    assert {fault.kind for fault in drawn} == set(KINDS)
    assert {fault.kind for fault in draw(len(KINDS), 3)} == set(KINDS)
    assert {fault.work for fault in drawn} == set(WORKS)
    assert "disk full" not in {fault.kind for fault in draw(200, 1, disks=False)}


def test_the_table_and_its_place(tmp_path: Path) -> None:
    outcomes = [
        Outcome(Drawn("disk full", "sft", 1), lost=2),
        Outcome(Drawn("disk full", "kto", 2), wrong="exit code 1"),
        Outcome(Drawn("interrupted", "sft", 3)),
    ]
    text = table(outcomes, 4)
    assert "| disk full | 2 | 1 | 2 |" in text
    assert "| interrupted | 1 | 1 | 0 |" in text
    assert "| **all** | **3** | **2** | **2** |" in text
    document = tmp_path / "reliability.md"
    document.write_text(f"# Before\n\n{START}\nold\n{END}\n\nAfter.\n", encoding="utf-8")
    write_table(text, document)
    written = document.read_text(encoding="utf-8")
    assert written == f"# Before\n\n{START}\n\n{text}\n{END}\n\nAfter.\n"
