"""A set of rows in two parts, a few of its rows, and what changed between two sets."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alignkit.curation.corpus import Corpus, Texts, Track, untracked
from alignkit.curation.duplicates import Groups, join_near
from alignkit.curation.findings import Collector, Finding, ordered
from alignkit.curation.records import Columns, Record, as_line, fingerprint, read_all, read_records
from alignkit.errors import DataError
from alignkit.files import replace_file


@dataclass(frozen=True)
class Split:
    """How rows were divided.

    Args:
        rows: that were read.
        kept: rows of the first part.
        held_out: rows of the second.
        together: rows that stay with another because they are like it or ask the same.
    """

    rows: int
    kept: int
    held_out: int
    together: int

    def line(self) -> str:
        """For a person."""
        return (
            f"{self.kept:,} rows to train on and {self.held_out:,} held out; {self.together:,} of "
            f"{self.rows:,} stay on the side of a row that asks the same or is nearly equal"
        )


def split_files(
    files: Sequence[str],
    train: Path,
    held_out: Path,
    *,
    share: float,
    seed: int = 0,
    threshold: float = 0.8,
    columns: Columns | None = None,
    track: Track = untracked,
) -> Split:
    """Write two files of rows that have no prompt and no near-duplicate in common.

    Args:
        files: of rows, in any format; they count as one set.
        train: the .jsonl file of most rows, in their order.
        held_out: that of the others.
        share: of the rows that are held out, in (0, 1); whole groups are, so it may be a little
            more.
        seed: of the choice.
        threshold: Jaccard similarity of near-duplicates.
        columns: of the files that are renamed.
        track: tells how much is done.

    Raises:
        DataError: a row cannot be read, or the share is out of range.
    """
    if not 0.0 < share < 1.0:
        raise DataError(f"--share must be between 0 and 1, got {share:g}", hint="0.1 is usual")
    corpus, groups, order = _grouped(files, threshold, seed, columns, track)
    if len(corpus) < 2:
        raise DataError("one row cannot be divided", hint="name a file with more")
    leaders = groups.leaders()
    sizes = np.bincount(leaders, minlength=len(corpus))
    firsts = np.flatnonzero(sizes)
    ranked = firsts[np.argsort(np.asarray(order, np.uint64)[firsts], kind="stable")]
    before = np.cumsum(sizes[ranked]) - sizes[ranked]
    chosen = np.isin(leaders, ranked[before < share * len(corpus)])
    held = int(chosen.sum())
    if held == len(corpus):
        raise DataError(
            f"all {len(corpus)} rows are one group of equal prompts or near-duplicates",
            hint="raise --threshold, or clean them first",
        )
    with (
        replace_file(train) as one,
        replace_file(held_out) as two,
        one.open("w", encoding="utf-8") as kept,
        two.open("w", encoding="utf-8") as out,
    ):
        for number in track(range(len(corpus)), "writing rows", len(corpus)):
            record = corpus.record(number)
            line = as_line(record.columns, record.place)
            (out if chosen[number] else kept).write(line)
    return Split(len(corpus), len(corpus) - held, held, int(sizes[sizes > 1].sum()))


def _grouped(
    files: Sequence[str], threshold: float, seed: int, columns: Columns | None, track: Track
) -> tuple[Corpus, Groups, array[int]]:
    """Rows, those that ask the same or are nearly equal together, and a number drawn for each."""
    corpus, order = Corpus(), array("Q")
    first: dict[bytes, int] = {}
    pairs: list[tuple[int, int]] = []
    for record in track(read_all(files, columns), "reading rows", None):
        number = corpus.append(record)
        said = record.text.encode("utf-8", "replace")
        drawn = hashlib.blake2b(said, digest_size=8, salt=seed.to_bytes(16, "little"))
        order.append(int.from_bytes(drawn.digest(), "little"))
        if record.prompt.strip():
            leader = first.setdefault(fingerprint(record.prompt), number)
            if leader != number:
                pairs.append((leader, number))
    groups = Groups(len(corpus))
    for one, other in pairs:
        groups.join(one, other)
    join_near(groups, Texts(corpus, range(len(corpus))), threshold, track)
    return corpus, groups, order


def sample_rows(files: Sequence[str], count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Some rows, drawn alike from all files, in their order.

    Args:
        files: of rows.
        count: how many.
        seed: of the choice.
    """
    rows = Corpus()
    for file in files:
        for record in read_records(file):
            rows.append(record)
    chosen = sorted(random.Random(seed).sample(range(len(rows)), min(count, len(rows))))
    return [
        {"place": one.place, "row": one.columns if isinstance(one, Record) else None}
        for one in map(rows.__getitem__, chosen)
    ]


def compare_files(before: str, after: str) -> tuple[int, tuple[Finding, ...]]:
    """What changed between two files.

    Args:
        before: of rows.
        after: of rows.

    Returns:
        Rows that stand in both, and what does not: removed, added, and with another answer.
    """
    gone = Collector("only before", "look", f"rows of {before} that {after} has not", "")
    added = Collector("only after", "look", f"rows of {after} that {before} has not", "")
    changed = Collector("another answer", "look", "the same prompt, and other answers", "")
    old, new = _corpus(before), _corpus(after)
    same, left, right = _unmatched(old, new)
    asked: dict[bytes, list[int]] = defaultdict(list)
    for number in left:
        asked[_question(old.record(number))].append(number)
    for number in right:
        record = new.record(number)
        others = asked.get(_question(record)) if record.prompt.strip() else None
        if not others:
            added.add(record.place, record.text)
            continue
        answers = (one.answers for one in (old.record(others.pop(0)), record))
        changed.add(record.place, *("\n".join(texts) for texts in answers))
    for number in sorted(number for numbers in asked.values() for number in numbers):
        gone.add(old.record(number).place, old.record(number).text)
    return same, ordered([one.finding() for one in (gone, added, changed)])


def _corpus(file: str) -> Corpus:
    corpus = Corpus()
    for record in read_all([file]):
        corpus.append(record)
    return corpus


def _unmatched(old: Corpus, new: Corpus) -> tuple[int, list[int], list[int]]:
    """How many rows both have, each counted once, and the others of each."""
    there = Counter(new.record(number).identity for number in range(len(new)))
    left = []
    for number in range(len(old)):
        identity = old.record(number).identity
        if there[identity]:
            there[identity] -= 1
        else:
            left.append(number)
    right = []
    for number in reversed(range(len(new))):
        identity = new.record(number).identity
        if there[identity]:
            there[identity] -= 1
            right.append(number)
    return len(old) - len(left), left, right[::-1]


def _question(record: Record) -> bytes:
    return fingerprint(f"{record.system}\n\n{record.prompt}")
