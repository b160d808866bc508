"""Rows that are equal, or nearly: MinHash in bands, and every candidate compared exactly.

Two texts are near-duplicates if the Jaccard similarity J of their sets of five-character pieces is
at least a threshold. The MinHash of Broder (Compression and Complexity of Sequences, 1997) finds
candidates: with b bands of r values a pair becomes one with probability 1 - (1 - J^r)^b, which is
0.9999 at J = 0.8. Candidates are then compared exactly, so that nothing is found that is not there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

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


def signatures(texts: Sequence[str], seed: int = 0) -> npt.NDArray[np.uint64]:
    """`[n, BANDS * ROWS]` MinHash values of each text.

    Args:
        texts: of rows.
        seed: of the permutations.

    Raises:
        DataError: the package is not installed.
    """
    if MinHash is None:
        raise DataError(
            "looking for near-duplicates needs the package datasketch, which is not installed",
            hint="pip install 'alignkit[data]'",
        )
    count = BANDS * ROWS
    found = np.empty((len(texts), count), np.uint64)
    sets = ([piece.encode("utf-8", "replace") for piece in pieces(text)] for text in texts)
    for number, made in enumerate(MinHash.generator(sets, num_perm=count, seed=seed)):
        found[number] = made.hashvalues
    return found


def near_duplicates(
    texts: Sequence[str],
    threshold: float,
    sign: Callable[[Sequence[str]], npt.NDArray[np.uint64]] = signatures,
) -> list[tuple[int, int, float]]:
    """Pairs of texts that are alike, the earlier one first, with their similarity.

    Args:
        texts: of rows; equal ones are best left out beforehand.
        threshold: least Jaccard similarity, in [0.3, 1].
        sign: gives signatures.

    Returns:
        In the order of the later text. A text in a bucket of many is compared with the `NEAREST`
        before it, so that of a large group every member has a partner, not every pair.

    Raises:
        DataError: the threshold is out of range, or the package is not installed.
    """
    if not LOWEST <= threshold <= 1.0:
        raise DataError(
            f"--threshold must be between {LOWEST:g} and 1, got {threshold:g}",
            hint="0.8 finds rows that share eight of ten pieces",
        )
    if len(texts) < 2:
        return []
    values = sign(texts)
    pairs: set[tuple[int, int]] = set()
    for band in range(BANDS):
        part = np.ascontiguousarray(values[:, band * ROWS : (band + 1) * ROWS])
        keys = part.view(np.dtype((np.void, part.dtype.itemsize * ROWS)))[:, 0]
        order = np.argsort(keys, kind="stable")
        ends = np.flatnonzero(keys[order][1:] != keys[order][:-1]) + 1
        for begin, end in pairwise([0, *ends.tolist(), len(order)]):
            members = order[begin:end].tolist()
            for place, later in enumerate(members):
                pairs.update(
                    (earlier, later) for earlier in members[max(0, place - NEAREST) : place]
                )
    sets: dict[int, set[str]] = {}
    found = []
    for earlier, later in sorted(pairs, key=lambda pair: (pair[1], pair[0])):
        one, other = (sets.setdefault(i, pieces(texts[i])) for i in (earlier, later))
        alike = similarity(one, other)
        if alike >= threshold:
            found.append((earlier, later, alike))
    return found


def groups(pairs: Sequence[tuple[int, int, float]]) -> dict[int, int]:
    """Text -> the first text of its group, for every text with a partner.

    Args:
        pairs: as from `near_duplicates`.
    """
    leaders: dict[int, int] = {}

    def leader(text: int) -> int:
        while leaders.get(text, text) != text:
            text = leaders[text]
        return text

    for one, other, _ in pairs:
        first, second = sorted((leader(one), leader(other)))
        leaders[first], leaders[second] = first, first
    return {text: leader(text) for text in leaders}


def equal(keys: Sequence[bytes]) -> dict[bytes, list[int]]:
    """Key -> the places of each key that stands there several times.

    Args:
        keys: fingerprints.
    """
    places: dict[bytes, list[int]] = defaultdict(list)
    for place, key in enumerate(keys):
        places[key].append(place)
    return {key: found for key, found in places.items() if len(found) > 1}
