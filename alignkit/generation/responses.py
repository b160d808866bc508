"""What a reward source takes and returns: responses with their rows, and a number for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from alignkit.errors import RewardError


@dataclass(frozen=True)
class Response:
    """One sampled response, as text.

    Args:
        prompt: as in the row: text, or turns with `role` and `content`.
        text: decoded, without special tokens.
        columns: every value of the row.
        place: `file:line` of the row.
    """

    prompt: str | list[dict[str, str]]
    text: str
    columns: dict[str, Any]
    place: str


Score = Callable[[Sequence[Response]], list[float]]
"""Responses -> one number for each, in their order."""


def checked(name: str, score: Callable[[Sequence[Response]], Any]) -> Score:
    """The same scores, but only ever as many finite numbers as there are responses.

    Args:
        name: of the source, for messages.
        score: may return a list, a tuple, an array or a tensor, with numbers or true and false.

    Returns:
        A score that raises RewardError for anything else. For no responses it
        returns no scores, without calling `score`.
    """

    def run(responses: Sequence[Response]) -> list[float]:
        return _numbers(name, score(responses), responses) if responses else []

    return run


def shared_columns(responses: Sequence[Response]) -> dict[str, list[Any]]:
    """The columns that every row has, as lists with one entry for each response.

    Args:
        responses: at least one.

    Returns:
        Columns in the order of the first row, without `prompts` and `completions`: reward
        functions and servers get these names anyway.
    """
    return {
        key: [response.columns[key] for response in responses]
        for key in responses[0].columns
        if key not in ("prompts", "completions")
        and all(key in response.columns for response in responses)
    }


def _numbers(name: str, result: Any, responses: Sequence[Response]) -> list[float]:
    values = result.tolist() if hasattr(result, "tolist") else result  # arrays and tensors
    if not isinstance(values, list | tuple):
        kind = type(result).__name__
        raise RewardError(
            f"{name}: must give a list of numbers, got {'nothing' if result is None else kind}",
            hint="one number for each completion; arrays and tensors of one dimension are fine"
            + (", and a function needs a return" if result is None else ""),
        )
    if len(values) != len(responses):
        raise RewardError(
            f"{name}: must give {len(responses)} scores, one for each completion, "
            f"got {len(values)}",
            hint="keep the order of the completions, and score the bad ones too",
        )
    return [
        _number(name, index, value, response.place)
        for index, (value, response) in enumerate(zip(values, responses, strict=True))
    ]


def _number(name: str, index: int, value: Any, place: str) -> float:
    plain = value
    if getattr(value, "ndim", None) == 0:  # a numpy or torch number inside a list
        plain = value.item()
    if isinstance(plain, Real):
        try:
            number = float(plain)
        except OverflowError:  # an integer too large for a float
            number = math.inf
        if math.isfinite(number):
            return number
    shown = repr(plain) if len(repr(plain)) <= 60 else repr(plain)[:57] + "..."
    raise RewardError(
        f"{name}: score {index} must be a finite number, got {shown}; its row is {place}",
        hint="give 0 for a completion that cannot be judged; scores are counted from 0",
    )
