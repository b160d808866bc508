"""Rows that repeat what a model is to be measured on."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from alignkit.curation.records import Record, fingerprint, words

GRAM = 13
"""Words of a gram, as in Brown et al. (arXiv:2005.14165, appendix C)."""


class Measured:
    """The prompts and long passages of rows that a model is measured on; 12 bytes a word.

    What the system says does not count: rows may have it in common.

    Args:
        records: these rows.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self._places: list[str] = []
        self._prompts: dict[bytes, int] = {}
        grams, rows = array("Q"), array("I")
        for number, record in enumerate(records):
            self._places.append(record.place)
            if record.prompt.strip():
                self._prompts.setdefault(fingerprint(record.prompt), number)
            found = _grams(record.text)
            grams.extend(found)
            rows.extend([number] * len(found))
        order = np.argsort(np.asarray(grams, np.uint64), kind="stable")
        self._grams = np.asarray(grams, np.uint64)[order]
        self._rows = np.asarray(rows, np.uint32)[order]

    def place_of(self, record: Record) -> str | None:
        """Place of a measured row that a row repeats: its prompt, or thirteen words in a row.

        Args:
            record: the row.
        """
        asked = record.prompt.strip()
        same = self._prompts.get(fingerprint(record.prompt)) if asked else None
        if same is not None:
            return self._places[same]
        wanted = np.asarray(_grams(record.text), np.uint64)
        if not len(wanted) or not len(self._grams):
            return None
        at: npt.NDArray[np.int64] = np.searchsorted(self._grams, wanted)
        at = np.minimum(at, len(self._grams) - 1)
        found = np.flatnonzero(self._grams[at] == wanted)
        return self._places[self._rows[at[found[0]]]] if len(found) else None


def _grams(text: str) -> list[int]:
    """64 bits of each gram: among a billion of them one in twenty billion others is mistaken."""
    found = words(text)
    grams = (" ".join(found[i : i + GRAM]) for i in range(len(found) - GRAM + 1))
    digests = (
        hashlib.blake2b(gram.encode("utf-8", "replace"), digest_size=8).digest() for gram in grams
    )
    return [int.from_bytes(digest, "little") for digest in digests]
