"""What a check looks for: each look sees every row once, and says at the end what it found."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable
from typing import Protocol

import numpy as np

from alignkit.curation.corpus import Corpus, Texts, Track
from alignkit.curation.duplicates import kind_of, repeated
from alignkit.curation.findings import Collector
from alignkit.curation.overlap import Measured
from alignkit.curation.patterns import opening
from alignkit.curation.records import Record, fingerprint, normalized, words
from alignkit.curation.rules import Rule

SAME_ANSWERS = 0.95
"""Share of common words from which two answers say nearly the same."""

FREQUENT, FEWEST = 0.05, 20
"""Share of the answers that begin alike that is told, of at least so many answers."""


class Look(Protocol):
    """Something that is looked for."""

    def see(self, number: int, record: Record, *, first: bool) -> None:
        """The next row.

        Args:
            number: of the row in the corpus.
            record: the row.
            first: no row before it is equal.
        """

    def found(self, corpus: Corpus, track: Track) -> list[Collector]:
        """What was found.

        Args:
            corpus: all rows.
            track: tells how much is done.
        """


class Rules:
    """What a row has by itself.

    Args:
        rules: what may not be there.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._found = [(rule, rule.collector()) for rule in rules]

    def see(self, number: int, record: Record, *, first: bool) -> None:
        """The next row."""
        for rule, collector in self._found:
            hit = rule.hit(record)
            if hit is not None:
                collector.add(record.place, hit)

    def found(self, corpus: Corpus, track: Track) -> list[Collector]:
        """A collector for each rule."""
        return [collector for _, collector in self._found]


class Unanswered:
    """Rows without an answer among others that have one."""

    def __init__(self) -> None:
        self._rows = Collector(
            "rows without an answer",
            "fault",
            "the others have one: supervised stages end or drop them",
            "write the answers, or remove the rows (clean --drop unanswered)",
        )
        self._answered = False

    def see(self, number: int, record: Record, *, first: bool) -> None:
        """The next row."""
        self._answered = self._answered or bool(record.answers)
        if record.is_unanswered:
            self._rows.add(record.place, record.prompt)

    def found(self, corpus: Corpus, track: Track) -> list[Collector]:
        """Those rows; none if no row has an answer."""
        return [self._rows] if self._answered else []


class Repeated:
    """Rows that stand there before, and prompts that do."""

    def __init__(self) -> None:
        self._prompts: dict[bytes, int] = {}
        self._asked = Collector(
            "prompts with several answers",
            "look",
            "fine for preferences; elsewhere the answers compete",
            "keep one, or split by prompt",
        )

    def see(self, number: int, record: Record, *, first: bool) -> None:
        """The next row."""
        if not first or not record.prompt.strip():
            return
        asked = fingerprint(f"{record.system}\n\n{record.prompt}")
        if self._prompts.setdefault(asked, number) != number:
            self._asked.add(record.place, record.prompt)

    def found(self, corpus: Corpus, track: Track) -> list[Collector]:
        """Rows whose prompt stands there before."""
        return [self._asked]


class Contradictions:
    """Rows that say the opposite of one before them: the same answer with the other label, or the
    same two answers the other way round.
    """

    def __init__(self) -> None:
        self._sides: dict[bytes, bool] = {}
        self._rows = Collector(
            "rows that contradict one before them",
            "fault",
            "what one teaches the other takes back",
            "keep the right one of the two",
        )

    def see(self, number: int, record: Record, *, first: bool) -> None:
        """The next row."""
        answers = [normalized(answer) for answer in record.answers]
        if len(answers) == 2:
            side = answers[0] < answers[1]
        elif answers and record.label is not None:
            side = record.label
        else:
            return
        key = fingerprint("\0".join([record.system, record.prompt, *sorted(answers)]))
        if self._sides.setdefault(key, side) != side:
            self._rows.add(record.place, record.text)

    def found(self, corpus: Corpus, track: Track) -> list[Collector]:
        """Those rows."""
        return [self._rows]


