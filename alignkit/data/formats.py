"""Rows of any known format -> Conversation or Completion.

Accepted rows (see `data_templates/formats/` for an example of each):

    messages            {"messages": [{"role", "content"}, ...], "tools": [...]?}
    sharegpt            {"conversations": [{"from", "value"}, ...], "system"?, "tools"?}
    alpaca              {"instruction", "input"?, "output", "system"?, "history"?}
    prompt_completion   {"prompt", "completion"} as text, or both as lists of messages
    text                {"text"}: trained as a whole

Where prompts are wanted, the completion may be missing, and `text` is a prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from alignkit.data.fields import need, plain_text
from alignkit.data.sources import Row
from alignkit.data.toolcalls import tool_calls, tool_schemas
from alignkit.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}


@dataclass(frozen=True)
class Message:
    """One turn.

    Args:
        role: one of `ROLES`.
        content: its text; may be empty only with tool calls.
        tool_calls: calls in the OpenAI form, `{"type": "function", "function": {...}}`.
        trained: False leaves an assistant turn out of the loss.
    """

    role: str
    content: str
    tool_calls: tuple[dict[str, Any], ...] = ()
    trained: bool = True


@dataclass(frozen=True)
class Conversation:
    """Turns that a chat template renders.

    Args:
        messages: at least one of them from the assistant, unless only a prompt is wanted.
        tools: function schemas offered to the assistant.
        place: `file:line` of the row.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    place: str


@dataclass(frozen=True)
class Completion:
    """Plain text, rendered without a template.

    Args:
        prompt: text that is read and not trained; empty for the format `text`.
        completion: text that is trained; empty if only a prompt is wanted.
        place: `file:line` of the row.
    """

    prompt: str
    completion: str
    place: str


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

    With `answered` the row needs the key of the completion too.
    """
    for name, (prompt, completion) in KEYS.items():
        if prompt in row.values and (completion in row.values or not answered):
            return name
    return None


def detect_format(row: Row) -> str:
    """Name of the row's format, found from its keys.

    Raises:
        DataError: the keys fit no format, or are those of preference pairs.
    """
    keys = row.values
    if "chosen" in keys and "rejected" in keys:
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
        hint="rows are messages | conversations | instruction, output | prompt, completion | text; "
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
    return [PARSERS[name](row, True) for row in rows]


def _parse_messages(row: Row, answered: bool) -> Text:
    return make_conversation(row, read_messages(row, need(row, "messages", list)), answered)


def _parse_sharegpt(row: Row, answered: bool) -> Text:
    return make_conversation(row, read_turns(row, need(row, "conversations", list)), answered)


def read_turns(row: Row, turns: list[Any]) -> list[Message]:
    """Messages of a `conversations` list, with `from` and `value`, or with `role`.

    Raises:
        DataError: a turn without speaker or text, or an unknown speaker.
    """
    if turns and isinstance(turns[0], dict) and "role" in turns[0]:
        return read_messages(row, turns)
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise DataError(
                f"{row.place}: conversations[{number}] has no `from` and `value`",
                hint='as in {"from": "human", "value": "Hello"}',
            )
        role = _SHAREGPT_ROLES.get(str(turn["from"]).lower())
        if role is None:
            raise DataError(
                f"{row.place}: conversations[{number}].from is {turn['from']!r}",
                hint=f"known speakers: {', '.join(_SHAREGPT_ROLES)}",
            )
        if turn["from"] == "function_call":
            messages.append(Message(role, "", tool_calls(turn["value"], row, number)))
        else:
            content = plain_text(turn["value"], row, f"conversations[{number}]")
            messages.append(Message(role, content))
    return messages


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
    for number, pair in enumerate(row.values.get("history") or []):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(
                f"{row.place}: history[{number}] must be [question, answer]",
                hint='as in "history": [["Hello", "Hi, how can I help?"]]',
            )
        messages += [Message("user", str(pair[0])), Message("assistant", str(pair[1]))]
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
        context = [replace(message, trained=False) for message in read_messages(row, prompt)]
        return make_conversation(row, context + read_messages(row, completion), answered)
    text = completion if completion == "" else need(row, "completion", str)
    if answered and not text.strip():
        raise DataError(
            f"{row.place}: the row has no answer: completion is empty",
            hint="remove the row, or write the completion",
        )
    return Completion(need(row, "prompt", str), text, row.place)


def _parse_text(row: Row, answered: bool) -> Text:
    text = plain_text(need(row, "text", str), row, "text")
    if not text.strip():
        raise DataError(f"{row.place}: text is empty", hint="remove the row")
    return Completion("", text, row.place) if answered else Completion(text, "", row.place)


PARSERS: dict[str, Callable[[Row, bool], Text]] = {
    "messages": _parse_messages,
    "sharegpt": _parse_sharegpt,
    "alpaca": _parse_alpaca,
    "prompt_completion": _parse_prompt_completion,
    "text": _parse_text,
}
"""Format -> its parser, of a row and whether the row must have a completion."""


def read_messages(row: Row, turns: list[Any]) -> list[Message]:
    """Messages of a list of `{"role", "content"}`.

    Raises:
        DataError: a turn without role, an unknown role, or content that is not text.
    """
    messages = []
    for number, turn in enumerate(turns):
        name = f"messages[{number}]"
        if not isinstance(turn, dict) or "role" not in turn:
            raise DataError(
                f"{row.place}: {name} has no `role`",
                hint='as in {"role": "user", "content": "Hello"}',
            )
        if turn["role"] not in ROLES:
            raise DataError(
                f"{row.place}: {name}.role is {turn['role']!r}", hint=f"roles: {', '.join(ROLES)}"
            )
        calls = turn.get("tool_calls")
        content = plain_text(turn.get("content"), row, f"{name}.content")
        weight = turn.get("weight")
        if weight not in (None, 0, 1):
            raise DataError(
                f"{row.place}: {name}.weight is {weight!r}",
                hint="1 trains the turn, 0 leaves it out of the loss",
            )
        parsed = tool_calls(calls, row, number) if calls else ()
        messages.append(Message(turn["role"], content, parsed, trained=weight != 0))
    return messages


def make_conversation(row: Row, messages: list[Message], answered: bool = True) -> Conversation:
    """The messages with the row's `system` text and tools.

    Args:
        row: where the messages come from.
        messages: its turns.
        answered: there must be an assistant turn to train on; else the last turn may be empty.

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
        messages = [Message("system", system), *messages]
    trained = [message for message in messages if message.role == "assistant" and message.trained]
    if answered and not trained:
        raise DataError(
            f"{row.place}: the row has no answer: no assistant turn to train on",
            hint="remove the row, or add the assistant's turn",
        )
    for number, message in enumerate(messages if answered else messages[:-1]):
        if message.role == "assistant" and not message.content.strip() and not message.tool_calls:
            raise DataError(
                f"{row.place}: the row has no answer: the assistant's turn {number} is empty",
                hint="remove the row, or write the answer",
            )
    return Conversation(tuple(messages), tool_schemas(row), row.place)
