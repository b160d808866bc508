"""A set of rows in two parts, a few of its rows, and what changed between two sets."""

from __future__ import annotations

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.curation.duplicates import groups, near_duplicates
from alignkit.curation.findings import Collector, Finding, ordered
from alignkit.curation.records import Columns, Record, fingerprint, read_all, read_records
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

    Raises:
        DataError: a row cannot be read, or the share is out of range.
    """
    if not 0.0 < share < 1.0:
        raise DataError(f"--share must be between 0 and 1, got {share:g}", hint="0.1 is usual")
    records = read_all(files, columns)
    leaders = _groups(records, threshold)
    members: dict[int, list[int]] = defaultdict(list)
    for number in range(len(records)):
        members[leaders[number]].append(number)

    def order(leader: int) -> bytes:
        said = records[leader].text.encode("utf-8", "replace")
        return hashlib.blake2b(said, digest_size=16, salt=seed.to_bytes(16, "little")).digest()

    wanted, chosen = share * len(records), set[int]()
    for leader in sorted(members, key=order):
        if len(chosen) >= wanted:
            break
        chosen.update(members[leader])
    if len(chosen) == len(records):
        raise DataError(
            f"all {len(records)} rows are one group of equal prompts or near-duplicates",
            hint="raise --threshold, or clean them first",
        )
    for path, side in ((train, False), (held_out, True)):
        with replace_file(path) as written, written.open("w", encoding="utf-8") as file:
            for number, record in enumerate(records):
                if (number in chosen) == side:
                    file.write(as_line(record.columns))
    together = sum(len(numbers) for numbers in members.values() if len(numbers) > 1)
    return Split(len(records), len(records) - len(chosen), len(chosen), together)


def _groups(records: Sequence[Record], threshold: float) -> list[int]:
    """The first row of each row's group: of the same prompt, or nearly equal, or both in turn."""
    pairs: list[tuple[int, int, float]] = []
    first: dict[bytes, int] = {}
    for number, record in enumerate(records):
        if record.prompt.strip():
            leader = first.setdefault(fingerprint(record.prompt), number)
            if leader != number:
                pairs.append((leader, number, 1.0))
    pairs += near_duplicates([record.text for record in records], threshold)
    leaders = groups(pairs)
    return [leaders.get(number, number) for number in range(len(records))]


def sample_rows(files: Sequence[str], count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Some rows, drawn alike from all files, in their order.

    Args:
        files: of rows.
        count: how many.
        seed: of the choice.
    """
    rows = [record for file in files for record in read_records(file)]
    chosen = sorted(random.Random(seed).sample(range(len(rows)), min(count, len(rows))))
    return [
        {"place": rows[n].place, "row": one.columns if isinstance(one := rows[n], Record) else None}
        for n in chosen
    ]


def compare_files(before: str, after: str) -> tuple[int, tuple[Finding, ...]]:
    """What changed between two files.

    Args:
        before: of rows.
        after: of rows.

    Returns:
        Rows that stand in both, and what does not: removed, added, and with another answer.
    """
    old, new = (read_all([file]) for file in (before, after))
    gone = Collector("only before", "look", f"rows of {before} that {after} has not", "")
    added = Collector("only after", "look", f"rows of {after} that {before} has not", "")
    changed = Collector("another answer", "look", "the same prompt, and other answers", "")
    old_texts, new_texts = ({fingerprint(one.text) for one in rows} for rows in (old, new))
    old_asked = {fingerprint(one.prompt): one for one in old if one.prompt.strip()}
    new_asked = {fingerprint(one.prompt) for one in new if one.prompt.strip()}
    for record in old:
        if (
            fingerprint(record.text) not in new_texts
            and fingerprint(record.prompt) not in new_asked
        ):
            gone.add(record.place, record.text)
    for record in new:
        if fingerprint(record.text) in old_texts:
            continue
        other = old_asked.get(fingerprint(record.prompt)) if record.prompt.strip() else None
        if other is None:
            added.add(record.place, record.text)
        else:
            changed.add(record.place, "\n".join(other.answers), "\n".join(record.answers))
    same = sum(fingerprint(record.text) in new_texts for record in old)
    return same, ordered([one.finding() for one in (gone, added, changed)])


def as_line(values: dict[str, Any]) -> str:
    """A row as a line of a .jsonl file.

    Args:
        values: its columns.
    """
    return json.dumps(values, ensure_ascii=False, default=str) + "\n"
