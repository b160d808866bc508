"""Turns of a conversation: the speaker, the text, the tools, and every other key as the row has it.

A null is an absent key: files that are tables fill one in wherever another row has a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from alignkit.data.sources import Row, need, parse_json, plain_text
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
MARKS = ("weight", "train", "trainable", "loss", "loss_weight", "loss_mask")
"""Keys by which a turn of any format says whether it is trained."""
_OWN = {"role", "content", "from", "value", "tool_calls", *MARKS}


@dataclass(frozen=True)
class Message:
    """One turn.

    Args:
        role: one of `ROLES`.
        content: its text; may be empty only with tool calls.
        tool_calls: calls in the OpenAI form, `{"type": "function", "function": {...}}`.
        trained: False leaves the turn out of the loss, whatever is trained on.
        more: every further key of the turn, for the template; without nulls.
        given: characters of the text that the assistant is given and goes on from.
        marked: the row's own mark of this turn; None without one.
    """

    role: str
    content: str
    tool_calls: tuple[dict[str, Any], ...] = ()
    trained: bool = True
    more: dict[str, Any] = field(default_factory=dict)
    given: int = 0
    marked: bool | None = field(default=None, compare=False)

    @property
    def is_empty(self) -> bool:
        """Whether the turn says nothing and calls nothing beyond what is given."""
        return not self.content[self.given :].strip() and not self.tool_calls


def read_messages(row: Row, turns: list[Any]) -> list[Message]:
    """Messages of a list of `{"role", "content"}`.

    Raises:
        DataError: a turn without role, an unknown role, or content that is not text.
    """
    messages = []
    for number, turn in enumerate(turns):
        name = f"messages[{number}]"
        if not isinstance(turn, dict) or turn.get("role") is None:
            raise DataError(
                f"{row.place}: {name} has no `role`",
                hint='as in {"role": "user", "content": "Hello"}',
            )
        role = turn["role"]
        if role not in ROLES:
            raise DataError(
                f"{row.place}: {name}.role is {role!r}", hint=f"roles: {', '.join(ROLES)}"
            )
        content = plain_text(turn.get("content"), row, f"{name}.content")
        messages.append(_message(row, number, name, turn, role, content))
    return messages


def read_turns(row: Row, turns: list[Any]) -> list[Message]:
    """Messages of a `conversations` list, with `from` and `value`, or with `role`.

    Raises:
        DataError: a turn without speaker or text, or an unknown speaker.
    """
    if turns and isinstance(turns[0], dict) and turns[0].get("role") is not None:
        return read_messages(row, turns)
    messages = []
    for number, turn in enumerate(turns):
        name = f"conversations[{number}]"
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise DataError(
                f"{row.place}: {name} has no `from` and `value`",
                hint='as in {"from": "human", "value": "Hello"}',
            )
        speaker, value = str(turn["from"]).lower(), turn["value"]
        role = _SHAREGPT_ROLES.get(speaker)
        if role is None:
            raise DataError(
                f"{row.place}: {name}.from is {turn['from']!r}",
                hint=f"known speakers: {', '.join(_SHAREGPT_ROLES)}",
            )
        if speaker == "function_call":
            turn, value = turn | {"tool_calls": value}, ""
        messages.append(_message(row, number, name, turn, role, plain_text(value, row, name)))
    return messages


def _message(
    row: Row, number: int, name: str, turn: dict[str, Any], role: str, content: str
) -> Message:
    turn = without_nulls(turn) if row.filled else turn
    mark, calls = _mark(row, name, turn), turn.get("tool_calls")
    return Message(
        role,
        content,
        tool_calls(calls, row, number) if calls else (),
        trained=mark is not False,
        more={k: v for k, v in turn.items() if v is not None and k not in _OWN},
        marked=mark,
    )


def _mark(row: Row, name: str, turn: dict[str, Any]) -> bool | None:
    """Whether the turn's own marks ask for training; None without one."""
    found = {key: turn[key] for key in MARKS if turn.get(key) is not None}
    for key, value in found.items():
        if value not in (0, 1):
            raise DataError(
                f"{row.place}: {name}.{key} is {value!r}",
                hint="1 or true trains the turn, 0 or false leaves it out of the loss",
            )
    if len(set(map(bool, found.values()))) > 1:
        raise DataError(
            f"{row.place}: {name} has marks that contradict each other: "
            f"{', '.join(f'{key} is {value!r}' for key, value in found.items())}",
            hint="keep one of them",
        )
    return bool(next(iter(found.values()))) if found else None


def continued(
    row: Row, prompt: list[Message], completion: Sequence[Message]
) -> tuple[list[Message], list[Message]]:
    """Prompt and completion, where an answer that the prompt begins is one turn of the completion.

    Args:
        row: where both come from.
        prompt: turns; the last one may be the assistant's.
        completion: turns that follow it.

    Raises:
        DataError: both parts of the turn have a key, with different values.
    """
    ends = [*prompt[-1:], *completion[:1]]
    if [turn.role for turn in ends] != ["assistant", "assistant"] or ends[0].tool_calls:
        return prompt, list(completion)
    begun, rest = ends
    twice = [key for key in begun.more if rest.more.get(key, begun.more[key]) != begun.more[key]]
    if twice:
        raise DataError(
            f"{row.place}: the prompt begins an answer and the completion ends it, and each has "
            f"another `{twice[0]}`",
            hint="keep the key in one of the two",
        )
    whole = replace(
        rest,
        content=begun.content + rest.content,
        more=begun.more | rest.more,
        given=len(begun.content),
    )
    return prompt[:-1], [whole, *completion[1:]]


def tool_calls(value: Any, row: Row, number: int) -> tuple[dict[str, Any], ...]:
    """Calls in the OpenAI form, with arguments as a mapping and ids as the row has them."""
    calls = parse_json(value, row, f"turn {number}") if isinstance(value, str) else value
    parsed = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = (call.get("function") or call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or "name" not in function:
            raise DataError(
                f"{row.place}: turn {number} calls a tool without a name",
                hint='as in {"name": "get_weather", "arguments": {"city": "Oslo"}}',
            )
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = parse_json(arguments, row, f"arguments of {function['name']}")
        body = {"name": function["name"], "arguments": {} if arguments is None else arguments}
        inside = function is not call
        kind = {} if call.get("type") else {"type": "function"}
        parsed.append(
            kind
            | {k: v for k, v in call.items() if v is not None and (inside or k not in body)}
            | {"function": body | _others(function, body) if inside else body}
        )
    return tuple(parsed)


def _others(function: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in function.items() if value is not None and key not in body}


def tool_schemas(row: Row) -> tuple[dict[str, Any], ...]:
    """Function schemas in the OpenAI form."""
    tools = row.values.get("tools")
    if tools is None or (isinstance(tools, str) and not tools.strip()):
        return ()
    schemas = []
    for number, tool in enumerate(need(row, "tools", list)):
        tool = without_nulls(tool) if row.filled else tool
        function = (tool.get("function") or tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or "name" not in function:
            raise DataError(
                f"{row.place}: tools[{number}] describes no function with a name",
                hint='as in {"name": "get_weather", "parameters": {...}}',
            )
        inside = function is not tool
        schemas.append(tool if inside else {"type": "function", "function": tool})
    return tuple(schemas)


def without_nulls(value: Any) -> Any:
    """The value without keys that are null, however deep they stand."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value
