"""Rows of any known format -> Conversation or Completion.

Accepted rows (see `data_templates/formats/` for an example of each):

    messages            {"messages": [{"role", "content", ...}, ...], "system"?, "tools"?}
    sharegpt            {"conversations": [{"from", "value"}, ...], "system"?, "tools"?}
    alpaca              {"instruction", "input"?, "output", "system"?, "history"?}
    prompt_completion   {"prompt", "completion"} as text, or both as lists of messages
    text                {"text"}: trained as a whole

Where prompts are wanted, the completion may be missing, and `text` is a prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from alignkit.data.sources import Row, need, plain_text
from alignkit.data.turns import Message, continued, read_messages, read_turns, tool_schemas
from alignkit.errors import DataError


@dataclass(frozen=True)
class Conversation:
    """Turns that a chat template renders.

    Args:
        messages: at least one of them from the assistant, unless only a prompt is wanted.
        tools: function schemas offered to the assistant.
        place: `file:line` of the row.
        context: turns at the start that are the prompt; trained only by `train_on: everything`.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    place: str
    context: int = 0

    @property
    def num_characters(self) -> int:
        """Characters of what its turns say."""
        return sum(len(message.content) for message in self.messages)


@dataclass(frozen=True)
class Completion:
    """Plain text, rendered without a template.

    Args:
        prompt: text that is read and not trained; empty for the format `text`.
        completion: text that is trained; empty if only a prompt is wanted.
        place: `file:line` of the row.
        left_out: keys of the row that plain text has no place for.
    """

    prompt: str
    completion: str
    place: str
    left_out: tuple[str, ...] = ()

    @property
    def num_characters(self) -> int:
        """Characters of prompt and completion."""
        return len(self.prompt) + len(self.completion)


Text = Conversation | Completion

# Format -> the keys of its prompt and its completion, in the order they are looked for.
KEYS = {
    "messages": ("messages", "messages"),
    "sharegpt": ("conversations", "conversations"),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text", "text"),
}


def match_format(row: Row, *, answered: bool) -> str | None:
    """Name of the first format whose keys the row has; None if there is none.

    With `answered` the row needs the key of the completion too. Keys with a value go first: in a
    table of several formats those of the others are null.
    """
    filled = {key for key, value in row.values.items() if value is not None}
    for keys in (filled, row.values.keys()):
        for name, (prompt, completion) in KEYS.items():
            if prompt in keys and (completion in keys or not answered):
                return name
    return None


def format_of(row: Row, first: str, *, answered: bool) -> str:
    """Format of a row under `auto`: that of the source's first row, unless its key is null here."""
    key = KEYS[first][0]
    if row.values.get(key, key) is not None:
        return first
    return match_format(row, answered=answered) or first


def is_pair(row: Row) -> bool:
    """Whether the row has two completions to compare."""
    found = [row.values[key] for key in ("chosen", "rejected") if key in row.values]
    return len(found) == 2 and found != [None, None]


def detect_format(row: Row) -> str:
    """Name of the row's format, found from its keys.

    Raises:
        DataError: the keys fit no format, or are those of preference pairs.
    """
    keys = row.values
    if is_pair(row):
        raise DataError(
            f"{row.place}: the row is a preference pair (chosen, rejected), "
            "and supervised fine-tuning trains on single answers",
            hint="keep the better answer as `completion`, or train a preference stage on the pairs",
        )
    name = match_format(row, answered=True)
    if name is not None:
        return name
    raise DataError(
        f"{row.place}: no known row format has the keys {', '.join(map(str, keys))}",
        hint="the columns of a CSV file are separated by commas; `alignkit data convert "
        "--delimiter ';'` reads others"
        if len(keys) == 1 and re.search("[;\t|]", str(next(iter(keys))))
        else "rows are messages | conversations | instruction, output | prompt, completion | text; "
        "rename with columns, as in columns: {prompt: question, completion: answer}",
    )


def parse_answers(rows: list[Row], row_format: str) -> list[Text]:
    """Every row, in order, as a Conversation or Completion.

    Args:
        rows: of one source.
        row_format: a key of `PARSERS`, or `auto` to detect it from the first row.

    Raises:
        DataError: a row does not fit the format or has no completion.
    """
    name = detect_format(rows[0]) if row_format == "auto" else row_format
    if name not in PARSERS:
        raise DataError(
            f"{rows[0].place}: format {name} is one of preference pairs, and single answers are "
            "wanted here",
            hint=f"formats of single answers: {', '.join(PARSERS)}",
        )
    if row_format != "auto":
        return [PARSERS[name](row, True) for row in rows]
    return [PARSERS[format_of(row, name, answered=True)](row, True) for row in rows]


def _parse_messages(row: Row, answered: bool) -> Text:
    return make_conversation(row, read_messages(row, need(row, "messages", list)), answered)


