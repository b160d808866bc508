"""What a row tells -> the values of a row in another format, and what that format cannot say."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from alignkit.curation.converting.prepared import (
    CannotSay,
    Note,
    is_special,
    system_text,
    turns_of,
)
from alignkit.curation.converting.told import Told
from alignkit.data.turns import Message

Values = dict[str, Any]


_SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}


def messages(told: Told, note: Note) -> list[Values]:
    """`{"messages": [...]}`, and `tools` where there are some."""
    return [{"messages": [_turn(turn) for turn in _whole(told, note)], **_tools(told)}]


def sharegpt(told: Told, note: Note) -> list[Values]:
    """`{"conversations": [...]}`, with `system` and `tools`."""
    system, turns = system_text(_whole(told, note))
    spoken = [_spoken(turn, note) for turn in turns]
    return [{"conversations": spoken, **_system(system), **_tools(told)}]


def alpaca(told: Told, note: Note) -> list[Values]:
    """`{"instruction", "output"}`, with `system` and `history`."""
    system, turns = system_text(_whole(told, note))
    _require_dialogue(told, turns)
    *before, asked, answer = turns if told.answers else (*turns, Message("assistant", ""))
    pairs = [] if not before or before[0].role == "user" else [Message("user", ""), before.pop(0)]
    before = [*pairs, *before]
    expected = ["user", "assistant"] * (len(before) // 2 + 1)
    if [turn.role for turn in (*before, asked, answer)] != expected:
        raise CannotSay("turns that are no questions with one answer each")
    texts = [turn.content for turn in before]
    history = {"history": [list(p) for p in zip(texts[::2], texts[1::2], strict=True)]}
    values = {"instruction": asked.content, "output": answer.content}
    return [{**values, **_system(system), **(history if before else {})}]


def prompt_completion(told: Told, note: Note) -> list[Values]:
    """`{"prompt", "completion"}`, both as text or both as turns."""
    prompt, (answer,) = _sides(told)
    return [{"prompt": prompt, "completion": answer, **_tools(told), **_system(told.system)}]


def text(told: Told, note: Note) -> list[Values]:
    """`{"text"}` of plain text."""
    prompt, (answer,) = told.prompt, told.answers
    if not isinstance(prompt, str) or not isinstance(answer, str):
        raise CannotSay("turns: only a model's template makes text of a chat")
    if prompt:
        note("lose where the prompt ends: all of the text is trained")
    return [{"text": prompt + answer, **_tools(told), **_system(told.system)}]


def prompts(told: Told, note: Note) -> list[Values]:
    """`{"prompt"}` alone: what stands before the last answer."""
    prompt, _ = _sides(told)
    if not prompt:
        raise CannotSay("an answer without a prompt")
    return [{"prompt": prompt, **_tools(told), **_system(told.system)}]


def preference(told: Told, note: Note) -> list[Values]:
    """`{"prompt", "chosen", "rejected"}`, and `margin`."""
    prompt, answers = _sides(told)
    pair = dict(zip(("chosen", "rejected"), answers, strict=True))
    return [{"prompt": prompt, **pair, **_margin(told), **_tools(told), **_system(told.system)}]


def sharegpt_preference(told: Told, note: Note) -> list[Values]:
    """`{"conversations", "chosen", "rejected"}`, and `margin`."""
    system, turns = system_text(turns_of(told.prompt))
    sides = [[_spoken(turn, note) for turn in turns_of(side)] for side in told.answers]
    chosen, rejected = (side[0] if len(side) == 1 else side for side in sides)
    spoken = [_spoken(turn, note) for turn in turns]
    pair = {"conversations": spoken, "chosen": chosen, "rejected": rejected}
    return [{**pair, **_margin(told), **_system(system), **_tools(told)}]


def hh(told: Told, note: Note) -> list[Values]:
    """`{"chosen", "rejected"}` as dialogues of Human and Assistant."""
    _require_dialogue(told, [*turns_of(told.prompt), *map(_last, told.answers)])
    names = {"user": "Human", "assistant": "Assistant"}
    sides = [
        "".join(
            f"\n\n{names[turn.role]}: {turn.content}"
            for turn in (*turns_of(told.prompt), *turns_of(side))
        )
        for side in told.answers
    ]
    return [{"chosen": sides[0], "rejected": sides[1], **_margin(told)}]


def labelled(told: Told, note: Note) -> list[Values]:
    """`{"prompt", "completion", "label"}`; of a pair two rows."""
    if len(told.answers) == 2:
        sides = [replace(told, answers=(side,)) for side in told.answers]
        labels = [True, False]
    elif told.answers and told.label is not None:
        sides, labels = [told], [told.label]
    else:
        raise CannotSay("answers without a label")
    return [
        {**prompt_completion(side, note)[0], "label": label}
        for side, label in zip(sides, labels, strict=True)
    ]


def openai(told: Told, note: Note) -> list[Values]:
    """As OpenAI's fine-tuning reads it: messages, or a pair of outputs; arguments are JSON text."""
    if len(told.answers) == 2:
        sides = [_openai_turns(turns_of(side), note) for side in told.answers]
        given = {"messages": _openai_turns(turns_of(told.prompt), note), **_tools(told)}
        return [{"input": given, "preferred_output": sides[0], "non_preferred_output": sides[1]}]
    return [{"messages": _openai_turns(_whole(told, note), note), **_tools(told)}]


