"""Rows that compare two completions: the formats of pairs and their parsers.

Accepted pairs (see `data_templates/formats/` for an example of each):

    preference           {"prompt"?, "chosen", "rejected", "margin"?} as text or messages; without
                         a prompt it is the longest common beginning of the two lists of messages
    sharegpt_preference  {"conversations": [...], "chosen": {"from", "value"}, "rejected": {...}}
    hh                   {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": ...}
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from alignkit.data.formats import alpaca_prompt
from alignkit.data.sources import Row, need, plain_text
from alignkit.data.templates import common_length
from alignkit.data.turns import Message, continued, read_messages, read_turns
from alignkit.errors import DataError

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def detect_pairs(row: Row) -> str:
    """Name of the format of a pair, found from its keys.

    Raises:
        DataError: the row is not a pair, or lacks one of its completions.
    """
    values = row.values
    if "chosen" not in values and "rejected" not in values:
        raise DataError(
            f"{row.place}: the row is not a preference pair: its keys are "
            f"{', '.join(map(str, values))}",
            hint="pairs are prompt, chosen, rejected | conversations, chosen, rejected | chosen, "
            "rejected; rename with columns, as in columns: {chosen: better, rejected: worse}",
        )
    for key in ("chosen", "rejected"):
        _need_completion(row, key)
    if values.get("conversations") is not None:
        return "sharegpt_preference"
    chosen = values["chosen"]
    if (
        values.get("prompt") is None
        and isinstance(chosen, str)
        and _HH_TURN.match("\n\n" + chosen.strip())
    ):
        return "hh"
    return "preference"


def read_pair(row: Row, row_format: str) -> tuple[Any, Any, Any]:
    """Prompt, better completion and worse completion: three texts, or three lists of messages.

    Args:
        row: to read.
        row_format: a key of `PAIR_PARSERS`.

    Raises:
        DataError: the row does not fit the format, or lacks one of its completions.
    """
    _need_completion(row, "chosen")
    _need_completion(row, "rejected")
    return PAIR_PARSERS[row_format](row)


def _need_completion(row: Row, key: str) -> Any:
    if row.values.get(key) is None:
        keys = ", ".join(map(str, row.values))
        raise DataError(
            f"{row.place}: the row has no {key} answer: `{key}` is "
            f"{'null' if key in row.values else 'missing'}",
            hint=f"every pair needs both answers; the row's keys are {keys}",
        )
    return row.values[key]


def _preference(row: Row) -> tuple[Any, Any, Any]:
    values = row.values
    chosen, rejected = values["chosen"], values["rejected"]
    if values.get("instruction") is not None and values.get("prompt") is None:
        return alpaca_prompt(row), _completion(row, "chosen"), _completion(row, "rejected")
    prompt = values.get("prompt")
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        return prompt, chosen, rejected
    if prompt is None and isinstance(chosen, str):
        raise DataError(
            f"{row.place}: the row has no `prompt`",
            hint="text pairs need one; whole conversations are lists of messages, or texts that "
            "begin with Human:",
        )
    sides = _completion(row, "chosen"), _completion(row, "rejected")
    if prompt is None or (sides[0] and sides[0][0].role != "assistant"):
        return _split_common(*sides)
    if isinstance(prompt, str):
        return [Message("user", prompt)], *sides
    return _joined(row, read_messages(row, need(row, "prompt", list)), *sides)


def _joined(
    row: Row, prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt and completions, where an answer that the prompt begins is a turn of both."""
    (before, better), (other, worse) = (continued(row, prompt, s) for s in (chosen, rejected))
    # Where only one of them goes on from the prompt, the row is dropped as it is.
    return (before, better, worse) if before == other else (prompt, chosen, rejected)


def _split_common(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """The longest common beginning, and what follows it in each list."""
    common = common_length(chosen, rejected)
    return chosen[:common], chosen[common:], rejected[common:]


def _completion(row: Row, key: str) -> list[Message]:
    """The messages of a completion: a text, one turn or a list of turns."""
    value = row.values[key]
    if isinstance(value, str):
        return [Message("assistant", value)]
    turns = [value] if isinstance(value, dict) else need(row, key, list)
    return read_turns(row, turns) if "from" in _first(turns) else read_messages(row, turns)


def _first(turns: list[Any]) -> Any:
    return turns[0] if turns and isinstance(turns[0], dict) else {}


def _sharegpt(row: Row) -> tuple[Any, Any, Any]:
    prompt = read_turns(row, need(row, "conversations", list))
    return _joined(row, prompt, _completion(row, "chosen"), _completion(row, "rejected"))


def _hh(row: Row) -> tuple[Any, Any, Any]:
    return _split_common(_hh_turns(row, "chosen"), _hh_turns(row, "rejected"))


def _hh_turns(row: Row, key: str) -> list[Message]:
    text = "\n\n" + plain_text(row.values[key], row, key).lstrip()
    before, *parts = _HH_TURN.split(text)
    if before.strip() or not parts:
        raise DataError(
            f"{row.place}: `{key}` is not a dialogue of Human: and Assistant: turns",
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
