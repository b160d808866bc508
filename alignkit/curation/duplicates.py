"""Rows that are nearly equal: MinHash in bands on disk, and every candidate compared exactly.

Two texts are near-duplicates if the Jaccard similarity J of their sets of five-character pieces is
at least a threshold. The MinHash of Broder (Compression and Complexity of Sequences, 1997) finds
candidates: with b bands of r values a pair becomes one with probability 1 - (1 - J^r)^b, which is
0.9999 at J = 0.8. Candidates are then compared exactly, so that nothing is found that is not there.
"""

from __future__ import annotations

import functools
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from alignkit.curation.corpus import Track, no_room, untracked
from alignkit.curation.records import Record, normalized
from alignkit.errors import DataError

try:
    from datasketch import MinHash
except ImportError:  # an extra: only looking for near-duplicates needs it
    MinHash = None

PIECE = 5
"""Characters of a piece."""

BANDS, ROWS = 25, 5
"""Bands of a signature, and values in each."""

LOWEST = 0.3
"""Below it two texts are hardly alike, and candidates are missed."""

FIRST = 50
"""Texts of a bucket that the later ones are compared with."""

PARTNERS = 8
"""Earlier texts that a text is known to be like: one of them will stay, or almost surely."""

_BLOCK = 4096
"""Signatures that are written at once."""

_REMEMBERED = 512
"""Texts whose pieces stay in memory: those of a bucket are compared one after another."""


class Texts(Protocol):
    """Texts that are read when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> str: ...


class Groups:
    """Which of some things belong together.

    Args:
        count: of the things; each is alone at first.
    """

    def __init__(self, count: int) -> None:
        self._leaders = np.arange(count)

    def leader(self, number: int) -> int:
        """The first of its group.

        Args:
            number: of a thing.
        """
        leaders = self._leaders
        while leaders[number] != number:
            leaders[number] = number = leaders[leaders[number]]
        return int(number)

    def join(self, one: int, other: int) -> None:
        """Make two groups one.

        Args:
            one: of the first group.
            other: of the second.
        """
        first, second = sorted((self.leader(one), self.leader(other)))
        self._leaders[second] = first

    def leaders(self) -> npt.NDArray[np.int64]:
        """`[count]` the first of each one's group."""
        return np.asarray([self.leader(n) for n in range(len(self._leaders))], np.int64)


def can_look() -> bool:
    """Whether the package that finds candidates is installed."""
    return MinHash is not None


def pieces(text: str) -> set[str]:
    """The five-character pieces of a text; a shorter one is its own.

    Args:
        text: of a row, normalized here.
    """
    plain = normalized(text)
    return {plain[i : i + PIECE] for i in range(max(1, len(plain) - PIECE + 1))}


def similarity(one: set[str], other: set[str]) -> float:
    """Jaccard: the share of common pieces among all of both.

    Args:
        one: pieces of a text.
        other: of another.
    """
    together = len(one & other)
    return together / (len(one) + len(other) - together)


def kind_of(record: Record) -> int:
    """A number for each label, and for which of two answers is the better: rows of other numbers
    teach other things, however alike.

    Args:
        record: a row.
    """
    if len(record.answers) == 2:
        return 3 + (record.answers[0] < record.answers[1])
    return 0 if record.label is None else 1 + record.label


def join_near(groups: Groups, texts: Texts, threshold: float, track: Track = untracked) -> None:
    """Join the groups of texts that are alike, or that others between them make alike.

    Args:
        groups: of the texts.
        texts: of rows.
        threshold: least Jaccard similarity, in [0.3, 1].
        track: tells how much is done.

    Raises:
        DataError: the threshold is out of range, or the package is not installed.
    """

    def together(earlier: int, later: int) -> bool:
        return groups.leader(earlier) == groups.leader(later)

    for earlier, later in _alike(texts, threshold, track, together):
        groups.join(earlier, later)


