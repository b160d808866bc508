"""Rows on disk: one is in memory when it is asked for, however many there are."""

from __future__ import annotations

import pickle
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from alignkit.curation.records import Record, Unread, too_deep
from alignkit.errors import DataError

T = TypeVar("T")

Track = Callable[[Iterable[Any], str, int | None], Iterator[Any]]
"""Items, what happens to them, and how many there are if that is known -> the same items."""


def untracked(items: Iterable[T], what: str, total: int | None) -> Iterator[T]:
    """The items; nobody is told how many are done.

    Args:
        items: any.
        what: happens to them.
        total: how many there are.
    """
    return iter(items)


class Corpus:
    """Rows in the order in which they were added, in a file that goes with the object."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._begins = array("q")
        self._end = 0

    def append(self, row: Record | Unread) -> int:
        """Add a row.

        Args:
            row: as it was read.

        Returns:
            Its number.

        Raises:
            DataError: the disk is full, or the row nests too deeply.
        """
        try:
            packed = pickle.dumps(row, pickle.HIGHEST_PROTOCOL)
        except RecursionError:
            raise too_deep(row.place) from None
        try:
            if self._file.tell() != self._end:
                self._file.seek(self._end)
            self._file.write(packed)
        except OSError as error:
            raise no_room(error) from None
        self._begins.append(self._end)
        self._end += len(packed)
        return len(self._begins) - 1

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, number: int) -> Record | Unread:
        self._file.seek(self._begins[number])
        row: Record | Unread = pickle.load(self._file)
        return row

    def __iter__(self) -> Iterator[Record | Unread]:
        return (self[number] for number in range(len(self)))

    def record(self, number: int) -> Record:
        """A row that was read.

        Args:
            number: of the row.
        """
        row = self[number]
        assert isinstance(row, Record)
        return row


def no_room(error: OSError) -> DataError:
    """A folder for temporary files that takes no more.

    Args:
        error: what the system said.
    """
    return DataError(
        f"{tempfile.gettempdir()}: rows cannot be kept there: {error.strerror}",
        hint="free some space, or name another folder in the variable TMPDIR",
    )


class Texts:
    """The texts of some rows.

    Args:
        corpus: holds them.
        numbers: of the rows, which were all read.
    """

    def __init__(self, corpus: Corpus, numbers: Sequence[int]) -> None:
        self._corpus, self._numbers = corpus, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number: int) -> str:
        return self._corpus.record(self._numbers[number]).text
