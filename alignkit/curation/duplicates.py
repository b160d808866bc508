"""Rows that are nearly equal: MinHash in bands on disk, and every candidate compared exactly.

Two texts are near-duplicates if the Jaccard similarity J of their sets of five-character pieces is
at least a threshold. The MinHash of Broder (Compression and Complexity of Sequences, 1997) finds
candidates: with b bands of r values a pair becomes one with probability 1 - (1 - J^r)^b, which is
0.9999 at J = 0.8. Candidates are then compared exactly, so that nothing is found that is not there.
"""

from __future__ import annotations

import functools
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from alignkit.curation.corpus import Track, untracked
from alignkit.curation.records import normalized
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

NEAREST = 50
"""A text is compared with so many before it in its bucket."""

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


def kind_of(label: bool | None) -> int:
    """A number for each label: rows of other labels are no duplicates, however alike.

    Args:
        label: of a row; None without one.
    """
    return 0 if label is None else 1 + label


def join_near(
    groups: Groups,
    texts: Texts,
    threshold: float,
    track: Track = untracked,
    *,
    kinds: Sequence[int] | None = None,
    seed: int = 0,
) -> None:
    """Join the groups of texts that are alike.

    A text in a bucket of many is compared with the `NEAREST` before it, unless it belongs to them
    already.

    Args:
        groups: of the texts.
        texts: of rows; equal ones are best left out beforehand.
        threshold: least Jaccard similarity, in [0.3, 1].
        track: tells how much is done.
        kinds: a number for each text; those of different numbers are not joined. None joins all.
        seed: of the permutations.

    Raises:
        DataError: the threshold is out of range, or the package is not installed.
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
        keys = np.memmap(file, np.uint64, "w+", shape=(BANDS, len(texts)))
        _write_keys(keys, texts, seed, track)
        for band in track(range(BANDS), "comparing rows that look alike: bands", BANDS):
            for bucket in _buckets(keys[band]):
                for part in _of_one_kind(bucket, kinds):
                    _compare(part, groups, known, threshold)


def _write_keys(keys: npt.NDArray[np.uint64], texts: Texts, seed: int, track: Track) -> None:
    """Band -> a number for each text: equal where all values of the band's signature are."""
    numbers = track(range(len(texts)), "signing rows", len(texts))
    sets = ([p.encode("utf-8", "replace") for p in pieces(texts[n])] for n in numbers)
    signed: Iterator[Any] = MinHash.generator(
        sets, num_perm=BANDS * ROWS, seed=seed, hashfunc=zlib.crc32
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


def _of_one_kind(bucket: list[int], kinds: Sequence[int] | None) -> list[list[int]]:
    if kinds is None:
        return [bucket]
    return [[n for n in bucket if kinds[n] == kind] for kind in {kinds[n] for n in bucket}]


def _compare(
    bucket: list[int], groups: Groups, known: Callable[[int], set[str]], threshold: float
) -> None:
    for place, later in enumerate(bucket):
        for earlier in bucket[max(0, place - NEAREST) : place]:
            if groups.leader(earlier) == groups.leader(later):
                continue
            if similarity(known(earlier), known(later)) >= threshold:
                groups.join(earlier, later)
