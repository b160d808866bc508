"""Rows of any format as what a person would compare: a prompt, its answers, and who speaks."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
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
        prompt: everything before its last answer.
        answers: none, one, or the chosen and the rejected one.
        roles: who speaks, in order; empty for plain text.
        label: of a labelled row; None without one.
        columns: every value of the row.
        tools: the functions that are offered, as JSON text.
    """

    place: str
    prompt: str
    answers: tuple[str, ...]
    roles: tuple[str, ...]
    label: bool | None
    columns: dict[str, Any]
    tools: str = ""

    @property
    def text(self) -> str:
        """All that is said, and the calls."""
        return "\n".join(filter(None, [self.prompt, *self.answers]))

    @property
    def identity(self) -> bytes:
        """16 bytes that are equal for rows that teach the same: speakers, tools and label, too."""
        return fingerprint("\n".join([self.text, *self.roles, self.tools, str(self.label)]))


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


def as_line(values: Any) -> str:
    """A row as a line of a .jsonl file.

    Args:
        values: its columns.
    """
    return json.dumps(values, ensure_ascii=False, default=str) + "\n"


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
    if is_pair(row):
        (example,) = parse_rows([row], "auto", "pairs")
        if example.unusable:
            raise DataError(f"{row.place}: {example.unusable}")
        chosen, rejected = example.texts
        prompt, better = _split(chosen)
        pair = (better or "", _split(rejected)[1] or "")
        return Record(row.place, prompt, pair, _roles(chosen), known, row.values, _tools(chosen))
    try:
        (example,) = parse_rows([row], "auto", "answers")
    except DataError:
        ((asked, _),) = parse_prompts([row], "auto")
        said = _said(asked)
        return Record(row.place, said, (), _roles(asked), known, row.values, _tools(asked))
    (text,) = example.texts
    prompt, answer = _split(text)
    answers = () if answer is None else (answer,)
    return Record(row.place, prompt, answers, _roles(text), known, row.values, _tools(text))


def _split(text: Text) -> tuple[str, str | None]:
    """What stands before the last answer, and that answer; None if the last turn is none."""
    if isinstance(text, Completion):
        return text.prompt, text.completion
    *before, last = text.messages
    if last.role != "assistant":
        return _join([*before, last]), None
    return _join(before), _turn_text(last)


def _said(text: Text) -> str:
    return text.prompt if isinstance(text, Completion) else _join(text.messages)


def _join(messages: Sequence[Message]) -> str:
    return "\n".join(filter(None, map(_turn_text, messages)))


def _turn_text(turn: Message) -> str:
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in turn.tool_calls]
    return "\n".join(filter(None, [turn.content, *calls]))


def _tools(text: Text) -> str:
    tools = () if isinstance(text, Completion) else text.tools
    return json.dumps(tools, ensure_ascii=False, sort_keys=True) if tools else ""


def _roles(text: Text) -> tuple[str, ...]:
    return () if isinstance(text, Completion) else tuple(m.role for m in text.messages)
