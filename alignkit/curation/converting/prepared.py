"""What a format leaves of a row: the rest is noted, or the row left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from alignkit.curation.converting.told import Told
from alignkit.data.turns import Message


class CannotSay(Exception):
    """The format has no place for the row: `str` says for what of it."""


Note = Callable[[str], None]
"""Takes down what the written row does not say, as in `lose their margins`."""


def as_chat(told: Told, note: Note) -> Told:
    """The row as turns: a prompt of plain text is what the user says.

    Args:
        told: a row.
        note: takes down that it was plain text.

    Raises:
        CannotSay: nobody asks.
    """
    if not isinstance(told.prompt, str):
        return told
    if not told.prompt.strip():
        raise CannotSay("plain text without a prompt, which is no chat")
    note("were plain text: as a chat they go through the model's template")
    system = (Message("system", told.system),) if told.system else ()
    return replace(
        told,
        prompt=(*system, Message("user", told.prompt)),
        answers=tuple((Message("assistant", str(side)),) for side in told.answers),
        system="",
    )


def turns_of(said: Any) -> tuple[Message, ...]:
    """The turns of what is said in a chat.

    Args:
        said: a prompt or an answer of it.
    """
    assert isinstance(said, tuple)
    return said


def system_text(turns: Sequence[Message]) -> tuple[str, Sequence[Message]]:
    """The text of a system turn that opens, and the others; a turn with keys of its own stays.

    Args:
        turns: of a chat.
    """
    if turns and turns[0].role == "system" and not is_special(turns[0]) and turns[0].content:
        return turns[0].content, turns[1:]
    return "", turns


def is_special(turn: Message) -> bool:
    """Whether a turn is more than its text.

    Args:
        turn: of a chat.
    """
    marked = turn.role == "assistant" and (not turn.trained or turn.marked is not None)
    return bool(turn.tool_calls or turn.more or marked)


def _one(told: Told, note: Note) -> Told:
    """With the better answer alone."""
    if len(told.answers) < 2:
        return told
    note("lose their rejected answers")
    prompt = told.prompt if isinstance(told.prompt, str) else _untrained(told.prompt)
    return _without_margin(replace(told, prompt=prompt, answers=told.answers[:1]), note)


def _untrained(turns: Sequence[Message]) -> tuple[Message, ...]:
    """The turns, of which none is trained: they are a prompt."""
    return tuple(
        replace(turn, trained=False, marked=None) if turn.role == "assistant" else turn
        for turn in turns
    )


def _answered(told: Told, note: Note) -> Told:
    if not told.answers:
        raise CannotSay("a prompt without an answer")
    return _one(told, note)


def _chat(told: Told, note: Note) -> Told:
    return as_chat(_one(told, note), note)


def _pair(told: Told, note: Note) -> Told:
    if len(told.answers) != 2:
        raise CannotSay("a single answer, which is no pair")
    return told


def _pair_of_turns(told: Told, note: Note) -> Told:
    return as_chat(_pair(told, note), note)


def _pair_without_system(told: Told, note: Note) -> Told:
    told = _pair_of_turns(told, note)
    system, turns = system_text(turns_of(told.prompt))
    if system:
        note("lose their system texts")
    return replace(told, prompt=tuple(turns))


def _unmargined(told: Told, note: Note) -> Told:
    return _without_margin(told, note) if len(told.answers) == 2 else told


def _openai(told: Told, note: Note) -> Told:
    return as_chat(_unmargined(told, note), note)


def _without_margin(told: Told, note: Note) -> Told:
    if told.margin is not None:
        note("lose their margins")
    return replace(told, margin=None)


def _asked(told: Told, note: Note) -> Told:
    """Without the last answer, of which what its prompt begins stays."""
    if isinstance(told.prompt, tuple) and len(told.answers) == 1:
        *before, last = (*told.prompt, *turns_of(told.answers[0]))
        ends = () if last.role == "assistant" else (last,)
        said = _untrained((*before, *ends))
        if ends:
            return replace(told, prompt=said, answers=())
        begun = replace(last, content=last.content[: last.given], tool_calls=(), marked=None)
        told = replace(told, prompt=(*said, *([begun] if last.given else [])))
    if not told.answers:
        return told
    if isinstance(told.prompt, tuple) and len(told.answers) == 2:
        told = replace(told, prompt=_untrained(told.prompt))
    note("lose their answers")
    return _without_margin(replace(told, answers=(), label=None), note)


PREPARED: dict[str, Callable[[Told, Note], Told]] = {
    "messages": _chat,
    "sharegpt": _chat,
    "alpaca": _chat,
    "prompt_completion": _answered,
    "text": _answered,
    "prompts": _asked,
    "preference": _pair,
    "sharegpt_preference": _pair_of_turns,
    "hh": _pair_without_system,
    "labelled": _unmargined,
    "openai": _openai,
}
"""Name of a format -> what it leaves of a row; what it cannot is noted, and the rest is written."""
