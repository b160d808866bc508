"""Rows as other programs write them -> rows that `data.formats` and `data.pairs` know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from alignkit.data.sources import Row
from alignkit.errors import DataError
from alignkit.recipe.importing.datasets import ForeignRows

_TURNS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")
"""Columns that may hold turns."""


def known_row(row: Row) -> Row:
    """A pair of OpenAI's preference fine-tuning as prompt, chosen and rejected; others as they are.

    Args:
        row: of any format.
    """
    given = row.values.get("input")
    keys = ("preferred_output", "non_preferred_output")
    if not isinstance(given, dict) or not all(key in row.values for key in keys):
        return row
    others = {key: v for key, v in row.values.items() if key not in ("input", *keys)}
    tools = {"tools": given["tools"]} if given.get("tools") else {}
    pair = {"prompt": given.get("messages"), **tools}
    chosen, rejected = (row.values[key] for key in keys)
    return replace(row, values={**others, **pair, "chosen": chosen, "rejected": rejected})


def rewriter(rows: ForeignRows) -> Callable[[Row], Row]:
    """A function from a row as another toolkit has it to one of `rows.format`.

    Args:
        rows: how it has them.

    Returns:
        The function; it raises DataError where a turn has no speaker, or an unknown one.
    """

    def rewrite(row: Row) -> Row:
        renamed = {old: new for new, old in rows.columns.items()}
        # a column that takes over a name goes before one that had it
        kept = {k: v for k, v in row.values.items() if k not in rows.columns or k in renamed}
        values = {renamed.get(key, key): value for key, value in kept.items()}
        if rows.layout == "segments":
            values = _of_segments(values, row.place)
        if rows.turn_keys:
            for key in _TURNS:
                if isinstance(values.get(key), list | dict):
                    values[key] = _turns(values[key], rows, row.place, key)
        return replace(row, values=values)

    return rewrite


def _turns(value: Any, rows: ForeignRows, place: str, key: str) -> Any:
    if isinstance(value, dict):
        return _turn(value, rows, f"{place}: {key}")
    return [_turn(turn, rows, f"{place}: {key}[{n}]") for n, turn in enumerate(value)]


def _turn(turn: Any, rows: ForeignRows, where: str) -> dict[str, Any]:
    role, content = rows.turn_keys["role"], rows.turn_keys["content"]
    if not isinstance(turn, dict) or role not in turn:
        raise DataError(f"{where} has no `{role}`", hint=f"turns are {{{role!r}, {content!r}}}")
    speaker = str(turn[role])
    meant = rows.speakers.get(speaker, speaker if not rows.speakers else None)
    if meant is None:
        known = ", ".join(rows.speakers)
        raise DataError(f"{where}.{role} is {speaker!r}", hint=f"known speakers: {known}")
    train = rows.turn_keys.get("train", "")
    values = {k: v for k, v in turn.items() if k not in (role, content, train)}
    if turn.get(train) is not None:
        values["weight"] = int(bool(turn[train]))
    if meant == "function_call":
        return {"role": "assistant", "content": "", **values, "tool_calls": turn.get(content)}
    return {"role": meant, "content": turn.get(content), **values}


def _of_segments(values: dict[str, Any], place: str) -> dict[str, Any]:
    """Texts of which some are trained -> what stands before the last of these, and it."""
    segments = values.get("segments")
    if not isinstance(segments, list) or not all(isinstance(s, dict) for s in segments):
        raise DataError(f"{place}: has no `segments`", hint='as in [{"label": true, "text": "…"}]')
    texts = [str(segment.get("text") or "") for segment in segments]
    trained = [number for number, segment in enumerate(segments) if segment.get("label")]
    if not trained or trained[-1] != len(texts) - 1:
        raise DataError(f"{place}: its last segment is not trained", hint="remove what follows it")
    if len(trained) > 1 and trained != list(range(trained[0], len(texts))):
        raise DataError(
            f"{place}: trains {len(trained)} segments with others between them",
            hint="a completion is one text: split the row, or write turns",
        )
    others = {key: value for key, value in values.items() if key != "segments"}
    begin = trained[0]
    return {**others, "prompt": "".join(texts[:begin]), "completion": "".join(texts[begin:])}
