"""Rows that repeat what a model is to be measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from alignkit.curation.records import fingerprint, words

GRAM = 13
"""Words of a gram, as in Brown et al. (arXiv:2005.14165, appendix C)."""


class Measured:
    """The prompts and long passages of files that a model is measured on.

    Args:
        texts: prompt, and the whole row, of each of their rows, with its place.
    """

    def __init__(self, texts: Iterable[tuple[str, str, str]]) -> None:
        self.prompts: dict[bytes, str] = {}
        self.grams: dict[bytes, str] = {}
        for prompt, whole, place in texts:
            if prompt.strip():
                self.prompts.setdefault(fingerprint(prompt), place)
            for gram in _grams(whole):
                self.grams.setdefault(gram, place)

    def place_in(self, prompt: str, whole: str) -> str | None:
        """Place of a measured row that a row repeats: its prompt, or thirteen words in a row.

        Args:
            prompt: of the row.
            whole: all of its text.
        """
        same = self.prompts.get(fingerprint(prompt)) if prompt.strip() else None
        if same is not None:
            return same
        return next((self.grams[gram] for gram in _grams(whole) if gram in self.grams), None)


def _grams(text: str) -> Iterator[bytes]:
    found = words(text)
    for i in range(len(found) - GRAM + 1):
        gram = " ".join(found[i : i + GRAM])
        yield hashlib.blake2b(gram.encode("utf-8", "replace"), digest_size=12).digest()
