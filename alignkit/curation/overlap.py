"""Rows that repeat what a model is to be measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from alignkit.curation.records import Record, fingerprint, words

GRAM = 13
"""Words of a gram, as in Brown et al. (arXiv:2005.14165, appendix C)."""


class Measured:
    """The prompts and long passages of rows that a model is measured on.

    Args:
        records: these rows.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self.prompts: dict[bytes, str] = {}
        self.grams: dict[bytes, str] = {}
        for record in records:
            if record.prompt.strip():
                self.prompts.setdefault(fingerprint(record.prompt), record.place)
            for gram in _grams(record.text):
                self.grams.setdefault(gram, record.place)

    def place_of(self, record: Record) -> str | None:
        """Place of a measured row that a row repeats: its prompt, or thirteen words in a row.

        Args:
            record: the row.
        """
        asked = record.prompt.strip()
        same = self.prompts.get(fingerprint(record.prompt)) if asked else None
        if same is not None:
            return same
        found = (self.grams[gram] for gram in _grams(record.text) if gram in self.grams)
        return next(found, None)


def _grams(text: str) -> Iterator[bytes]:
    found = words(text)
    for i in range(len(found) - GRAM + 1):
        gram = " ".join(found[i : i + GRAM])
        yield hashlib.blake2b(gram.encode("utf-8", "replace"), digest_size=12).digest()
