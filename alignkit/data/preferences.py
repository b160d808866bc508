"""Rows that compare answers -> Pair, and rows that label one answer -> Labelled.

Accepted pairs (see `data_templates/formats/` for an example of each):

    preference           {"prompt"?, "chosen", "rejected", "margin"?} as text or messages; without
                         a prompt it is the longest common beginning of the two lists of messages
    sharegpt_preference  {"conversations": [...], "chosen": {"from", "value"}, "rejected": {...}}
    hh                   {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": ...}

A labelled row is any row of a single answer with `"label": true` or `false`; a pair counts as one
good and one bad answer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from alignkit.data.fields import need, plain_text
from alignkit.data.formats import (
    PARSERS,
    Completion,
    Conversation,
    Example,
    Message,
    alpaca_prompt,
    detect_format,
    make_conversation,
    read_messages,
    read_turns,
)
from alignkit.data.sources import Row
from alignkit.errors import DataError

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


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
    name = _detect_pairs(rows[0]) if row_format == "auto" else row_format
    if name not in PAIR_PARSERS:
        raise DataError(
            f"{rows[0].place}: format {name} has single answers, and pairs are wanted here",
            hint=f"formats of pairs: {', '.join(PAIR_PARSERS)}",
        )
    return [_parse_pair(row, PAIR_PARSERS[name]) for row in rows]


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


def _parse_label(row: Row, parse: Callable[[Row], Example]) -> Labelled | Unusable:
    label = row.values.get("label")
    if not isinstance(label, bool):
        raise DataError(
            f"{row.place}: label must be true or false, got {label!r}",
            hint="true marks a desirable answer, false an undesirable one",
        )
    example = parse(row)
    if isinstance(example, Conversation):
        if example.messages[-1].role != "assistant":
            return Unusable("the last turn is not the assistant's", row.place)
        example = _train_last(example)
    return Labelled(example, label, row.place)


def _train_last(example: Conversation) -> Conversation:
    """The conversation with only its last turn trained."""
    before = tuple(replace(message, trained=False) for message in example.messages[:-1])
    return replace(example, messages=(*before, replace(example.messages[-1], trained=True)))


def _detect_pairs(row: Row) -> str:
    values = row.values
    if "chosen" not in values and "rejected" not in values:
        raise DataError(
            f"{row.place}: the row is no preference pair: its keys are "
            f"{', '.join(map(str, values))}",
            hint="pairs are prompt, chosen, rejected | conversations, chosen, rejected | chosen, "
            "rejected; rename with columns, as in columns: {chosen: better, rejected: worse}",
        )
    for key in ("chosen", "rejected"):
        _need_answer(row, key)
    if "conversations" in values:
        return "sharegpt_preference"
    chosen = values["chosen"]
    if (
        "prompt" not in values
        and isinstance(chosen, str)
        and _HH_TURN.match("\n\n" + chosen.strip())
    ):
        return "hh"
    return "preference"


def _need_answer(row: Row, key: str) -> Any:
    if row.values.get(key) is None:
        found = ", ".join(map(str, row.values))
        raise DataError(
            f"{row.place}: the row has no {key} answer: `{key}` is "
            f"{'null' if key in row.values else 'missing'}",
            hint=f"every pair needs both answers; the row's keys are {found}",
        )
    return row.values[key]


def _parse_pair(row: Row, parse: Callable[[Row], tuple[Any, Any, Any]]) -> Pair | Unusable:
    _need_answer(row, "chosen")
    _need_answer(row, "rejected")
    prompt, chosen, rejected = parse(row)
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


def _preference(row: Row) -> tuple[Any, Any, Any]:
    values = row.values
    chosen, rejected = values["chosen"], values["rejected"]
    if "instruction" in values and "prompt" not in values:
        return alpaca_prompt(row), _answer(row, "chosen"), _answer(row, "rejected")
    prompt = values.get("prompt")
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        return prompt, chosen, rejected
    if prompt is None and isinstance(chosen, str):
        raise DataError(
            f"{row.place}: the row has no `prompt`",
            hint="text pairs need one; whole conversations are lists of messages, or texts that "
            "begin with Human:",
        )
    sides = _answer(row, "chosen"), _answer(row, "rejected")
    if prompt is None or (sides[0] and sides[0][0].role != "assistant"):
        return _split_common(*sides)
    if isinstance(prompt, str):
        return [Message("user", prompt)], *sides
    return read_messages(row, need(row, "prompt", list)), *sides


def _split_common(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """The longest common beginning, and what follows it on both sides."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    end = min(len(chosen), len(rejected))
    common = next((n for n, (a, b) in pairs if a != b), end)
    return chosen[:common], chosen[common:], rejected[common:]


def _answer(row: Row, key: str) -> list[Message]:
    """The messages of an answer given as text, as one turn or as a list of turns."""
    value = row.values[key]
    if isinstance(value, str):
        return [Message("assistant", value)]
    turns = [value] if isinstance(value, dict) else need(row, key, list)
    return read_turns(row, turns) if "from" in _first(turns) else read_messages(row, turns)


def _first(turns: list[Any]) -> Any:
    return turns[0] if turns and isinstance(turns[0], dict) else {}


def _sharegpt(row: Row) -> tuple[Any, Any, Any]:
    prompt = read_turns(row, need(row, "conversations", list))
    return prompt, _answer(row, "chosen"), _answer(row, "rejected")


def _hh(row: Row) -> tuple[Any, Any, Any]:
    return _split_common(_hh_turns(row, "chosen"), _hh_turns(row, "rejected"))


def _hh_turns(row: Row, key: str) -> list[Message]:
    text = "\n\n" + plain_text(row.values[key], row, key).lstrip()
    before, *parts = _HH_TURN.split(text)
    if before.strip() or not parts:
        raise DataError(
            f"{row.place}: `{key}` is no dialogue of Human: and Assistant: turns",
            hint=r"as in \n\nHuman: question\n\nAssistant: answer",
        )
    messages: list[Message] = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        content = content.strip()
        if messages and messages[-1].role == role:  # a speaker may go on after a pause
            content = f"{messages.pop().content}\n\n{content}".strip()
        messages.append(Message(role, content))
    return messages


PAIR_PARSERS: dict[str, Callable[[Row], tuple[Any, Any, Any]]] = {
    "preference": _preference,
    "sharegpt_preference": _sharegpt,
    "hh": _hh,
}
