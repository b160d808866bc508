"""Atomic writes: files and folders are written next to their name, synced to disk, then renamed.

At every moment, even after a kill or a power cut, a name holds either all of the old content or all
of the new. Each writer works in a hidden folder of its own, so that several do not collide; the
next writer of the same name removes what a killed one left behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_MARK = ".writing-"
_HERE, _EXCHANGE = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE of renameat2(2)."""


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A file to write, which gets the name `path` if the block succeeds and is removed if it fails.

    Args:
        path: replaced if it exists; its folder is created.

    Raises:
        OSError: writing failed; the old file is unchanged.
    """
    with _beside(path) as written:
        yield written
        _sync(written)
        os.replace(written, path)
        _sync(path.parent)


@contextlib.contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which gets the name `path` if the block succeeds; see
    `replace_file`.

    Args:
        path: replaced as a whole if it exists. Its files get the permissions of any new file,
            because safetensors makes its own readable only by their owner.
    """
    with _beside(path) as written:
        written.mkdir()
        yield written
        for part in written.rglob("*"):
            if part.is_file():
                part.chmod(written.stat().st_mode & 0o666)
            _sync(part)
        _sync(written)
        _take_name(written, path)
        _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a file's text, as `replace_file` does."""
    with replace_file(path) as written:
        written.write_text(text, encoding="utf-8")


def list_folder(folder: Path) -> list[Path]:
    """The entries of a folder, without what killed writers left behind."""
    return [path for path in folder.iterdir() if not path.name.startswith(_MARK)]


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """The same name in a hidden folder next to `path`, which no other writer uses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{_MARK}{path.name}-"
    for leftover in path.parent.iterdir():
        if leftover.name.startswith(prefix):
            with contextlib.suppress(OSError), _opened(leftover) as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its writer runs
                shutil.rmtree(leftover)
    with contextlib.ExitStack() as stack:
        own = _own_folder(stack, path.parent, prefix)
        stack.callback(shutil.rmtree, own, ignore_errors=True)
        yield own / path.name


def _own_folder(stack: contextlib.ExitStack, parent: Path, prefix: str) -> Path:
    """A new folder, locked until the stack closes."""
    while True:
        own = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with contextlib.suppress(OSError):
            fcntl.flock(stack.enter_context(_opened(own)), fcntl.LOCK_EX)
        if own.exists():  # another writer may have removed it before it was locked
            return own


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def _take_name(written: Path, path: Path) -> None:
    """Rename a folder, replacing an existing one."""
    try:
        os.replace(written, path)  # over nothing, or an empty folder
    except OSError:
        if not path.is_dir():
            raise
        if _exchange(written, path):
            return
        old = written.with_name(".replaced")
        os.rename(path, old)
        try:
            os.rename(written, path)
        except OSError:
            os.rename(old, path)
            raise


def _exchange(one: Path, two: Path) -> bool:
    """Swap two names atomically; False if the system or the file system cannot."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    names = (os.fsencode(one), os.fsencode(two))
    return swap is not None and swap(_HERE, names[0], _HERE, names[1], _EXCHANGE) == 0


def _sync(path: Path) -> None:
    with _opened(path) as handle:
        os.fsync(handle)
