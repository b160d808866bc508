"""What a reward source takes and returns: responses with their rows, and a number for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
        ids: its tokens, with its end-of-turn token.
    """

    prompt: str | list[dict[str, str]]
    text: str
    columns: dict[str, Any]
    place: str
    ids: Sequence[int] = ()


@dataclass(frozen=True)
class Failure:
    """A response that a source could not score.

    Args:
        place: `file:line` of its row.
        reason: in one sentence.
    """

    place: str
    reason: str


@dataclass(frozen=True)
class Scores:
    """What a source says of some responses.

    Args:
        values: one for each response; NaN where the source does not apply.
        notes: response -> what else was said of it, such as a judge's reply.
        metrics: name -> a number about all of them.
        failures: responses that could not be scored.
    """

    values: list[float]
    notes: Mapping[int, dict[str, Any]] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()


Score = Callable[[Sequence[Response]], Scores]
"""Responses -> their scores, in their order."""


def joined(parts: Sequence[Scores]) -> Scores:
    """The scores of consecutive responses as one; metrics are averaged over the parts.

    Args:
        parts: at least one.
    """
    notes: dict[int, dict[str, Any]] = {}
    metrics: dict[str, list[float]] = {}
    values: list[float] = []
    for part in parts:
        notes |= {len(values) + number: note for number, note in part.notes.items()}
        values += part.values
        for name, value in part.metrics.items():
            metrics.setdefault(name, []).append(value)
    means = {name: sum(found) / len(found) for name, found in metrics.items()}
    return Scores(values, notes, means, tuple(f for part in parts for f in part.failures))


def checked(name: str, score: Callable[[Sequence[Response]], Any]) -> Score:
    """The same scores, but only ever as many numbers as there are responses.

    Args:
        name: of the source, for messages.
        score: may return a list, a tuple, an array or a tensor, with finite numbers or true and
            false, and None where it does not apply.

    Returns:
        A score that raises RewardError for anything else. For no responses it
        returns no scores, without calling `score`.
    """

    def run(responses: Sequence[Response]) -> Scores:
        return Scores(numbers(name, score(responses), responses) if responses else [])

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
        if key not in ("prompts", "completions", "completion_ids")
        and all(key in response.columns for response in responses)
    }


def numbers(name: str, result: Any, responses: Sequence[Response]) -> list[float]:
    """What a source returned, as one number for each response; None becomes NaN.

    Args:
        name: of the source.
        result: whatever it returned.
        responses: that it was given.

    Raises:
        RewardError: it is anything else.
    """
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
        math.nan if value is None else _number(name, index, value, response.place)
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
        hint="give None where the reward does not apply, or 0; scores are counted from 0",
    )
