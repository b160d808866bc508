"""What was found in rows: how many, where, why it matters, and what mends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Weight = Literal["fault", "look"]

PLACES, EXAMPLES = 5, 3
"""Of a finding that are kept."""


@dataclass(frozen=True)
class Finding:
    """One kind of thing that was found.

    Args:
        name: short, as in `near-duplicates`.
        weight: `fault` is almost always wrong; `look` is for a person to judge.
        count: rows that have it.
        why: what it does to a model, in a sentence.
        mend: what to do.
        places: `file:line` of the first ones.
        examples: the first ones, side by side where there are two.
    """

    name: str
    weight: Weight
    count: int
    why: str
    mend: str
    places: tuple[str, ...] = ()
    examples: tuple[tuple[str, ...], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return vars(self) | {"examples": [list(example) for example in self.examples]}


@dataclass
class Collector:
    """Counts one kind of finding over the rows.

    Args:
        name: of the finding.
        weight: of the finding.
        why: of the finding.
        mend: of the finding.
    """

    name: str
    weight: Weight
    why: str
    mend: str
    places: list[str] = field(default_factory=list)
    examples: list[tuple[str, ...]] = field(default_factory=list)
    count: int = 0

    def add(self, place: str, *example: str) -> None:
        """One more row.

        Args:
            place: `file:line`.
            example: what it looks like; two texts stand side by side.
        """
        self.count += 1
        if len(self.places) < PLACES:
            self.places.append(place)
        if example and len(self.examples) < EXAMPLES:
            self.examples.append(tuple(excerpt(text) for text in example))

    def finding(self) -> Finding:
        """What was counted."""
        return Finding(
            self.name,
            self.weight,
            self.count,
            self.why,
            self.mend,
            tuple(self.places),
            tuple(self.examples),
        )


def excerpt(text: str, longest: int = 160) -> str:
    """The text on one line, its middle left out if it is long.

    Args:
        text: of a row.
        longest: characters.
    """
    plain = " ".join(text.split())
    half = (longest - 3) // 2
    return plain if len(plain) <= longest else f"{plain[:half]} … {plain[-half:]}"


@dataclass(frozen=True)
class Report:
    """A whole check.

    Args:
        files: that were read.
        rows: in them.
        facts: name -> what is so, where nothing is wrong: formats, roles, lengths, labels.
        findings: those with a count, faults first.
    """

    files: tuple[str, ...]
    rows: int
    facts: dict[str, Any]
    findings: tuple[Finding, ...]

    @property
    def faults(self) -> int:
        """Findings that are almost always wrong."""
        return sum(finding.weight == "fault" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        found = [finding.to_json() for finding in self.findings]
        return {
            "files": list(self.files),
            "rows": self.rows,
            "facts": self.facts,
            "findings": found,
        }


def ordered(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Those that were found, faults first, then by their number.

    Args:
        findings: in any order.
    """
    there = [finding for finding in findings if finding.count]
    return tuple(sorted(there, key=lambda one: (one.weight != "fault", -one.count, one.name)))
