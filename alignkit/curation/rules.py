"""What a row has by itself: each rule with why it matters, for looking and for removing alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from alignkit.curation import quality
from alignkit.curation.findings import Collector, Weight
from alignkit.curation.patterns import PLACEHOLDERS, REFUSALS, Recognize, personal_data
from alignkit.curation.records import Record, normalized, words

PERSONAL = "personal-data"

SPOKEN = 40
"""Characters that a language is recognized from."""

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


def _answer(poor: Callable[[str], bool]) -> Callable[[Record], str | None]:
    """A row's answer, where it is poor."""

    def hit(record: Record) -> str | None:
        answer = record.answers[0] if record.answers else ""
        return answer if poor(answer) else None

    return hit


def _odd_words(answer: str) -> bool:
    least, most = quality.WORD_LENGTH
    length = quality.word_length(answer)
    return length is not None and not least <= length <= most


def personal(recognize: Recognize = personal_data) -> Rule:
    """The rule of personal data.

    Args:
        recognize: says where it stands.
    """

    def hit(record: Record) -> str | None:
        found = next(recognize(record.whole), None)
        return None if found is None else f"{found[0]}: {record.whole[found[1] : found[2]]}"

    return Rule(
        "personal data",
        "look",
        "the model may repeat it to anyone",
        "mask it (clean --mask), or remove the rows (clean --drop personal-data)",
        hit,
    )


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
        _answer(lambda text: quality.repetition(text) > quality.MAX_REPETITION),
    ),
    "lines": Rule(
        "answers whose lines repeat",
        "look",
        "the model learns to go round in circles; verses and tables do so, too",
        "remove the rows (clean --drop lines)",
        _answer(lambda text: quality.repeated_lines(text) > quality.MAX_REPEATED_LINES),
    ),
    "ellipses": Rule(
        "answers of unfinished lines",
        "look",
        "they end in an ellipsis, as previews of other pages do",
        "remove the rows (clean --drop ellipses)",
        _answer(lambda text: quality.ellipses(text) > quality.MAX_ELLIPSES),
    ),
}
"""Name by which `clean` removes what a rule finds -> the rule. `check` looks for all of them."""

FILTERS: dict[str, Rule] = {
    "symbols": Rule(
        "answers full of # and …",
        "look",
        "scraped menus and teasers look like this",
        "",
        _answer(lambda text: quality.symbols(text) > quality.MAX_SYMBOLS),
    ),
    "word-length": Rule(
        "answers of odd words",
        "look",
        "a mean word has fewer than 3 characters or more than 10: spaced-out or run-on text",
        "",
        _answer(_odd_words),
    ),
    PERSONAL: personal(),
    "bullets": Rule(
        "answers of bullets alone",
        "look",
        "the model learns to list where it should explain",
        "",
        _answer(lambda text: quality.bullets(text) > quality.MAX_BULLETS),
    ),
    "letters": Rule(
        "answers with few letters",
        "look",
        "numbers and marks: fine for arithmetic and tables, else an extraction that failed",
        "",
        _answer(lambda text: quality.lettered(text) < quality.MIN_LETTERED),
    ),
    "stop-words": Rule(
        "answers without stop words",
        "look",
        "no English prose",
        "",
        _answer(lambda text: not quality.is_english(text)),
    ),
}
"""Further ones that are removed by name only: what they find is often as it should be."""


def listed_words(unwanted: Sequence[str]) -> Rule:
    """The rule of a word list.

    Args:
        unwanted: words.
    """
    known = {word.casefold() for word in unwanted}

    def hit(record: Record) -> str | None:
        return record.whole if known & set(words(record.whole)) else None

    return Rule("words of the list", "look", "you asked for them", "remove the rows", hit)


def lengths(least: int | None, most: int | None) -> Rule:
    """The rule of answers that are too short or too long.

    Args:
        least: words; None for any.
        most: words; None for any.
    """

    def poor(answer: str) -> bool:
        count = len(words(answer))
        return (least is not None and count < least) or (most is not None and count > most)

    return Rule("answers of other lengths", "look", "you asked for them", "", _answer(poor))


def languages(kept: Sequence[str], language: Callable[[str], str]) -> Rule:
    """The rule of rows in other languages; short ones may be in any.

    Args:
        kept: languages that stay.
        language: text -> its language.
    """

    def hit(record: Record) -> str | None:
        if len(record.text) < SPOKEN or (spoken := language(record.text)) in kept:
            return None
        return spoken

    return Rule("rows in other languages", "look", "you asked for them", "", hit)