def repeated(
    texts: Texts, threshold: float, track: Track = untracked, kinds: Sequence[int] | None = None
) -> dict[int, int]:
    """Text -> an earlier one that it is alike, for those that a set without near-duplicates lacks.

    The earlier one is never repeated itself: of a chain whose neighbours alone are alike, every
    other text stays.

    Args:
        texts: of rows; equal ones are best left out beforehand.
        threshold: least Jaccard similarity, in [0.3, 1].
        track: tells how much is done.
        kinds: a number for each text; those of different numbers are not compared.

    Raises:
        DataError: the threshold is out of range, or the package is not installed.
    """
    partners: dict[int, list[int]] = {}

    def known(earlier: int, later: int) -> bool:
        found = partners.get(later, ())
        other = kinds is not None and kinds[earlier] != kinds[later]
        return other or len(found) >= PARTNERS or earlier in found

    for earlier, later in _alike(texts, threshold, track, known):
        partners.setdefault(later, []).append(earlier)
    found: dict[int, int] = {}
    for later in sorted(partners):
        kept = next((one for one in sorted(partners[later]) if one not in found), None)
        if kept is not None:
            found[later] = kept
    return found


def _alike(
    texts: Texts, threshold: float, track: Track, skip: Callable[[int, int], bool]
) -> Iterator[tuple[int, int]]:
    """Pairs of texts that are alike, the earlier one first; some of them several times.

    A text in a bucket of many is compared with the first `FIRST` of it.
    """
    if not LOWEST <= threshold <= 1.0:
        raise DataError(
            f"--threshold must be between {LOWEST:g} and 1, got {threshold:g}",
            hint="0.8 finds rows that share eight of ten pieces",
        )
    if len(texts) < 2:
        return
    if MinHash is None:
        raise DataError(
            "looking for near-duplicates needs the package datasketch, which is not installed",
            hint="pip install 'alignkit[data]'",
        )

    @functools.lru_cache(_REMEMBERED)
    def known(number: int) -> set[str]:
        return pieces(texts[number])

    with tempfile.TemporaryFile() as file:
        try:  # a disk that is full is an error here, and would end the process later
            os.posix_fallocate(file.fileno(), 0, BANDS * len(texts) * 8)
        except OSError as error:
            raise no_room(error) from None
        keys = np.memmap(file, np.uint64, "r+", shape=(BANDS, len(texts)))
        _write_keys(keys, texts, track)
        for band in track(range(BANDS), "comparing rows that look alike: bands", BANDS):
            for bucket in _buckets(keys[band]):
                for place, later in enumerate(bucket):
                    for earlier in bucket[: min(place, FIRST)]:
                        if skip(earlier, later):
                            continue
                        if similarity(known(earlier), known(later)) >= threshold:
                            yield earlier, later


def _write_keys(keys: npt.NDArray[np.uint64], texts: Texts, track: Track) -> None:
    """Band -> a number for each text: equal where all values of the band's signature are."""
    numbers = track(range(len(texts)), "signing rows", len(texts))
    sets = ([p.encode("utf-8", "replace") for p in pieces(texts[n])] for n in numbers)
    signed: Iterator[Any] = MinHash.generator(
        sets, num_perm=BANDS * ROWS, seed=0, hashfunc=zlib.crc32
    )
    for begin in range(0, len(texts), _BLOCK):
        values = np.stack([made.hashvalues for made in islice(signed, _BLOCK)]).astype(np.uint64)
        mixed = np.zeros((len(values), BANDS), np.uint64)
        for column in range(ROWS):  # a collision makes one more candidate, no more
            mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + values[:, column::ROWS]
        keys[:, begin : begin + len(values)] = mixed.T


def _buckets(keys: npt.NDArray[np.uint64]) -> Iterator[list[int]]:
    """Texts with the same key, in order, where there are several."""
    order = np.argsort(keys, kind="stable")
    ends = np.flatnonzero(np.diff(np.asarray(keys)[order])) + 1
    bounds = np.concatenate([[0], ends, [len(order)]])
    for place in np.flatnonzero(np.diff(bounds) > 1):
        yield order[bounds[place] : bounds[place + 1]].tolist()
