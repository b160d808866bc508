"""Rows of any format -> prompts, each with the answer that its row holds.

Every format of completions and of pairs holds prompts; so do rows with nothing else:

    {"prompt"} as text or messages    {"messages"} or {"conversations"} that end with the user
    {"instruction", "input"?}         {"text"}
"""

from __future__ import annotations

from dataclasses import replace

from alignkit.data.formats import (
    KEYS,
    PARSERS,
    Completion,
    Text,
    format_of,
    is_pair,
    left_out,
    make_conversation,
    match_format,
)
from alignkit.data.pairs import PAIR_PARSERS, detect_pairs, read_pair
from alignkit.data.sources import Row
from alignkit.data.turns import Message
from alignkit.errors import DataError


def parse_prompts(rows: list[Row], row_format: str) -> list[tuple[Text, str | None]]:
    """The prompt of every row, and the answer that the row holds.

    Args:
        rows: of one source, at least one.
        row_format: a format of pairs or of completions, or `auto` to detect it from the first
            row.

    Returns:
        For each row, in order: turns that end with the user's, a tool's or the beginning of an
        answer, or plain text as a `prompt` that has no completion; and the text of the row's
        answer (the chosen one of a pair), or None if it has none or one that is labelled
        undesirable.

    Raises:
        DataError: a row does not fit the format, or has no prompt.
    """
    name = _detect(rows[0]) if row_format == "auto" else row_format
    mixed = row_format == "auto" and name in KEYS
    return [
        _split_answer(row, _parse(row, format_of(row, name, answered=False) if mixed else name))
        for row in rows
    ]


def _detect(row: Row) -> str:
    keys = row.values
    if is_pair(row):
        return detect_pairs(row)
    name = match_format(row, answered=False)
    if name is None:
        raise DataError(
            f"{row.place}: no known row format with a prompt has the keys "
            f"{', '.join(map(str, keys))}",
            hint="rows are prompt | messages | conversations | instruction | text, with or without "
            "an answer, or pairs; rename with columns, as in columns: {prompt: question}",
        )
    return name


def _parse(row: Row, row_format: str) -> Text:
    """The row with its answer, if it has one: the chosen one of a pair."""
    if row_format in PAIR_PARSERS:
        prompt, chosen, _ = read_pair(row, row_format)
        if isinstance(prompt, str):
            return Completion(prompt, chosen, row.place, left_out(row))
        return make_conversation(row, prompt + chosen, answered=False)
    key = KEYS[row_format][0]
    if key in row.values and row.values[key] is None:
        raise _no_prompt(row, f"`{key}` is null")
    return PARSERS[row_format](row, False)


def _split_answer(row: Row, text: Text) -> tuple[Text, str | None]:
    """The prompt before the row's last answer, and that answer."""
    if isinstance(text, Completion):
        if not text.prompt.strip():
            raise _no_prompt(row, f"its text is {text.prompt!r}")
        prompt: Text = replace(text, completion="")
        answer = text.completion
    else:
        turns, answer = text.messages, ""
        if turns and turns[-1].role == "assistant":
            last, turns = turns[-1], turns[:-1]
            begun, answer = last.content[: last.given], last.content[last.given :]
            if begun:
                turns = (*turns, replace(last, content=begun, tool_calls=()))
        _check_turns(row, turns)
        prompt = replace(text, messages=turns)
    known = bool(answer.strip()) and row.values.get("label") is not False
    return prompt, answer if known else None


def _check_turns(row: Row, turns: tuple[Message, ...]) -> None:
    if not turns:
        raise _no_prompt(row, "no turn stands before the assistant's")
    last = turns[-1]
    if last.role not in ("user", "tool") and not last.given:
        raise DataError(
            f"{row.place}: a prompt ends with the user's or a tool's turn, and turn "
            f"{len(turns) - 1} is by {last.role!r}",
            hint="remove the row, or add what the user asks",
        )
    if last.role == "user" and not last.content.strip():
        raise _no_prompt(row, f"the user's turn {len(turns) - 1} is {last.content!r}")


def _no_prompt(row: Row, value: str) -> DataError:
    return DataError(
        f"{row.place}: the row has no prompt: {value}",
        hint="remove the row, or name the column that asks, as in columns: {prompt: question}",
    )
