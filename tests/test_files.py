"""Under a name stands what was there before or all of what is new, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

import alignkit
from alignkit import files
from alignkit.files import list_folder, replace_file, replace_folder, write_text

Replace = Callable[[Path], AbstractContextManager[Path]]

KINDS: dict[str, Replace] = {"file": replace_file, "folder": replace_folder}


@pytest.fixture(params=KINDS)
def replace(request: pytest.FixtureRequest) -> Replace:
    return KINDS[request.param]


def fill(written: Path, mark: str) -> None:
    if written.is_dir():
        (written / "one").write_text(mark, encoding="utf-8")
        (written / "inner").mkdir()
        (written / "inner" / "two").write_text(mark, encoding="utf-8")
    else:
        written.write_text(mark, encoding="utf-8")


def marks(path: Path) -> set[str]:
    """What a file or the files of a folder say; a whole folder has two."""
    parts = [part for part in (path, *path.rglob("*")) if part.is_file()]
    assert len(parts) == (2 if path.is_dir() else 1)
    return {part.read_text(encoding="utf-8") for part in parts}


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_it_takes_the_name_at_the_end(replace: Replace, tmp_path: Path) -> None:
    path = tmp_path / "made" / "x.txt"
    for mark in ("old", "new"):
        with replace(path) as written:
            assert (written.name, written.parent.parent) == (path.name, path.parent)
            fill(written, mark)
            assert path.exists() is (mark == "new")
        assert marks(path) == {mark}
        assert names(path.parent) == ["x.txt"]


def test_an_error_leaves_what_was_there(replace: Replace, tmp_path: Path) -> None:
    path = tmp_path / "x"
    for there in (False, True):
        with contextlib.suppress(KeyboardInterrupt), replace(path) as written:
            fill(written, "new")
            raise KeyboardInterrupt
        assert names(tmp_path) == ["x"] * there
        with replace(path) as written:
            fill(written, "old")
    assert marks(path) == {"old"}


def test_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_text(path, "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_text(path, "new" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (marks(path), names(tmp_path)) == ({"old"}, ["x"])


KILLED = """
import os, signal, sys
from pathlib import Path
import alignkit.files as files
path, kind, moment = Path(sys.argv[1]), sys.argv[2], 0
def trace(frame, event, argument):
    global left
    if frame.f_code.co_filename == files.__file__:
        left -= event == "line"
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace
while True:  # dies before each line that a writer comes to, then writes to the end
    moment += 1
    assert moment < 500
    child = os.fork()
    if child == 0:
        left = moment
        sys.settrace(trace)
        with getattr(files, f"replace_{kind}")(path) as written:
            if kind == "folder":
                (written / "one").write_text(str(moment))
                (written / "two").write_text(str(moment))
            else:
                written.write_text(str(moment))
        os._exit(0)
    killed = os.waitpid(child, 0)[1] != 0
    parts = sorted(path.iterdir()) if kind == "folder" else [path]
    print(killed, *{part.read_text() for part in parts}, len(parts))
    if not killed:
        print([part.name for part in path.parent.iterdir()])
        break
