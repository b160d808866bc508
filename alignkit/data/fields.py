"""Values of a row, read with the type that a format needs."""

from __future__ import annotations

import json
from typing import Any

from alignkit.data.sources import Row
from alignkit.errors import DataError


def need(row: Row, key: str, kind: type) -> Any:
    """The value of a key; a list may be stored as JSON text.

    Args:
        row: to read from.
        key: that the row must have.
        kind: `str` or `list`.

    Raises:
        DataError: no such key, or another type.
    """
    if key not in row.values:
        keys = ", ".join(map(str, row.values))
        raise DataError(
            f"{row.place}: the row has no `{key}`",
            hint=f"its keys are {keys}; rename with columns, as in columns: {{{key}: ...}}",
        )
    value = row.values[key]
    if kind is list and isinstance(value, str):
        value = parse_json(value, row, key)
    if not isinstance(value, kind):
        wanted = "a list" if kind is list else "text"
        raise DataError(
            f"{row.place}: `{key}` must be {wanted}, got {type(value).__name__}",
            hint=f"change the value, or name another column, as in columns: {{{key}: ...}}",
        )
    return value


def parse_json(value: str, row: Row, key: str) -> Any:
    """The value of a JSON text; `key` names it in the error."""
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{row.place}: `{key}` is not valid JSON: {error.msg}",
            hint="write keys and texts in double quotes, and true, false and null in lower case",
        ) from None


def plain_text(value: Any, row: Row, key: str) -> str:
    """Text of a value: a text, None, or a list of text parts; `key` names it in errors."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, list):
        parts = []
        for part in value:
            kind = part.get("type", "text") if isinstance(part, dict) else "text"
            text = (part.get("text") or part.get("value")) if isinstance(part, dict) else part
            if kind != "text" or not isinstance(text, str):
                raise DataError(
                    f"{row.place}: {key} holds a part of type {kind!r}",
                    hint="alignkit trains on text; images and audio are not supported",
                )
            parts.append(text)
        return "".join(parts)
    raise DataError(
        f"{row.place}: {key} must be text, got {type(value).__name__}",
        hint='write text, or a list of parts such as {"type": "text", "text": "Hello"}',
    )