def _parse_sharegpt(row: Row, answered: bool) -> Text:
    return make_conversation(row, read_turns(row, need(row, "conversations", list)), answered)


def _parse_alpaca(row: Row, answered: bool) -> Text:
    messages = alpaca_prompt(row)
    if answered or row.values.get("output"):
        output = plain_text(need(row, "output", str), row, "output")
        messages.append(Message("assistant", output))
    return make_conversation(row, messages, answered)


def alpaca_prompt(row: Row) -> list[Message]:
    """The turns that `history`, `instruction` and `input` make up.

    Raises:
        DataError: no instruction, or a history that is not a list of pairs.
    """
    instruction = plain_text(need(row, "instruction", str), row, "instruction")
    extra = row.values.get("input") or ""
    prompt = f"{instruction}\n\n{plain_text(extra, row, 'input')}" if extra else instruction
    messages = []
    history = need(row, "history", list) if row.values.get("history") else []
    for number, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(
                f"{row.place}: history[{number}] must be [question, answer]",
                hint='as in "history": [["Hello", "Hi, how can I help?"]]',
            )
        asked, answer = (plain_text(pair[n], row, f"history[{number}][{n}]") for n in (0, 1))
        if asked or number:  # the assistant may open the conversation
            messages.append(Message("user", asked))
        messages.append(Message("assistant", answer))
    return [*messages, Message("user", prompt)]


def _parse_prompt_completion(row: Row, answered: bool) -> Text:
    prompt, completion = row.values.get("prompt"), row.values.get("completion")
    if not answered and not completion:
        completion = [] if isinstance(prompt, list) else ""
    if isinstance(prompt, list) != isinstance(completion, list):
        raise DataError(
            f"{row.place}: `prompt` and `completion` must both be text or both be messages",
            hint='as in {"prompt": [{"role": "user", ...}], "completion": [{"role": ...}]}',
        )
    if isinstance(prompt, list) and isinstance(completion, list):
        context, turns = continued(row, read_messages(row, prompt), read_messages(row, completion))
        if not answered and not turns and context and context[-1].role == "assistant":
            turns = [replace(context[-1], given=len(context[-1].content))]
            context = context[:-1]
        return make_conversation(row, context + turns, answered, context=len(context))
    text = completion if completion == "" else need(row, "completion", str)
    if answered and not text.strip():
        raise DataError(
            f"{row.place}: the row has no answer: completion is empty",
            hint="remove the row, or write the completion",
        )
    return Completion(need(row, "prompt", str), text, row.place, left_out(row))


def left_out(row: Row) -> tuple[str, ...]:
    """Keys of a row of plain text that only a conversation has a place for."""
    return tuple(key for key in ("system", "tools", "history") if row.values.get(key))


def _parse_text(row: Row, answered: bool) -> Text:
    text = plain_text(need(row, "text", str), row, "text")
    if not text.strip():
        raise DataError(f"{row.place}: text is empty", hint="remove the row")
    prompt, completion = ("", text) if answered else (text, "")
    return Completion(prompt, completion, row.place, left_out(row))


PARSERS: dict[str, Callable[[Row, bool], Text]] = {
    "messages": _parse_messages,
    "sharegpt": _parse_sharegpt,
    "alpaca": _parse_alpaca,
    "prompt_completion": _parse_prompt_completion,
    "text": _parse_text,
}
"""Format -> its parser, of a row and whether the row must have a completion."""


def make_conversation(
    row: Row, messages: list[Message], answered: bool = True, context: int = 0
) -> Conversation:
    """The messages with the row's `system` text and tools.

    Args:
        row: where the messages come from.
        messages: its turns.
        answered: there must be an assistant turn to train on; else the last turn may be empty.
        context: turns at the start that are the prompt.

    Raises:
        DataError: two system texts, an empty assistant turn, or no assistant turn to train on.
    """
    system = plain_text(row.values.get("system"), row, "system")
    opened = bool(messages) and messages[0].role in ("system", "developer")
    if system and opened and messages[0].content != system:
        raise DataError(
            f"{row.place}: the row has a system turn and another text under `system`",
            hint="keep one of the two",
        )
    if system and not opened:
        messages, context = [Message("system", system), *messages], context and context + 1
    trained = [turn for turn in messages[context:] if turn.role == "assistant" and turn.trained]
    if answered and not trained:
        raise DataError(
            f"{row.place}: the row has no answer: no assistant turn to train on",
            hint="remove the row, or add the assistant's turn",
        )
    for number, message in enumerate(messages if answered else messages[:-1]):
        if message.role == "assistant" and message.is_empty:
            raise DataError(
                f"{row.place}: the row has no answer: the assistant's turn {number} is empty",
                hint="remove the row, or write the answer",
            )
    return Conversation(tuple(messages), tool_schemas(row), row.place, context)