class Near:
    """Rows that are nearly equal.

    Args:
        threshold: Jaccard similarity from which two are.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._numbers, self._kinds = array("q"), array("b")

    def see(self, number: int, record: Record, *, first: bool) -> None:
        """The next row."""
        if first:
            self._numbers.append(number)
            self._kinds.append(kind_of(record))

    def found(self, corpus: Corpus, track: Track) -> list[Collector]:
        """Rows that are like one before them."""
        alike = Collector(
            "near-duplicates",
            "look",
            "as equal rows: they count several times and leak across a split",
            "keep one of each group (clean --drop near)",
        )
        texts = Texts(corpus, self._numbers)
        found = repeated(texts, self._threshold, track, self._kinds)
        for later in sorted(found):
            one, other = (corpus.record(self._numbers[n]) for n in (later, found[later]))
            alike.add(one.place, other.text, one.text)
        return [alike]


class Pairs:
    """Pairs in which there is little to prefer."""

    def __init__(self) -> None:
        self._twins = Collector(
            "pairs whose answers hardly differ",
            "look",
            "there is little to prefer",
            "remove the pairs",
        )
        self._cut = Collector(
            "pairs that differ only in length",
            "look",
            "one answer is the beginning of the other: the model learns the length",
            "remove the pairs",
        )

    def see(self, number: int, record: Record, *, first: bool) -> None:
        """The next row."""
        if not first or len(record.answers) != 2:
            return
        one, other = (words(answer) for answer in record.answers)
        short, long = sorted((one, other), key=len)
        together = sum((Counter(one) & Counter(other)).values())
        if short and len(short) < len(long) and long[: len(short)] == short:
            self._cut.add(record.place, *record.answers)
        elif together >= SAME_ANSWERS * max(len(one), len(other), 1):
            self._twins.add(record.place, *record.answers)

    def found(self, corpus: Corpus, track: Track) -> list[Collector]:
        """Both kinds."""
        return [self._twins, self._cut]


class Openings:
    """Answers that begin alike."""

    def __init__(self) -> None:
        self._numbers, self._begun = array("q"), array("q")

    def see(self, number: int, record: Record, *, first: bool) -> None:
        """The next row."""
        if first and record.answers:
            begun = opening(record.answers[0])
            self._numbers.append(number)
            self._begun.append(_short(begun) if len(begun.split()) == 4 else 0)

    def found(self, corpus: Corpus, track: Track) -> list[Collector]:
        """Answers whose first four words begin many."""
        openings = Collector(
            "answers that begin alike",
            "look",
            "the model learns the phrase before anything else",
            "rewrite them, or keep fewer",
        )
        begun = np.asarray(self._begun)
        if len(begun) >= FEWEST:
            heads, counts = np.unique(begun[begun != 0], return_counts=True)
            frequent = heads[counts > FREQUENT * len(begun)]
            for place in np.flatnonzero(np.isin(begun, frequent)):
                record = corpus.record(self._numbers[place])
                openings.add(record.place, record.answers[0])
        return [openings]


class Overlap:
    """Rows that stand in files of held-out rows.

    Args:
        held_out: those rows.
    """

    def __init__(self, held_out: Iterable[Record]) -> None:
        self._measured = Measured(held_out)
        self._rows = Collector(
            "rows of the held-out files",
            "fault",
            "what is measured there was trained on: the numbers are too good",
            "remove the rows from one of the two (clean --held-out)",
        )

    def see(self, number: int, record: Record, *, first: bool) -> None:
        """The next row."""
        place = self._measured.place_of(record)
        if place is not None:
            self._rows.add(record.place, f"as {place}: {record.text}")

    def found(self, corpus: Corpus, track: Track) -> list[Collector]:
        """Those rows."""
        return [self._rows]


def _short(text: str) -> int:
    """A number of 63 bits that is not 0."""
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 1) | 1
