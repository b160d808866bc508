"""Programs that nobody has read: run in a process of their own that can harm nothing.

On Linux the process has namespaces of its own and no rights: no network, every file read-only but
an empty /tmp, an empty /run, no other process in sight, no environment. Its time, memory, files
and processes are bounded. It can read what its user can read, and a program that looks for it can
pretend to have passed. This file runs there as a script and imports the standard library alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import resource
import secrets
import signal
import subprocess
import sys
from typing import Any

UNCONFINED = 77
"""Exit code of a process that the system gave no namespaces."""

_NEW = 0x00020000 | 0x10000000 | 0x20000000 | 0x40000000
"""CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID and CLONE_NEWNET of unshare(2)."""

_MOUNT_SETATTR, _HERE, _RECURSIVE, _READ_ONLY, _PRIVATE = 442, -100, 0x8000, 1, 1 << 18
_STRICT = 2 | 4 | 8
"""MS_NOSUID, MS_NODEV and MS_NOEXEC of mount(2)."""
_END_WITH_PARENT, _NO_NEW_RIGHTS, _CAPABILITIES = 1, 38, 0x20080522
_USER = 1000
"""Number of the user inside; not 0, which would get rights back with each program it starts."""


class NotConfined(Exception):
    """The system does not let this user make namespaces."""


def passes(
    program: str, tests: list[str], *, seconds: float, memory: float, confined: bool
) -> bool:
    """Whether a program and then all its tests run to their end.

    Args:
        program: Python.
        tests: Python statements, run one after another with the program's names.
        seconds: for all of it.
        memory: GB for all of it.
        confined: with namespaces; without them only time and memory are bounded.

    Raises:
        NotConfined: there are no namespaces to be had.
    """
    word = secrets.token_hex(16)
    task = {
        "program": program,
        "tests": tests,
        "seconds": seconds,
        "memory": memory,
        "confined": confined,
        "word": word,
    }
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as answer:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", __file__, str(writing)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[writing],
                start_new_session=True,
                env={},
                cwd="/",
            )
        finally:
            os.close(writing)
        with process:
            try:
                process.communicate(json.dumps(task).encode(), timeout=seconds + 1.0)
            except subprocess.TimeoutExpired:
                return False
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
        if process.returncode == UNCONFINED:
            raise NotConfined
        # what the program wrote there itself does not know the word
        os.set_blocking(answer.fileno(), False)
        return process.returncode == 0 and answer.read(len(word)) == word.encode()


def _confine() -> None:
    """Leave everything behind; only a child of this process is out of sight of the others."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if not hasattr(libc, "unshare") or libc.unshare(_NEW) != 0:
        os._exit(UNCONFINED)
    maps = {"setgroups": "deny", "uid_map": f"{_USER} {user} 1", "gid_map": f"{_USER} {group} 1"}
    for name, text in maps.items():
        with contextlib.suppress(OSError), open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY, 0, _PRIVATE, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    if libc.syscall(_MOUNT_SETATTR, _HERE, b"/", _RECURSIVE, attributes, size) != 0:
        os._exit(UNCONFINED)
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    libc.prctl(_END_WITH_PARENT, signal.SIGKILL)
    own = libc.mount(b"proc", b"/proc", b"proc", _STRICT, None) == 0
    hidden = [b"/tmp", b"/run", *([] if own else [b"/proc"])]  # sockets of services are in /run
    for place in hidden:
        if os.path.isdir(place) and libc.mount(b"tmpfs", place, b"tmpfs", _STRICT, b"size=16m"):
            os._exit(UNCONFINED)
    os.chdir("/tmp")
    # With the rights of its namespace it could make everything writable again.
    header, none = (ctypes.c_uint32 * 2)(_CAPABILITIES, 0), (ctypes.c_uint32 * 6)()
    if libc.prctl(_NO_NEW_RIGHTS, 1, 0, 0, 0) or libc.capset(header, none):
        os._exit(UNCONFINED)


def _limit(seconds: float, memory: float) -> None:
    room = int(memory * 1e9)
    limits = {
        resource.RLIMIT_AS: room,
        resource.RLIMIT_CPU: math.ceil(seconds) + 1,
        resource.RLIMIT_FSIZE: 1 << 24,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: 64,
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        with contextlib.suppress(ValueError, OSError):  # lower already
            resource.setrlimit(kind, (limit, limit))


def _serve(writing: int) -> None:
    task = json.loads(sys.stdin.buffer.read())
    word = task.pop("word")
    if task["confined"]:
        _confine()
    _limit(task["seconds"], task["memory"])
    names: dict[str, Any] = {"__name__": "program"}
    try:
        for source in (task["program"], *task["tests"]):
            exec(compile(source, "<program>", "exec"), names)
    except BaseException:
        os._exit(1)
    os.write(writing, word.encode())
    os._exit(0)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
