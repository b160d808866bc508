"""What a row has by itself: each rule with why it matters, for looking and for removing alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from alignkit.curation.findings import Collector, Weight
from alignkit.curation.patterns import PLACEHOLDERS, REFUSALS, personal_data, repeated_share
from alignkit.curation.records import Record, normalized, words

REPETITIVE = 0.3
"""Share of repeated four-grams of an answer that is told."""

COPIED = 5
"""Words of an answer whose standing in the prompt is told."""


@dataclass(frozen=True)
class Rule:
    """Something that a row may have.

    Args:
        name: of the finding.
        weight: of the finding.
        why: what it does to a model.
        mend: what to do.
        hit: row -> what it looks like; None if it does not have it.
    """

    name: str
    weight: Weight
    why: str
    mend: str
    hit: Callable[[Record], str | None]

    def collector(self) -> Collector:
        """To count the rows that have it."""
        return Collector(self.name, self.weight, self.why, self.mend)


def _placeholder(record: Record) -> str | None:
    found = PLACEHOLDERS.search(record.text)
    return found[0] if found else None


def _leak(record: Record) -> str | None:
    answer = record.answers[0] if record.answers else ""
    copied = len(words(answer)) >= COPIED and normalized(answer) in normalized(record.prompt)
    return answer if copied else None


def _refusal(record: Record) -> str | None:
    answer = record.answers[0] if record.answers else ""
    return answer if REFUSALS.search(answer[:400]) else None


def _repetition(record: Record) -> str | None:
    answer = record.answers[0] if record.answers else ""
    return answer if repeated_share(answer) > REPETITIVE else None


def _personal(record: Record) -> str | None:
    hit = next(personal_data(record.text), None)
    return None if hit is None else f"{hit[0]}: {record.text[hit[1] : hit[2]]}"


RULES: dict[str, Rule] = {
    "placeholders": Rule(
        "placeholders",
        "fault",
        "the model learns to write them",
        "fill them in, or remove the rows (clean --drop placeholders)",
        _placeholder,
    ),
    "leaks": Rule(
        "answers that stand in their prompt",
        "look",
        "the model learns to copy; fine for extraction, wrong for questions",
        "remove the answer from the prompt, or the rows (clean --drop leaks)",
        _leak,
    ),
    "refusals": Rule(
        "refusals and talk of being a model",
        "look",
        "the model learns to decline, or to speak of itself",
        "remove the rows if that is not wanted (clean --drop refusals)",
        _refusal,
    ),
    "repetition": Rule(
        "repetitive answers",
        "fault",
        "the model learns to go round in circles",
        "remove the rows (clean --drop repetition)",
        _repetition,
    ),
    "personal-data": Rule(
        "personal data",
        "look",
        "the model may repeat it to anyone",
        "mask it (clean --mask), or remove the rows (clean --drop personal-data)",
        _personal,
    ),
}
"""Name by which `clean` removes what a rule finds -> the rule."""


def listed_words(unwanted: Sequence[str]) -> Rule:
    """The rule of a word list.

    Args:
        unwanted: words.
    """
    known = {word.casefold() for word in unwanted}

    def hit(record: Record) -> str | None:
        return record.text if known & set(words(record.text)) else None

    return Rule("words of the list", "look", "you asked for them", "remove the rows", hit)
