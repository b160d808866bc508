"""What should not stand in a row: placeholders, refusals, personal data."""

from __future__ import annotations

import bisect
import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator

from alignkit.curation.records import words

PLACEHOLDERS = re.compile(
    r"\{\{\s*\w[\w .-]*\}\}|\[(?:INSERT|YOUR|COMPANY|NAME|DATE|ADDRESS|CITY|EMAIL)\b[^\]\n]{0,40}\]"
    r"|<(?:INSERT|YOUR|NAME|PLACEHOLDER)\b[^>\n]{0,40}>|\blorem ipsum\b"
    r"|(?-i:\bTODO:|\bXXX\b|\bFIXME\b)",
    re.IGNORECASE,
)
"""Text that was to be filled in. Square brackets count only around the usual words."""

REFUSALS = re.compile(
    r"\bas an? (?:ai|artificial intelligence|language model|large language model)\b"
    r"|^\W{0,3}i(?:['’]m| am) (?:sorry|unable|not able),? (?:but )?(?:i |to )?(?:can(?:no|['’])t)?"
    r"|^\W{0,3}(?:sorry,? (?:but )?)?i (?:cannot|can['’]t|won['’]t|am not able to) "
    r"(?:help|assist|comply|provide|answer|do)"
    r"|\bi (?:cannot|can['’]t) (?:fulfill|comply with) (?:this|that|your) request\b",
    re.IGNORECASE,
)
"""How models decline, at the start of an answer or naming themselves."""

_EMAIL = re.compile(r"(?<![\w.+-])\w[\w.+-]{0,63}@(?:[\w-]{1,63}\.)+[a-zA-Z]{2,24}(?![\w-])")
_CARD = re.compile(r"(?<![\d.-])\d(?:[ -]?\d){12,18}(?![\d-])")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_PHONE = re.compile(
    r"(?<![\w.+-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]\d{2,4}){1,4}"
    r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}[.-]\d{3}[.-]\d{4})(?![\w-])"
)
_ADDRESS = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.])")
_SOCIAL = re.compile(r"(?<![\d-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])")
_KEY = re.compile(
    r"\b(?:sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{36,}|AKIA[A-Z0-9]{16}|hf_[A-Za-z0-9]{30,})\b"
)


_ISSUERS = {
    "4": (16, 19),
    **dict.fromkeys(("51", "52", "53", "54", "55", "6011", "65", "35"), (16,)),
    **dict.fromkeys(("34", "37"), (15,)),
    **dict.fromkeys(("22", "23", "24", "25", "26", "27"), (16,)),
}
"""How the numbers of payment cards begin, and their lengths (ISO/IEC 7812)."""


def _is_card(text: str) -> bool:
    """An issuer's beginning and length, and Luhn's check digit."""
    plain = "".join(c for c in text if c.isdigit())
    if not any(plain.startswith(head) and len(plain) in n for head, n in _ISSUERS.items()):
        return False
    digits = [int(c) for c in plain][::-1]
    doubled = (d * 2 - 9 * (d > 4) for d in digits[1::2])
    return len(set(digits)) > 1 and (sum(digits[::2]) + sum(doubled)) % 10 == 0


def _is_iban(text: str) -> bool:
    """ISO 13616's check digits: the number is 1 modulo 97."""
    plain = text.replace(" ", "")
    moved = plain[4:] + plain[:4]
    return 15 <= len(plain) <= 34 and int("".join(str(int(c, 36)) for c in moved)) % 97 == 1


def _is_address(text: str) -> bool:
    """An address of the internet, not of a house or a machine itself."""
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


PII: dict[str, tuple[re.Pattern[str], Callable[[str], bool]]] = {
    "iban": (_IBAN, _is_iban),
    "card": (_CARD, _is_card),
    "email": (_EMAIL, lambda _: True),
    "social security number": (_SOCIAL, lambda _: True),
    "phone": (_PHONE, lambda _: True),
    "ip address": (_ADDRESS, _is_address),
    "key": (_KEY, lambda _: True),
}
"""Kind -> its pattern, and the check digits that a hit must have."""


Recognize = Callable[[str], Iterator[tuple[str, int, int]]]
"""Text -> kind, begin and end of everything that looks like personal data, without overlaps."""


def personal_data(text: str) -> Iterator[tuple[str, int, int]]:
    """What looks like personal data by the patterns of `PII`, as `Recognize` says.

    Args:
        text: of a row.
    """
    hits = [
        (kind, *match.span())
        for kind, (pattern, holds) in PII.items()
        for match in pattern.finditer(text)
        if holds(match[0])
    ]
    return without_overlaps(hits)


def without_overlaps(hits: Iterable[tuple[str, int, int]]) -> Iterator[tuple[str, int, int]]:
    """Hits in the order of the text; of those that overlap, the first.

    Args:
        hits: kind, begin and end, the surer ones first.
    """
    taken: list[tuple[int, int, str]] = []  # in the order of the text
    for kind, begin, end in hits:
        place = bisect.bisect_left(taken, (begin, end, ""))
        before = place == 0 or taken[place - 1][1] <= begin
        if before and (place == len(taken) or end <= taken[place][0]):
            taken.insert(place, (begin, end, kind))
    return iter([(kind, begin, end) for begin, end, kind in taken])


def opening(text: str) -> str:
    """The first four words of an answer, in lower case.

    Args:
        text: of an answer.
    """
    return " ".join(words(text)[:4])
