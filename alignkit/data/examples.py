"""Rows -> Examples: the texts of a row, and the role of each in the objective.

`formats.py` reads rows of a single completion, `pairs.py` rows that compare two. A labelled row is
any row of a single completion with `"label": true` or `false`; a pair counts as one good and one
bad completion.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from alignkit.data.formats import (
    PARSERS,
    Completion,
    Conversation,
    Text,
    detect_format,
    format_of,
    left_out,
    make_conversation,
    parse_answers,
)
from alignkit.data.pairs import PAIR_PARSERS, detect_pairs, read_pair
from alignkit.data.sources import Row
from alignkit.data.turns import Message
from alignkit.errors import DataError
from alignkit.packed import Role

RowKind = Literal["answers", "pairs", "labelled"]


_UNWANTED = "labelled as an undesirable answer, and trained as any other: labels are for kto"


@dataclass(frozen=True)
class Example:
    """One row as the texts that the model reads.

    Args:
        texts: the prompt with its completion; for a pair also the same prompt with the worse
            one; none if the row is unusable.
        roles: of each completion.
        place: `file:line` of the row.
        margin: how much better the chosen completion is; 0 if the row does not say.
        unusable: why there are no texts, in words; such a row is dropped and counted.
        doubt: what looks wrong about a row that is used; counted, too.
    """

    texts: tuple[Text, ...]
    roles: tuple[Role, ...]
    place: str
    margin: float = 0.0
    unusable: str = ""
    doubt: str = ""


def parse_rows(rows: list[Row], row_format: str, kind: RowKind) -> list[Example]:
    """Every row as an example of the wanted kind.

    Args:
        rows: of one source, at least one.
        row_format: a format that has this kind, or `auto` to detect it from the first row.
        kind: what the stage trains on.

    Returns:
        One example per row, in order; two per pair if labelled rows are wanted.

    Raises:
        DataError: a row does not fit the format, lacks a completion, or its label is not a boolean.
    """
    if kind == "pairs":
        return _parse_pairs(rows, row_format)
    if kind == "labelled":
        return _parse_labelled(rows, row_format)
    return [
        Example((text,), (Role.CHOSEN,), text.place, doubt=_UNWANTED * _is_undesirable(row))
        for row, text in zip(rows, parse_answers(rows, row_format), strict=True)
    ]


def _is_undesirable(row: Row) -> bool:
    return row.values.get("label") is False


def _parse_pairs(rows: list[Row], row_format: str) -> list[Example]:
    name = detect_pairs(rows[0]) if row_format == "auto" else row_format
    if name not in PAIR_PARSERS:
        raise DataError(
            f"{rows[0].place}: format {name} has single answers, and pairs are wanted here",
            hint=f"formats of pairs: {', '.join(PAIR_PARSERS)}",
        )
    return [_parse_pair(row, name) for row in rows]


def _parse_labelled(rows: list[Row], row_format: str) -> list[Example]:
    first = rows[0].values
    if row_format in PAIR_PARSERS or (row_format == "auto" and first.get("chosen") is not None):
        return [side for pair in _parse_pairs(rows, row_format) for side in _sides(pair)]
    if "label" not in first:
        raise DataError(
            f"{rows[0].place}: the row has no `label`",
            hint="labelled rows are prompt, completion, label (true or false) | messages, label; "
            "pairs (prompt, chosen, rejected) are split; rename with columns",
        )
    if row_format != "auto":
        return [_parse_label(row, PARSERS[row_format]) for row in rows]
    name = detect_format(rows[0])
    return [_parse_label(row, PARSERS[format_of(row, name, answered=True)]) for row in rows]


def _sides(pair: Example) -> list[Example]:
    """A pair as two labelled completions; an unusable pair stays one example."""
    sides = zip(pair.texts, pair.roles, strict=True)
    return [Example((text,), (role,), pair.place) for text, role in sides] or [pair]


def _parse_label(row: Row, parse: Callable[[Row, bool], Text]) -> Example:
    label = row.values.get("label")
    if not isinstance(label, bool):
        raise DataError(
            f"{row.place}: label must be true or false, got {label!r}",
            hint="true marks a desirable answer, false an undesirable one",
        )
    text = parse(row, True)
    if isinstance(text, Conversation):
        if text.messages[-1].role != "assistant":
            return _unusable(row, "the last turn is not the assistant's")
        *before, last = text.messages  # a mark of the last turn is about supervised fine-tuning
        text = replace(text, messages=(*before, replace(last, trained=True)), context=len(before))
    return Example((text,), (Role.CHOSEN if label else Role.REJECTED,), row.place)


def _parse_pair(row: Row, row_format: str) -> Example:
    prompt, *completions = read_pair(row, row_format)
    fault = _text_fault(completions) if isinstance(prompt, str) else _message_fault(completions)
    if fault:
        return _unusable(row, fault)
    texts: list[Text]
    if isinstance(prompt, str):
        texts = [Completion(prompt, text, row.place, left_out(row)) for text in completions]
    else:
        context = len(prompt)
        texts = [make_conversation(row, prompt + turns, context=context) for turns in completions]
    return Example(tuple(texts), (Role.CHOSEN, Role.REJECTED), row.place, _margin(row))


def _margin(row: Row) -> float:
    """How much better the chosen completion is; 0 if the row does not say."""
    margin = row.values.get("margin")
    if margin is None:
        return 0.0
    try:
        if not isinstance(margin, bool) and math.isfinite(margin):
            return float(margin)
    except (TypeError, OverflowError):  # no number, or one that no float holds
        pass
    shown = repr(margin)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    raise DataError(
        f"{row.place}: margin must be a number, got {shown}",
        hint="write a finite number, or remove `margin`",
    )


def _text_fault(completions: list[str]) -> str:
    if not all(text.strip() for text in completions):
        return "an answer is empty"
    return "the two answers are equal" if completions[0] == completions[1] else ""


def _message_fault(completions: list[list[Message]]) -> str:
    if completions[0] == completions[1]:
        return "the two answers are equal"
    for turns in completions:
        if not turns or turns[0].role != "assistant":
            return "the two answers follow different prompts"
        if turns[-1].role != "assistant":
            return "the last turn is not the assistant's"
        if any(turn.role == "assistant" and turn.is_empty for turn in turns):
            return "an answer is empty"
    return ""


def _unusable(row: Row, reason: str) -> Example:
    return Example((), (), row.place, unusable=reason)
