"""Atomic writes: files and folders are written next to their name, synced to disk, then renamed.

At every moment, even after a kill or a power cut, a name holds either all of the old content or all
of the new. Each writer works in a hidden folder of its own, so that several do not collide; the
next writer of the same name removes what a killed one left behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from alignkit.errors import FileError

LARGEST_JSON = 256 * 1024**2
"""Bytes. The largest JSON files of a model, its tokenizer's, have about 35 million."""

_MARK = ".writing-"
_HERE, _EXCHANGE = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE of renameat2(2)."""


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A file to write, which gets the name `path` if the block succeeds and is removed if it fails.

    Args:
        path: replaced if it exists; its folder is created.

    Raises:
        FileError: nothing can be written in its folder.
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


def read_json(path: Path, *, hint: str = "") -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: of the file.
        hint: what to do if it is damaged.

    Raises:
        FileError: it is missing, cannot be read, or is no JSON object of at most `LARGEST_JSON`.
    """
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"larger than {LARGEST_JSON:,} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}", hint=hint) from None
    except RecursionError:
        raise FileError(f"{path} is not readable JSON: nested too deeply", hint=hint) from None
    except ValueError as error:  # no UTF-8, no JSON, a number of thousands of digits
        raise FileError(f"{path} is not readable JSON: {error}", hint=hint) from None
    if not isinstance(values, dict):
        kind = "a list" if isinstance(values, list) else "a single value"
        raise FileError(f"{path} must hold a JSON object, not {kind}", hint=hint)
    return values


def require_folder_name(path: Path) -> None:
    """Refuse a name that neither is nor can become a folder. Writes nothing.

    Raises:
        FileError: it is a file, lies under one, leads to nothing, or cannot be used here.
    """
    if re.search("[\x00-\x1f\x7f]", str(path)):
        raise FileError(f"{str(path)!r} holds a control character", hint="choose another name")
    for here in (path, *path.parents):
        try:
            here.stat()
        except (FileNotFoundError, NotADirectoryError) as error:
            if here.is_symlink():
                hint = "remove the link, or choose another folder"
                raise FileError(f"{here} is a link to nothing", hint=hint) from error
            continue
        except (OSError, ValueError) as error:  # too long, a loop of links, a NUL
            raise _not_written(path, error) from None
        if not here.is_dir():
            rest = "" if here == path else f", so {path} cannot be a folder"
            raise FileError(f"{here} is a file{rest}", hint="choose another folder")
        return


def output_path(path: Path) -> Path:
    """The path of a file or folder to write, with `~` expanded. Writes nothing.

    Raises:
        FileError: nothing can be written under this name.
    """
    path = Path(os.path.expanduser(path))
    require_folder_name(path.parent)
    try:
        linked = path.is_symlink()
        if linked and not path.exists():
            raise FileError(f"{path} is a link to nothing", hint="remove the link")
    except (OSError, ValueError) as error:
        raise _not_written(path, error) from None
    return path


def make_folder(path: Path) -> None:
    """Create a folder and its parents, if they are not there.

    Raises:
        FileError: it cannot be created.
    """
    require_folder_name(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_written(path, error) from None


def take_lock(path: Path) -> IO[str] | None:
    """The open file of a lock that this process owns until it is closed; None if another does.

    Raises:
        FileError: the file cannot be opened.
    """
    try:
        lock = path.open("a+")
    except OSError as error:
        raise _not_written(path, error) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its last owner may have removed the file since: another process may lock a new one.
        if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    lock.close()
    return None


def _not_written(path: Path, error: Exception) -> FileError:
    reason = getattr(error, "strerror", None) or str(error)
    hint = "name another place, or free disk space"
    return FileError(f"{path} cannot be written: {reason}", hint=hint)


def remove(path: Path) -> None:
    """Remove a file, a folder with all it holds, or a link, which is not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def list_folder(folder: Path) -> list[Path]:
    """The entries of a folder, without what killed writers left behind."""
    return [path for path in folder.iterdir() if not path.name.startswith(_MARK)]


def sweep(folder: Path, prefix: str = _MARK) -> None:
    """Remove what killed writers left in a folder.

    Args:
        folder: may be missing.
        prefix: of the hidden folders to remove; all of them by default.
    """
    for leftover in folder.iterdir() if folder.is_dir() else ():
        if leftover.name.startswith(prefix):
            with contextlib.suppress(OSError), _opened(leftover) as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its writer runs
                shutil.rmtree(leftover)


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """The same name in a hidden folder next to `path`, which no other writer uses."""
    make_folder(path.parent)
    prefix = f"{_MARK}{path.name}-"
    sweep(path.parent, prefix)
    with contextlib.ExitStack() as stack:
        own = _own_folder(stack, path.parent, prefix)
        stack.callback(shutil.rmtree, own, ignore_errors=True)
        yield own / path.name


def _own_folder(stack: contextlib.ExitStack, parent: Path, prefix: str) -> Path:
    """A new folder, locked until the stack closes."""
    while True:
        try:
            own = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        except OSError as error:  # a name too long with its prefix, a folder that is read-only
            raise _not_written(parent / prefix.removeprefix(_MARK)[:-1], error) from None
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
