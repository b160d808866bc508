"""JSON -> rows as plain values, each with its place; every fault with file and line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from alignkit.errors import DataError

Found = tuple[dict[str, Any], str]
"""Values of a row, and its place."""

_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_LIST_HINT = "the list must close with ] and its rows be separated by commas"


def load_json(text: str, where: str, hint: str) -> Any:
    """The value of a JSON text.

    Args:
        text: to read.
        where: beginning of the error, which is followed by ` is not valid JSON` or the like.
        hint: what to do about broken JSON.

    Raises:
        DataError: it is not JSON, too deep, or holds what nothing can use, as a key twice.
    """
    try:
        values = json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise _json_fault(error, where, hint) from None
    _require_whole(values, text, where)
    return values


class _TwiceError(ValueError):
    """A key that an object has twice."""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise _TwiceError(next(key for key in values if sum(k == key for k, _ in pairs) > 1))
    return values


def _json_fault(error: Exception, where: str, hint: str) -> DataError:
    if isinstance(error, json.JSONDecodeError):
        return DataError(
            f"{where} is not valid JSON: {error.msg} at column {error.colno}", hint=hint
        )
    if isinstance(error, _TwiceError):
        return DataError(f"{where} has the key {error.args[0]!r} twice", hint="remove one of them")
    if isinstance(error, RecursionError):
        return DataError(f"{where} is nested too deeply", hint="remove what nests, or the row")
    return DataError(
        f"{where} holds a number with more digits than can be read",
        hint="write such a number as text, in double quotes",
    )


def _require_whole(values: Any, text: str, where: str) -> None:
    """Refuse half of a surrogate pair: no encoding has it, so no tokenizer and no file can."""
    if _HALF.search(text) is None:
        return
    waiting = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            raise DataError(
                f"{where} holds half of a character, as a cut-off emoji leaves it: {value[-40:]!a}",
                hint="write the whole character, or remove the half",
            )


def read_jsonl(lines: Iterable[str], shown: str) -> Iterator[Found]:
    """Rows of lines that hold one JSON object each; blank ones count as lines only.

    Args:
        lines: of the file.
        shown: how messages name it.

    Raises:
        DataError: a line is no JSON object.
    """
    hint = "a .jsonl file holds one whole JSON object on each line"
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{shown}:{number}"
            yield _object(load_json(line.removesuffix("\n"), f"{place}:", hint), place)


def read_json(lines: Iterable[str], shown: str) -> Iterator[Found]:
    """Rows of a JSON array, each with the line it starts on; of objects on lines, too.

    Args:
        lines: of the file.
        shown: how messages name it.

    Raises:
        DataError: it is no list of JSON objects.
    """
    text = "".join(lines)
    decoder, position, line = json.JSONDecoder(object_pairs_hook=_distinct), 0, 1

    def skip(position: int, line: int) -> tuple[int, int]:
        while position < len(text) and text[position] in " \t\r\n":
            line += text[position] == "\n"
            position += 1
        return position, line

    position, line = skip(position, line)
    if text[position] != "[":
        if "\n{" in text:
            yield from read_jsonl(text.split("\n"), shown)
            return
        raise DataError(
            f"{shown}:{line}: a .json file must hold a list of rows, but starts with "
            f"{text[position]!r}",
            hint="one object per line belongs in a .jsonl file",
        )
    position, line = skip(position + 1, line)
    closed = text.startswith("]", position)
    while not closed:
        try:
            start = position
            values, end = decoder.raw_decode(text, start)
            position, after = skip(end, line + text.count("\n", start, end))
            closed = text.startswith("]", position)
            if not closed and not text.startswith(",", position):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
        except (ValueError, RecursionError) as error:
            at = error.lineno if isinstance(error, json.JSONDecodeError) else line
            raise _json_fault(error, f"{shown}:{at}:", _LIST_HINT) from None
        place = f"{shown}:{line}"
        _require_whole(values, text[start:end], f"{place}:")
        yield _object(values, place)
        line = after
        if not closed:
            position, line = skip(position + 1, line)
    position, line = skip(position + 1, line)
    if position < len(text):
        raise DataError(
            f"{shown}:{line}: text follows the end of the list",
            hint="a .json file holds one list; join the lists, or write .jsonl",
        )


def _object(values: Any, place: str) -> Found:
    if not isinstance(values, dict):
        raise DataError(
            f"{place}: a row must be a JSON object, got {type(values).__name__}",
            hint='as in {"messages": [...]}; see data_templates/formats for every row format',
        )
    return values, place
