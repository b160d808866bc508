"""Rows of any format as what a person would compare: a prompt, its answers, and who speaks."""

from __future__ import annotations

import datetime
import decimal
import hashlib
import json
import re
import unicodedata
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.data.examples import parse_rows
from alignkit.data.formats import Completion, Text, is_pair
from alignkit.data.prompt_rows import parse_prompts
from alignkit.data.sources import Row, stream_rows
from alignkit.data.turns import Message
from alignkit.errors import DataError
from alignkit.recipe.rows import SourceSpec

_BLANKS = re.compile(r"\s+")


@dataclass(frozen=True)
class Record:
    """One row.

    Args:
        place: `file:line`.
        system: what system turns say, which many rows may have in common.
        prompt: everything else before its last answer.
        answers: none, one, or the chosen and the rejected one.
        roles: who speaks, in order; empty for plain text.
        label: of a labelled row; None without one.
        columns: every value of the row.
        identity: 16 bytes that are equal for rows that teach the same: turns with their speakers,
            calls and marks, tools, label and margin; but for case, blanks and Unicode forms.
    """

    place: str
    system: str
    prompt: str
    answers: tuple[str, ...]
    roles: tuple[str, ...]
    label: bool | None
    columns: dict[str, Any]
    identity: bytes = b""

    @property
    def text(self) -> str:
        """All that is said but by the system, and the calls."""
        return "\n".join(filter(None, [self.prompt, *self.answers]))

    @property
    def is_unanswered(self) -> bool:
        """Whether nobody answers, at its end or before."""
        return not self.answers and "assistant" not in self.roles

    @property
    def whole(self) -> str:
        """The text, and what the system says."""
        return "\n".join(filter(None, [self.system, self.text]))


@dataclass(frozen=True)
class Unread:
    """A row that no stage could read.

    Args:
        place: `file:line`.
        reason: which rule it breaks.
    """

    place: str
    reason: str


Columns = Mapping[str, str]
"""New name of a column -> the one that it has, as in a recipe."""


def read_records(
    path: str, take: int | None = None, columns: Columns | None = None
) -> Iterator[Record | Unread]:
    """Every row of a file, in order; one at a time is in memory.

    Args:
        path: of the file, in any row format.
        take: only the first so many.
        columns: that are renamed.

    Raises:
        DataError: the file cannot be read at all.
    """
    for row in stream_rows(SourceSpec(path=path, take=take, columns=dict(columns or {}))):
        try:
            yield _record(row)
        except DataError as error:
            yield Unread(row.place, error.message.removeprefix(f"{row.place}: "))


def read_all(files: Sequence[str], columns: Columns | None = None) -> Iterator[Record]:
    """Every row of some files.

    Args:
        files: of rows.
        columns: that are renamed.

    Raises:
        DataError: a row cannot be read.
    """
    for file in files:
        for record in read_records(file, columns=columns):
            if isinstance(record, Unread):
                raise DataError(
                    f"{record.place}: {record.reason}",
                    hint="mend the row, name its columns with --columns, or remove such rows with "
                    "`data clean --drop unreadable`",
                )
            yield record


def as_line(values: Any, place: str = "the row") -> str:
    """A row as a line of a .jsonl file. Dates and exact numbers of tables become text.

    Args:
        values: its columns.
        place: of the row, for messages.

    Raises:
        DataError: JSON has no place for a value.
    """
    try:
        return json.dumps(values, ensure_ascii=False, default=_text_of, allow_nan=False) + "\n"
    except RecursionError:
        raise too_deep(place) from None
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{place}: holds a value that JSON has no place for: {error}",
            hint="leave the column out, or write text or null in its place",
        ) from None


def _text_of(value: Any) -> str:
    if isinstance(value, datetime.date | datetime.time | decimal.Decimal | uuid.UUID):
        return str(value)
    raise TypeError(f"a {type(value).__name__}")


def too_deep(place: str) -> DataError:
    """A row that nests so deeply that nothing can go through it.

    Args:
        place: of the row.
    """
    return DataError(f"{place}: is nested too deeply", hint="remove what nests, or the row")


def normalized(text: str) -> str:
    """The text as it is compared: NFKC, lower case, single blanks.

    Args:
        text: of a row.
    """
    return _BLANKS.sub(" ", unicodedata.normalize("NFKC", text)).strip().casefold()


def fingerprint(text: str) -> bytes:
    """16 bytes that are equal for texts that are equal once normalized.

    Args:
        text: of a row.
    """
    return hashlib.blake2b(normalized(text).encode("utf-8", "replace"), digest_size=16).digest()


def words(text: str) -> list[str]:
    """The words of a text, in lower case.

    Args:
        text: of a row.
    """
    return re.findall(r"\w+", text.casefold())


def _record(row: Row) -> Record:
    label = row.values.get("label")
    known = label if isinstance(label, bool) else None
    answers: tuple[str, ...]
    if is_pair(row):
        (example,) = parse_rows([row], "auto", "pairs")
        if example.unusable:
            raise DataError(f"{row.place}: {example.unusable}")
        texts = example.texts
        answers = tuple(_split(text)[1] or "" for text in texts)
    else:
        try:
            (example,) = parse_rows([row], "auto", "answers")
            texts = example.texts
        except DataError:
            texts = (parse_prompts([row], "auto")[0][0],)
        answer = _split(texts[0])[1]
        answers = () if answer is None else (answer,)
    text = texts[0]
    return Record(
        row.place,
        _system(text),
        _split(text)[0],
        answers,
        () if isinstance(text, Completion) else tuple(m.role for m in text.messages),
        known,
        row.values,
        _identity(texts, known, row.values.get("margin")),
    )


def _split(text: Text) -> tuple[str, str | None]:
    """What stands before the last answer, and that answer; None if the last turn is none."""
    if isinstance(text, Completion):
        return text.prompt, text.completion or None
    *before, last = text.messages
    if last.role != "assistant" or last.is_empty:
        return _join([*before, last]), None
    return _join(before), _turn_text(last)


def _system(text: Text) -> str:
    turns = () if isinstance(text, Completion) else text.messages
    return "\n".join(turn.content for turn in turns if turn.role in _SYSTEM and turn.content)


_SYSTEM = ("system", "developer")


def _join(messages: Sequence[Message]) -> str:
    said = (_turn_text(turn) for turn in messages if turn.role not in _SYSTEM)
    return "\n".join(filter(None, said))


def _turn_text(turn: Message) -> str:
    return "\n".join(filter(None, [turn.content, *_calls(turn)]))


def _calls(turn: Message) -> list[str]:
    return [json.dumps(call["function"], ensure_ascii=False) for call in turn.tool_calls]


def _identity(texts: Sequence[Text], label: bool | None, margin: Any) -> bytes:
    parts: list[Any] = [label, repr(margin)]
    for text in texts:
        if isinstance(text, Completion):
            parts.append([normalized(text.prompt), normalized(text.completion)])
            continue
        parts.append([text.context, text.tools])
        parts += [
            [turn.role, normalized(turn.content), _calls(turn), turn.trained, turn.given]
            for turn in text.messages
        ]
    return fingerprint(json.dumps(parts, ensure_ascii=False, sort_keys=True, default=str))
