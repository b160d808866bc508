"""Marks of poor text: the filters of Gopher (Rae et al., arXiv:2112.11446, table A1).

They were made for pages of the web. Shares are of words or lines; a text that has fewer words or
lines than a share can be told from has none.
"""

from __future__ import annotations

import re
from collections import Counter

from alignkit.curation.records import words

FEWEST_WORDS, FEWEST_LINES = 20, 5
"""What a share is told from."""

PROSE = 50
"""Words that a mean is told from: short sentences have short words."""

MAX_SYMBOLS = 0.1
"""`#` and ellipses for each word."""

MAX_BULLETS = 0.9
"""Share of the lines that begin with a bullet."""

MAX_ELLIPSES = 0.3
"""Share of the lines that end with an ellipsis."""

MIN_LETTERED = 0.8
"""Share of the words that hold a letter."""

WORD_LENGTH = (3.0, 10.0)
"""Characters of a mean word."""

MAX_REPEATED_LINES = 0.3
"""Share of the lines that stand there before."""

MAX_REPETITION = 0.3
"""Share of word four-grams that stand there before."""

STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
"""Every English text of some length has two of them."""

_BULLET = re.compile(r"[-*•‣▪●–]\s")
_ELLIPSIS = ("...", "…")


def symbols(text: str) -> float:
    """`#` and ellipses for each word.

    Args:
        text: of an answer.
    """
    count = text.count("#") + len(re.findall(r"\.\.\.|…", text))
    return count / len(spaced) if len(spaced := text.split()) >= FEWEST_WORDS else 0.0


def bullets(text: str) -> float:
    """Share of the lines that begin with a bullet.

    Args:
        text: of an answer.
    """
    return _share([_BULLET.match(line) is not None for line in _lines(text)])


def ellipses(text: str) -> float:
    """Share of the lines that end with an ellipsis.

    Args:
        text: of an answer.
    """
    return _share([line.endswith(_ELLIPSIS) for line in _lines(text)])


def lettered(text: str) -> float:
    """Share of the words that hold a letter.

    Args:
        text: of an answer.
    """
    spaced = text.split()
    held = sum(any(c.isalpha() for c in word) for word in spaced)
    return held / len(spaced) if len(spaced) >= FEWEST_WORDS else 1.0


def word_length(text: str) -> float | None:
    """Characters of a mean word; None if there are too few.

    Args:
        text: of an answer.
    """
    found = words(text)
    return sum(map(len, found)) / len(found) if len(found) >= PROSE else None


def repeated_lines(text: str) -> float:
    """Share of the lines that stand there before.

    Args:
        text: of an answer.
    """
    lines = _lines(text)
    return 1.0 - len(set(lines)) / len(lines) if len(lines) >= FEWEST_LINES else 0.0


def repetition(text: str, size: int = 4) -> float:
    """Share of word four-grams that stand there before.

    Args:
        text: of an answer.
        size: words of a gram.
    """
    found = words(text)
    if len(found) < FEWEST_WORDS:
        return 0.0
    grams = Counter(tuple(found[i : i + size]) for i in range(len(found) - size + 1))
    return 1.0 - len(grams) / sum(grams.values())


def is_english(text: str) -> bool:
    """Whether a text has two stop words, or is too short to tell.

    Args:
        text: of an answer.
    """
    found = words(text)
    return len(found) < FEWEST_WORDS or len(STOP_WORDS.intersection(found)) >= 2


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _share(held: list[bool]) -> float:
    return sum(held) / len(held) if len(held) >= FEWEST_LINES else 0.0