"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_at_any_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    with KINDS[kind](path) as written:
        fill(written, "0")
        if kind == "folder":
            (written / "inner" / "two").rename(written / "two")
            (written / "inner").rmdir()
    command = [sys.executable, "-c", KILLED, str(path), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *lines, last = done.stdout.splitlines()
    assert len(lines) > 20
    size, standing = ("2" if kind == "folder" else "1"), "0"
    for moment, line in enumerate(lines, 1):
        killed, mark, count = line.split()
        assert killed == str(moment < len(lines))
        assert mark in (standing, str(moment))  # never half, never nothing
        assert count == size
        standing = mark
    assert standing == str(len(lines))
    assert last == "['x']"  # what the killed ones left is gone


def test_all_is_on_the_disk_before_the_name_changes(
    replace: Replace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, rename = os.fsync, os.replace

    def note_sync(handle: int) -> None:
        done.append(Path(f"/proc/self/fd/{handle}").resolve().name)
        sync(handle)

    def note_rename(old: Path, new: Path) -> None:
        done.append(f"-> {new.name}")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_rename)
    (tmp_path / "home").mkdir()
    with replace(tmp_path / "home" / "x") as written:
        fill(written, "new")
    inside = {"one", "inner", "two"} if replace is replace_folder else set()
    assert set(done[:-2]) == {"x", *inside}
    assert done[-2:] == ["-> x", "home"]


WRITERS = """
import sys
from pathlib import Path
import alignkit.files as files
for number in range(60):
    with getattr(files, f"replace_{sys.argv[2]}")(Path(sys.argv[1])) as written:
        for part in [written / "a", written / "b"] if written.is_dir() else [written]:
            part.write_text(f"{sys.argv[3]} {number}")
"""


@pytest.mark.parametrize("kind", KINDS)
def test_parallel_writers(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    command = [sys.executable, "-c", WRITERS, str(path), kind]
    writers = [
        subprocess.Popen([*command, str(number)], stderr=subprocess.PIPE) for number in "123"
    ]
    there = False
    while any(writer.poll() is None for writer in writers):
        assert path.exists() or not there  # never gone again
        there = path.exists()
        if there and kind == "file":
            assert path.read_text(encoding="utf-8")[0] in "123"
    assert [writer.communicate()[1] for writer in writers] == [b"", b"", b""]
    parts = path.iterdir() if kind == "folder" else [path]
    assert {part.read_text(encoding="utf-8")[1:] for part in parts} == {" 59"}
    assert names(tmp_path) == ["x"]


def test_a_living_writer_keeps_its_place(replace: Replace, tmp_path: Path) -> None:
    path = tmp_path / "x"
    with replace(path) as slow:
        fill(slow, "slow")
        with replace(path) as quick:
            fill(quick, "quick")
        assert marks(path) == {"quick"}
    assert marks(path) == {"slow"}
    assert names(tmp_path) == ["x"]


def left_behind(folder: Path) -> Iterator[Path]:
    for name in (".writing-x-k1ll3d", ".writing-y-k1ll3d"):
        (folder / name).mkdir()
        (folder / name / "half").write_text("ha", encoding="utf-8")
        yield folder / name


def test_what_killed_writers_left(tmp_path: Path) -> None:
    own, other = left_behind(tmp_path)
    (tmp_path / "y").write_text("y", encoding="utf-8")
    assert list_folder(tmp_path) == [tmp_path / "y"]
    write_text(tmp_path / "x", "new")
    assert not own.exists()
    assert (other / "half").is_file()  # of another name


def test_nothing_is_removed_where_folders_have_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    own, _ = left_behind(tmp_path)
    write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text(encoding="utf-8") == "new"
    assert (own / "half").is_file()


def test_where_names_cannot_be_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    monkeypatch.setattr(files, "_exchange", lambda one, two: False)
    for mark in ("old", "new"):
        with replace_folder(path) as written:
            fill(written, mark)
    assert (marks(path), names(tmp_path)) == ({"new"}, ["x"])
    rename = os.rename

    def refuse(old: Path, new: Path) -> None:
        if old.name == "x" and new == path:
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(old, new)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="No space"), replace_folder(path) as written:
        fill(written, "newer")
    assert (marks(path), names(tmp_path)) == ({"new"}, ["x"])  # put back


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_a_folders_files_have_the_permissions_of_new_files(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with replace_folder(tmp_path / "x") as written:
            fill(written, "new")
            (written / "one").chmod(0o600)
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "x", *tmp_path.rglob("x/**/*"))}
    plain, folder = 0o666 & ~umask, 0o777 & ~umask
    assert modes == {"x": folder, "inner": folder, "one": plain, "two": plain}


def test_nothing_of_another_kind_is_replaced(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "mine")
    with replace_folder(tmp_path / "folder") as written:
        fill(written, "mine")
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path / "folder", "new")
    with pytest.raises(NotADirectoryError), replace_folder(tmp_path / "file") as written:
        fill(written, "new")
    assert marks(tmp_path / "file") == marks(tmp_path / "folder") == {"mine"}


def test_no_other_module_renames() -> None:
    package = Path(alignkit.__file__).parent
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for call in ("os.replace(", "os.rename(", ".rename(", "shutil.move(")
        if call in path.read_text(encoding="utf-8")
    }
    assert found == {"files.py"}
