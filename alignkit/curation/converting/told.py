"""What a row tells, whatever its format: what was said before, the answers, and everything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from alignkit.data.formats import (
    KEYS,
    PARSERS,
    Completion,
    Conversation,
    detect_format,
    is_pair,
    match_format,
)
from alignkit.data.pairs import PAIR_PARSERS, detect_pairs, read_pair
from alignkit.data.sources import Row
from alignkit.data.turns import Message, tool_schemas

Said = str | tuple[Message, ...]
"""Plain text, or turns."""

_KEYS: dict[str, tuple[str, ...]] = {
    "alpaca": ("instruction", "input", "output", "history"),
    "preference": ("prompt", "instruction", "input", "history", "chosen", "rejected"),
    "sharegpt_preference": ("conversations", "chosen", "rejected"),
    "hh": ("chosen", "rejected"),
}
"""Format -> its keys, where they are more than those of prompt and completion."""

MEANT = {
    *("messages", "conversations", "instruction", "input", "output", "history", "prompt"),
    *("completion", "text", "chosen", "rejected", "system", "tools", "label"),
}
"""Columns that mean something in some format: a further column must not be called so."""

BESIDE = ("system", "tools", "label", "margin")
"""Keys that any format may have."""


@dataclass(frozen=True)
class Told:
    """A row.

    Args:
        prompt: what is not trained: text, or turns.
        answers: none, one, or the better and the worse one; each as the prompt is. Of a chat the
            first answer holds everything from its first trained turn on.
        system: of plain text, which has no turn for it; of a chat it is the first turn.
        tools: function schemas.
        label: whether the answer is desirable; None without a label.
        margin: how much better the better answer is; None without one.
        others: further columns.
    """

    prompt: Said
    answers: tuple[Said, ...]
    system: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    label: bool | None = None
    margin: Any = None
    others: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def is_chat(self) -> bool:
        """Whether it has turns."""
        return isinstance(self.prompt, tuple)


def tell(row: Row, row_format: str = "auto") -> Told:
    """What a row tells.

    Args:
        row: of any format.
        row_format: its format; `auto` finds it from the keys.

    Raises:
        DataError: no format reads it.
    """
    name = _name(row) if row_format == "auto" else row_format
    used = {*_KEYS.get(name, KEYS.get(name, ())), *BESIDE}
    label = row.values.get("label")
    others = {
        k: v for k, v in row.values.items() if k not in used and (v is not None or not row.filled)
    }
    told = Told("", (), others=others)
    if isinstance(label, bool):
        told = replace(told, label=label)
    elif label is not None:
        told.others["label"] = label
    if name in PAIR_PARSERS:
        prompt, *answers = read_pair(row, name)
        told = replace(told, margin=row.values.get("margin"))
        if isinstance(prompt, str):
            return _plain(row, told, prompt, answers)
        return replace(
            told,
            prompt=_unmarked(_with_system(row, prompt)),
            answers=tuple(map(_unmarked, answers)),
            tools=tool_schemas(row),
        )
    if row.values.get("margin") is not None:
        told.others["margin"] = row.values["margin"]
    text = _single(row, name)
    if isinstance(text, Completion):
        return _plain(row, told, text.prompt, [text.completion] if text.completion else [])
    prompt, answer = _divided(text, told.label is not None)
    return replace(told, prompt=prompt, answers=(answer,) if answer else (), tools=text.tools)


def _name(row: Row) -> str:
    """The format of a row, with or without an answer."""
    if is_pair(row):
        return detect_pairs(row)
    name = match_format(row, answered=True) or match_format(row, answered=False)
    return name or detect_format(row)  # which raises


def _single(row: Row, name: str) -> Completion | Conversation:
    """The row as text or chat; without an answer where it has none."""
    prompt, answer = KEYS[name]
    if prompt != answer:
        return PARSERS[name](row, bool(row.values.get(answer)))
    asked = PARSERS[name](row, False)
    if isinstance(asked, Conversation):
        spoken = any(turn.role == "assistant" and turn.trained for turn in asked.messages)
        return PARSERS[name](row, True) if spoken else asked
    return PARSERS[name](row, True)


def _plain(row: Row, told: Told, prompt: str, answers: Sequence[str]) -> Told:
    system = row.values.get("system")
    system = system if isinstance(system, str) else ""
    return replace(
        told, prompt=prompt, answers=tuple(answers), system=system, tools=tool_schemas(row)
    )


def _with_system(row: Row, prompt: Sequence[Message]) -> tuple[Message, ...]:
    system = row.values.get("system")
    opened = bool(prompt) and prompt[0].role in ("system", "developer")
    return (*([Message("system", system)] if system and not opened else ()), *prompt)


def _divided(text: Conversation, labelled: bool) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Turns before what is trained, and the rest.

    Turns of the context are not trained, whatever they say of themselves; of a labelled row the
    last turn is the answer, and no other is.
    """
    turns = text.messages
    if labelled and turns and turns[-1].role == "assistant":
        return _unmarked(turns[:-1]), _unmarked(turns[-1:])
    turns = tuple(
        replace(turn, trained=False, marked=None)
        if number < text.context and turn.role == "assistant"
        else turn
        for number, turn in enumerate(turns)
    )
    answers = (
        number
        for number, turn in enumerate(turns)
        if turn.role == "assistant" and turn.trained and not turn.is_empty
    )
    begin = next(answers, len(turns))
    return turns[:begin], turns[begin:]


def _unmarked(turns: Sequence[Message]) -> tuple[Message, ...]:
    """The turns without marks, where the kind of row says what is trained."""
    return tuple(replace(turn, trained=True, marked=None) for turn in turns)