WRITERS: dict[str, Callable[[Told, Note], list[Values]]] = {
    "messages": messages,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "prompt_completion": prompt_completion,
    "text": text,
    "prompts": prompts,
    "preference": preference,
    "sharegpt_preference": sharegpt_preference,
    "hh": hh,
    "labelled": labelled,
    "openai": openai,
}
"""Name of a format -> what a prepared row is in it, some of them two rows."""


def _require_dialogue(told: Told, turns: Sequence[Message]) -> None:
    if told.tools or any(turn.role not in ("user", "assistant") for turn in turns):
        raise CannotSay("tools and further speakers")
    if any(is_special(turn) for turn in turns):
        raise CannotSay("turns with calls, marks or keys of their own")


def _last(said: Any) -> Message:
    return turns_of(said)[-1]


def _whole(told: Told, note: Note) -> tuple[Message, ...]:
    """All turns of a chat with one answer or none."""
    answers = (turn for side in told.answers for turn in turns_of(side))
    turns = (*turns_of(told.prompt), *answers)
    if any(turn.given for turn in turns if not turn.is_empty):
        note("lose how much of an answer their prompt begins: all of it is trained")
    return tuple(replace(turn, given=0) for turn in turns)


def _sides(told: Told) -> tuple[Any, list[Any]]:
    """Prompt and answers as values; what the prompt begins of an answer stands at its end."""
    if isinstance(told.prompt, str):
        return told.prompt, list(told.answers)
    prompt, answers = turns_of(told.prompt), [turns_of(side) for side in told.answers]
    begun = {side[0].content[: side[0].given] for side in answers if side and side[0].given}
    if begun:
        (start,) = begun
        prompt = (*prompt, Message("assistant", start))
        answers = [(replace(s[0], content=s[0].content[len(start) :]), *s[1:]) for s in answers]
    plain = [replace(turn, trained=True, marked=None) for turn in prompt]  # none of it is trained
    return [_turn(turn) for turn in plain], [[_turn(turn) for turn in side] for side in answers]


def _turn(turn: Message) -> Values:
    calls = {"tool_calls": list(turn.tool_calls)} if turn.tool_calls else {}
    return {"role": turn.role, "content": turn.content, **turn.more, **calls, **_mark(turn)}


def _openai_turns(turns: Sequence[Message], note: Note) -> list[Values]:
    """Turns whose calls have ids, and arguments as JSON text; results name the call's id."""
    used = {call.get("id") for turn in turns for call in turn.tool_calls}
    free = (name for n in itertools.count(1) if (name := f"call_{n}") not in used)
    written: list[Values] = []
    waiting: list[str] = []
    for turn in turns:
        values, calls = _turn(turn), []
        for call in turn.tool_calls:
            if "id" not in call:
                note("get ids for their calls")
            arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            function = {**call["function"], "arguments": arguments}
            calls.append({"id": call["id"] if "id" in call else next(free), **call})
            calls[-1]["function"] = function
            waiting.append(calls[-1]["id"])
        if turn.role == "tool" and waiting:
            named = values.get("tool_call_id", waiting[0])
            if "tool_call_id" not in values:
                note("get ids for their calls")
                values["tool_call_id"] = named
            waiting = [name for name in waiting if name != named]
        written.append(values | ({"tool_calls": calls} if calls else {}))
    return written


def _spoken(turn: Message, note: Note) -> Values:
    if turn.role not in _SPEAKERS:
        note(f"have a turn of the {turn.role}, which becomes the system's")
    if _only_calls(turn):
        called = [call["function"] for call in turn.tool_calls]
        value = json.dumps(called[0] if len(called) == 1 else called, ensure_ascii=False)
        return {"from": "function_call", "value": value}
    speaker = _SPEAKERS.get(turn.role, "system")
    calls = {"tool_calls": list(turn.tool_calls)} if turn.tool_calls else {}
    return {"from": speaker, "value": turn.content, **turn.more, **calls, **_mark(turn)}


def _only_calls(turn: Message) -> bool:
    """Whether an assistant's turn is nothing but names and arguments."""
    plain = all(call.keys() == {"type", "function"} for call in turn.tool_calls) and all(
        call["function"].keys() == {"name", "arguments"} for call in turn.tool_calls
    )
    empty = not turn.content and not turn.more and not _mark(turn)
    return bool(turn.tool_calls) and turn.role == "assistant" and plain and empty


def _mark(turn: Message) -> Values:
    if not turn.trained and turn.role == "assistant":
        return {"weight": 0}
    return {} if turn.marked is None else {"weight": int(turn.marked)}


def _system(system: str) -> Values:
    return {"system": system} if system else {}


def _tools(told: Told) -> Values:
    return {"tools": list(told.tools)} if told.tools else {}


def _margin(told: Told) -> Values:
    return {} if told.margin is None else {"margin": told.margin}
