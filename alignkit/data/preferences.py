"""Rows that compare answers -> Pair, and rows that label one answer -> Labelled.

`pairs.py` reads the formats of pairs. A labelled row is any row of a single answer with
`"label": true` or `false`; a pair counts as one good and one bad answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from alignkit.data.formats import (
    PARSERS,
    Completion,
    Conversation,
    Example,
    Message,
    detect_format,
    make_conversation,
)
from alignkit.data.pairs import PAIR_PARSERS, detect_pairs, read_pair
from alignkit.data.sources import Row
from alignkit.errors import DataError


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt.

    Args:
        chosen: the prompt, untrained, with the better answer.
        rejected: the same prompt with the worse answer.
        margin: how much better it is; 0 where the row does not say.
        place: `file:line` of the row.
    """

    chosen: Example
    rejected: Example
    margin: float
    place: str


@dataclass(frozen=True)
class Labelled:
    """One answer that is good or bad.

    Args:
        example: the prompt, untrained, with the answer.
        desirable: the label.
        place: `file:line` of the row.
    """

    example: Example
    desirable: bool
    place: str


@dataclass(frozen=True)
class Unusable:
    """A row that says nothing to the objective; it is dropped and counted.

    Args:
        reason: in words.
        place: `file:line` of the row.
    """

    reason: str
    place: str


def parse_pairs(rows: list[Row], row_format: str) -> list[Pair | Unusable]:
    """Every row as a Pair.

    Args:
        rows: of one source.
        row_format: a key of `PAIR_PARSERS`, or `auto` to detect it from the first row.

    Returns:
        One item per row, in order.

    Raises:
        DataError: a row does not fit the format, or lacks one of its answers.
    """
    name = detect_pairs(rows[0]) if row_format == "auto" else row_format
    if name not in PAIR_PARSERS:
        raise DataError(
            f"{rows[0].place}: format {name} has single answers, and pairs are wanted here",
            hint=f"formats of pairs: {', '.join(PAIR_PARSERS)}",
        )
    return [_parse_pair(row, name) for row in rows]


def parse_labelled(rows: list[Row], row_format: str) -> list[Labelled | Unusable]:
    """Every row as a Labelled answer; a pair as two.

    Args:
        rows: of one source.
        row_format: a format of pairs or of single answers, or `auto`.

    Returns:
        One item per answer, in order.

    Raises:
        DataError: a row does not fit the format, or its label is no boolean.
    """
    first = rows[0].values
    if row_format in PAIR_PARSERS or (row_format == "auto" and ("chosen" in first)):
        found: list[Labelled | Unusable] = []
        for pair in parse_pairs(rows, row_format):
            if isinstance(pair, Unusable):
                found.append(pair)
            else:
                found.append(Labelled(pair.chosen, True, pair.place))
                found.append(Labelled(pair.rejected, False, pair.place))
        return found
    if "label" not in first:
        raise DataError(
            f"{rows[0].place}: the row has no `label`",
            hint="labelled rows are prompt, completion, label (true or false) | messages, label; "
            "pairs (prompt, chosen, rejected) are split; rename with columns",
        )
    name = detect_format(rows[0]) if row_format == "auto" else row_format
    return [_parse_label(row, PARSERS[name]) for row in rows]


def _parse_label(row: Row, parse: Callable[[Row, bool], Example]) -> Labelled | Unusable:
    label = row.values.get("label")
    if not isinstance(label, bool):
        raise DataError(
            f"{row.place}: label must be true or false, got {label!r}",
            hint="true marks a desirable answer, false an undesirable one",
        )
    example = parse(row, True)
    if isinstance(example, Conversation):
        if example.messages[-1].role != "assistant":
            return Unusable("the last turn is not the assistant's", row.place)
        example = _train_last(example)
    return Labelled(example, label, row.place)


def _train_last(example: Conversation) -> Conversation:
    """The conversation with only its last turn trained."""
    before = tuple(replace(message, trained=False) for message in example.messages[:-1])
    return replace(example, messages=(*before, replace(example.messages[-1], trained=True)))


def _parse_pair(row: Row, row_format: str) -> Pair | Unusable:
    prompt, chosen, rejected = read_pair(row, row_format)
    margin = row.values.get("margin")
    margin = 0.0 if margin is None else margin
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise DataError(f"{row.place}: margin must be a number, got {margin!r}")
    if isinstance(prompt, str):
        if not chosen.strip() or not rejected.strip():
            return Unusable("an answer is empty", row.place)
        if chosen == rejected:
            return Unusable("the two answers are equal", row.place)
        sides = (
            Completion(prompt, chosen, row.place),
            Completion(prompt, rejected, row.place),
        )
        return Pair(*sides, float(margin), row.place)
    return _message_pair(row, prompt, chosen, rejected, float(margin))


def _message_pair(
    row: Row, prompt: list[Message], chosen: list[Message], rejected: list[Message], margin: float
) -> Pair | Unusable:
    if chosen == rejected:
        return Unusable("the two answers are equal", row.place)
    for answer in (chosen, rejected):
        if not answer or answer[0].role != "assistant":
            return Unusable("the two answers follow different prompts", row.place)
        if answer[-1].role != "assistant":
            return Unusable("the last turn is not the assistant's", row.place)
        if any(
            turn.role == "assistant" and not turn.content.strip() and not turn.tool_calls
            for turn in answer
        ):
            return Unusable("an answer is empty", row.place)
    context = [replace(message, trained=False) for message in prompt]
    return Pair(
        make_conversation(row, context + chosen),
        make_conversation(row, context + rejected),
        margin,
        row.place,
    )
