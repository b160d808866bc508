"""Rewards that need no model: the right answer, a pattern, a length, valid JSON, a lexicon."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from alignkit.errors import RewardError
from alignkit.generation.rewards.responses import Response
from alignkit.limits import TimeUp, time_limit
from alignkit.recipe.rules import (
    ExactReward,
    FormatReward,
    JsonReward,
    LengthReward,
    NumericReward,
    RegexReward,
    RuleReward,
)

# a sign counts where it cannot be a minus between two numbers or a hyphen
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]])[-−])?(?:[$€£](?P<inner>[-−])?)?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
    r"(?P<power>[eE][-+]?\d{1,3}(?!\w))?"
)
_FENCE = re.compile(r"```\w*[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL)


Numbers = Callable[[Sequence[Response]], list[float]]


def rule_score(spec: RuleReward) -> Numbers:
    """The score of a rule that needs no process of its own.

    Args:
        spec: the rule with its settings.

    Returns:
        A function from responses to one number for each. It raises RewardError where a row lacks
        the column that the rule compares with, or holds nothing comparable in it, and where a
        pattern takes too long.

    Raises:
        RewardError: the rule needs a package that is not installed.
    """
    if isinstance(spec, RegexReward | FormatReward):
        return _pattern_score(spec)
    judge = _judge(spec)
    return lambda responses: [judge(response) for response in responses]


def _judge(spec: RuleReward) -> Callable[[Response], float]:
    if isinstance(spec, ExactReward):
        return lambda response: exact(response, spec)
    if isinstance(spec, NumericReward):
        return lambda response: numeric(response, spec)
    if isinstance(spec, LengthReward):
        return lambda response: length(response.text, spec)
    if isinstance(spec, JsonReward):
        return lambda response: valid_json(response.text, spec.keys)
    compound = _lexicon()
    return lambda response: compound(response.text)


def _pattern_score(spec: RegexReward | FormatReward) -> Numbers:
    """1 for each response that the pattern matches, else 0; an error if it comes to no end."""
    pattern = re.compile(spec.pattern, re.DOTALL)
    whole = isinstance(spec, FormatReward)

    def match(text: str) -> re.Match[str] | None:
        return pattern.fullmatch(text.strip()) if whole else pattern.search(text)

    def run(responses: Sequence[Response]) -> list[float]:
        try:
            with time_limit(spec.timeout):
                found = [match(response.text) for response in responses]
        except TimeUp:
            raise RewardError(
                f"the pattern of the reward rule `{spec.rule}` takes more than {spec.timeout:g} "
                "seconds",
                hint="repeats inside repeats, as in (a+)+, can be tried in too many ways: simplify "
                "the pattern, or raise reward.timeout",
            ) from None
        return [float(one is not None) for one in found]

    return run


def exact(response: Response, spec: ExactReward) -> float:
    """1 if the response is the text of the column, else 0.

    Args:
        response: with the column in its row; a number there counts as its digits.
        spec: the column, and whether case, surrounding spaces and a final full stop count.
    """
    expected, text = str(row_column(response, spec.column, spec.rule)), response.text
    if spec.ignore_case:
        expected, text = _bare(expected), _bare(text)
    return float(text == expected)


def _bare(text: str) -> str:
    return text.strip().removesuffix(".").rstrip().casefold()


def numeric(response: Response, spec: NumericReward) -> float:
    """1 if the last number of the response is the right one, else 0.

    Args:
        response: with the column in its row: a number, or text whose last number is the right one;
            only what follows `####` counts if it holds that, as in GSM8K.
        spec: the column, and the accepted difference relative to the right number.

    Raises:
        RewardError: the column holds no number.
    """
    value = row_column(response, spec.column, spec.rule)
    right = last_number(str(value).rpartition("####")[2])
    if right is None:
        raise RewardError(
            f"{response.place}: the reward rule `{spec.rule}` finds no number in "
            f"{spec.column!r}: {_short(value)}",
            hint="name another column with reward.column, or remove the row",
        )
    number = last_number(response.text)
    if number is None:
        return 0.0
    return float(abs(number - right) <= Decimal(str(spec.tolerance)) * abs(right))


def last_number(text: str) -> Decimal | None:
    """The last number of a text, exactly; None if there is none.

    Args:
        text: `1,234.50`, `$18`, `-3` and the `72` of `is 72.` are numbers; a fraction is two.
    """
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    last = numbers[-1]
    number = Decimal(last["digits"].replace(",", "") + (last["power"] or ""))
    return -number if last["sign"] or last["inner"] else number


def length(text: str, spec: LengthReward) -> float:
    """1 within the range of lengths; outside, 1 minus the relative distance, at least 0.

    Args:
        text: the response.
        spec: the range, in words or characters.
    """
    count = len(text.split()) if spec.unit == "words" else len(text)
    if count < spec.min:
        return count / spec.min
    return max(0.0, 1.0 - max(0, count - spec.max) / spec.max)


def valid_json(response: str, keys: Sequence[str] = ()) -> float:
    """1 if the response is one JSON value, else 0.

    Args:
        response: its text; a code fence around the whole of it is removed.
        keys: if there are any, the value must be an object that has them all.
    """
    try:
        # numbers stay text: Python refuses to build some that are valid JSON
        value = json.loads(
            bare_json(response), parse_int=str, parse_float=str, parse_constant=refuse_constant
        )
    except (ValueError, RecursionError):
        return 0.0
    return float(not keys or (isinstance(value, dict) and all(key in value for key in keys)))


def bare_json(response: str) -> str:
    """The response without a code fence around the whole of it.

    Args:
        response: its text.
    """
    text = response.strip()
    fenced = _FENCE.fullmatch(text)
    return fenced[1] if fenced else text


def refuse_constant(word: str) -> None:
    """For `json.loads`: NaN and Infinity are no JSON.

    Args:
        word: as it stands there.
    """
    raise ValueError(f"{word} is not JSON, though Python reads it")


def _lexicon() -> Callable[[str], float]:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise RewardError(
            "the reward rule `sentiment` needs the package vaderSentiment, which is not installed",
            hint="pip install 'alignkit[sentiment]'",
        ) from None
    analyzer = SentimentIntensityAnalyzer()
    return lambda text: float(analyzer.polarity_scores(text)["compound"])


def row_column(
    response: Response, column: str, rule: str, *, lists: bool = False, objects: bool = False
) -> Any:
    """The row's value of a column: text or a number.

    Args:
        response: with its row.
        column: its name.
        rule: that asks.
        lists: accept a list of texts too.
        objects: accept an object too.

    Raises:
        RewardError: there is no such column, or it holds something else.
    """
    if column not in response.columns:
        raise RewardError(
            f"{response.place}: the row has no column {column!r}, which the reward rule "
            f"`{rule}` compares with",
            hint=f"its columns are {', '.join(response.columns)}; name one with reward.column",
        )
    value = response.columns[column]
    if objects and isinstance(value, dict):
        return value
    if lists and isinstance(value, list) and all(isinstance(one, str) for one in value):
        return value
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RewardError(
            f"{response.place}: the reward rule `{rule}` compares with text or a number, and "
            f"{column!r} is {_short(value)}",
            hint="name another column with reward.column, or remove the row",
        )
    return value


def _short(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
