"""What is so in rows, where nothing is wrong: kinds, speakers, lengths, labels, languages."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from alignkit.curation.records import Record, words
from alignkit.curation.rules import SPOKEN

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Values of max_length whose price is told."""


class Facts:
    """Counts over rows.

    Args:
        count: length of a text in the model's tokens; None counts words.
        language: text -> its language; None does not look.
    """

    def __init__(
        self, count: Callable[[str], int] | None, language: Callable[[str], str] | None
    ) -> None:
        self._unit = "words" if count is None else "tokens, without those of the template"
        self._count = count or (lambda text: len(words(text)))
        self._language = language
        self._kinds, self._roles = Counter[str](), Counter[str]()
        self._labels, self._spoken = Counter[bool](), Counter[str]()
        self._lengths = array("q")
        self._longer = 0

    def see(self, record: Record) -> None:
        """The next row.

        Args:
            record: the row.
        """
        self._kinds[_kind(record)] += 1
        self._roles[" ".join(record.roles) or "plain text"] += 1
        answers = [self._count(answer) for answer in record.answers]
        asked = self._count(record.system) + self._count(record.prompt)
        self._lengths.append(asked + max(answers, default=0))
        if record.label is not None:
            self._labels[record.label] += 1
        if len(record.answers) == 2:
            self._longer += len(record.answers[0]) > len(record.answers[1])
        if self._language is not None and len(record.text) >= SPOKEN:
            self._spoken[self._language(record.text)] += 1

    def found(self) -> dict[str, Any]:
        """Name -> what is so; an empty value says nothing."""
        facts: dict[str, Any] = {
            "kinds": dict(self._kinds.most_common()),
            "roles": dict(self._roles.most_common(6)),
            "lengths": self._percentiles(),
        }
        if self._labels:
            facts["labels"] = {str(k).lower(): count for k, count in self._labels.most_common()}
        if self._kinds["pairs"]:
            facts["chosen is longer"] = round(self._longer / self._kinds["pairs"], 3)
        if self._language is not None:
            facts["languages"] = dict(self._spoken.most_common(8))
        return facts

    def _percentiles(self) -> dict[str, Any]:
        """Lengths of rows, and what each max_length would cut."""
        if not self._lengths:
            return {}
        found = np.asarray(self._lengths)
        names = {"median": 50, "90%": 90, "99%": 99, "longest": 100}
        said = {n: int(np.percentile(found, p, method="higher")) for n, p in names.items()}
        cut = {str(limit): int((found > limit).sum()) for limit in LENGTHS if (found > limit).any()}
        return {"unit": self._unit, **said, "longer than": cut}


def _kind(record: Record) -> str:
    if len(record.answers) == 2:
        return "pairs"
    if not record.answers:
        return "prompts"
    return "answers" if record.label is None else "labelled"
