"""What happened to the rows on their way to tokens: every drop and every doubt, counted."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class DataReport:
    """Counts of one set of rows.

    Args:
        rows: rows read from the sources.
        kept: rows that are used.
        dropped: reason -> number of rows left out.
        cut: places of the rows that were cut to max_length.
        lost: of those, the ones whose last trained token was cut off.
        notes: observation -> number of rows it was made on.
        examples: reason or observation -> places of the first few rows.
        lengths: tokens of every row before truncation, dropped rows included; for a row with
            several completions, the prompt and the longest of them.
        measured: place of each of these rows.
        trained_tokens: tokens that carry loss, over the kept rows.
        tokens: tokens of the kept rows.
        stop_tokens: ids that end a trained turn.
        prompts: the rows are prompts, without a completion that could lose its end.
        held_out: rows that are kept for evaluation instead.
        noted: observation -> place of the row it was last made on.
    """

    rows: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    cut: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    measured: list[str] = field(default_factory=list)
    trained_tokens: int = 0
    tokens: int = 0
    stop_tokens: list[int] = field(default_factory=list)
    prompts: bool = False
    held_out: int = 0
    noted: dict[str, str] = field(default_factory=dict)

    @property
    def truncated(self) -> int:
        """Rows cut to max_length."""
        return len(self.cut)

    @property
    def lost_ends(self) -> int:
        """Truncated rows whose last trained token was cut off."""
        return len(self.lost)

    def measure(self, length: int, place: str) -> None:
        """Note a row's tokens before truncation."""
        self.lengths.append(length)
        self.measured.append(place)

    def truncate(self, place: str, *, lost_end: bool) -> None:
        """Count a row that is cut to max_length."""
        self.cut.append(place)
        if lost_end:
            self.lost.append(place)

    def drop(self, reason: str, place: str) -> None:
        """Count a row that is left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self._example(reason, place)

    def note(self, observation: str, place: str) -> None:
        """Count a row that is kept, but that the user should know about; once for all its texts."""
        if self.noted.get(observation) == place:
            return
        self.noted[observation] = place
        self.notes[observation] = self.notes.get(observation, 0) + 1
        self._example(observation, place)

    def _example(self, key: str, place: str) -> None:
        places = self.examples.setdefault(key, [])
        if len(places) < 3:
            places.append(place)

    def merge(self, other: DataReport) -> None:
        """Add another source's counts."""
        self.rows += other.rows
        self.kept += other.kept
        self.cut += other.cut
        self.lost += other.lost
        self.trained_tokens += other.trained_tokens
        self.tokens += other.tokens
        self.lengths += other.lengths
        self.measured += other.measured
        for key, count in other.dropped.items():
            self.dropped[key] = self.dropped.get(key, 0) + count
        for key, count in other.notes.items():
            self.notes[key] = self.notes.get(key, 0) + count
        for key, places in other.examples.items():
            self.examples[key] = (self.examples.get(key, []) + places)[:3]
        self.stop_tokens = sorted({*self.stop_tokens, *other.stop_tokens})

    def split(
        self, places: Sequence[str], tokens: int, trained_tokens: int = 0
    ) -> tuple[DataReport, DataReport]:
        """Reports of the training and the held-out part; the first counts what was dropped.

        Args:
            places: of the held-out rows.
            tokens: of the held-out rows.
            trained_tokens: of the held-out rows.
        """
        held = set(places)
        train = copy.deepcopy(self)
        held_out = DataReport(stop_tokens=self.stop_tokens, prompts=self.prompts)
        for part, wanted in ((train, False), (held_out, True)):
            rows = zip(self.lengths, self.measured, strict=True)
            inside = [row for row in rows if (row[1] in held) == wanted]
            part.lengths = [length for length, _ in inside]
            part.measured = [place for _, place in inside]
            part.cut = [place for place in self.cut if (place in held) == wanted]
            part.lost = [place for place in self.lost if (place in held) == wanted]
        train.held_out = held_out.rows = held_out.kept = len(places)
        train.kept -= len(places)
        train.tokens -= tokens
        train.trained_tokens -= trained_tokens
        held_out.tokens, held_out.trained_tokens = tokens, trained_tokens
        return train, held_out

    def percentiles(self) -> dict[str, int]:
        """Length percentiles in tokens, before truncation."""
        if not self.lengths:
            return {}
        points = {"min": 0, "p50": 50, "p90": 90, "p99": 99, "max": 100}
        values = np.percentile(np.array(self.lengths), list(points.values()), method="higher")
        return dict(zip(points, (int(value) for value in values), strict=True))

    def lines(self) -> list[str]:
        """The report in sentences, most important first."""
        lines = [f"{self.kept:,} of {self.rows:,} rows used"]
        if self.held_out:
            lines[0] += f", {self.held_out:,} held out"
        for reason, count in self.dropped.items():
            lines.append(f"{count:,} rows dropped: {reason} ({', '.join(self.examples[reason])})")
        if self.truncated and self.prompts:
            lines.append(f"{self.truncated:,} prompts truncated; they lost their beginning")
        elif self.truncated:
            lines.append(
                f"{self.truncated:,} rows truncated; {self.lost_ends:,} of them lost the end of "
                "an answer and do not teach the model to stop"
            )
        for note, count in self.notes.items():
            rows = "row" if count == 1 else "rows"
            lines.append(f"{count:,} {rows}: {note} ({', '.join(self.examples[note])})")
        return lines

    def to_json(self) -> dict[str, Any]:
        """The report as plain values, without the list of lengths."""
        return {
            "rows": self.rows,
            "kept": self.kept,
            "held_out": self.held_out,
            "dropped": self.dropped,
            "truncated": self.truncated,
            "lost_ends": self.lost_ends,
            "notes": self.notes,
            "examples": self.examples,
            "lengths": self.percentiles(),
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "stop_tokens": self.stop_tokens,
        }


def describe_rows(name: str, report: DataReport) -> list[str]:
    """The rows' report in lines, with their lengths."""
    lengths = report.percentiles()
    first, *rest = report.lines()
    trained = "" if report.prompts else f", {report.trained_tokens:,} of them trained"
    head = (
        f"{name}: {first}, {report.tokens:,} tokens{trained}; "
        f"lengths: median {lengths.get('p50', 0)}, 90% {lengths.get('p90', 0)}, "
        f"longest {lengths.get('max', 0)}"
    )
    return [head, *rest]
