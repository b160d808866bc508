"""Programs that nobody has read: run in a process of their own that can harm nothing.

On Linux the process has namespaces of its own and no rights: no network and no sockets, every file
read-only but an empty /tmp, an empty /run, a /dev of three files, no other process in sight, no
environment. Its time, memory and processes are bounded, and all of them end with it. It can read
what its user can read, and a program that looks for it can pretend to have passed.

This file runs there as a script and imports the standard library alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import math
import os
import platform
import resource
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

READY = b"+"
"""What a process says once it is confined, before the program begins."""

_NEW = 0x00020000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
"""CLONE_NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET of unshare(2)."""

_MOUNT_SETATTR, _HERE, _RECURSIVE, _READ_ONLY, _PRIVATE = 442, -100, 0x8000, 1, 1 << 18
_STRICT, _BIND = 2 | 4 | 8, 4096 | 16384
"""MS_NOSUID, MS_NODEV and MS_NOEXEC of mount(2); MS_BIND and MS_REC."""
_END_WITH_PARENT, _FILTER, _REAP, _NO_NEW_RIGHTS = 1, 22, 36, 38
"""Options of prctl(2)."""
_CAPABILITIES = 0x20080522
_USER = 1000
"""Number of the user inside; not 0, which would get rights back with each program it starts."""

_SYSTEMS = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
"""Machine -> its number in a system call's record, and that of socket(2)."""
_IO_URING, _OTHER_ABI = 425, 0x40000000

PROCESSES, LOOK = 64, 0.05
"""Processes that a program may have, and seconds between two looks at them."""


class NotConfined(Exception):
    """The system does not let this user make namespaces."""


Weigh = Callable[[int], tuple[int, int]]
"""Process -> bytes that it and its descendants hold, and how many they are."""


def passes(
    program: str,
    tests: list[str],
    *,
    seconds: float,
    memory: float,
    confined: bool,
    weigh: Weigh,
) -> bool:
    """Whether a program and then all its tests run to their end.

    Args:
        program: Python.
        tests: Python statements, run one after another with the program's names.
        seconds: for all of it.
        memory: GB for all of it.
        confined: with namespaces; without them only time, memory and processes are bounded.
        weigh: what a family of processes takes.

    Raises:
        NotConfined: there are no namespaces to be had.
        OSError: no process can be started.
    """
    word = secrets.token_hex(16)
    task = {"program": program, "tests": tests, "seconds": seconds, "memory": memory}
    sent = json.dumps({**task, "confined": confined, "word": word}).encode()
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
            ended = _watched(process, sent, seconds, memory, weigh)
        os.set_blocking(answer.fileno(), False)
        said = answer.read(len(READY) + len(word)) or b""
    if ended and not said.startswith(READY):
        raise NotConfined
    return said == READY + word.encode()


def _watched(
    process: subprocess.Popen[bytes], sent: bytes, seconds: float, memory: float, weigh: Weigh
) -> bool:
    """Whether the process came to its end by itself within its bounds."""
    deadline, given = time.monotonic() + seconds + 1.0, sent
    try:
        while time.monotonic() < deadline:
            try:
                process.communicate(given, timeout=LOOK)
                return True
            except subprocess.TimeoutExpired:
                given = b""
            held, count = weigh(process.pid)
            if held > memory * 1e9 or count > PROCESSES:
                return False
        return False
    finally:
        # Of a confined one the first process of its namespace ends with it, and all others then.
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def _refuse() -> None:
    """End without having said that all is ready."""
    os._exit(1)


def _enter(libc: Any) -> None:
    """Namespaces of its own, in which nothing can be written and no further ones be made."""
    user, group = os.getuid(), os.getgid()
    if not hasattr(libc, "unshare") or libc.unshare(_NEW) != 0:
        _refuse()
    maps = {"setgroups": "deny", "uid_map": f"{_USER} {user} 1", "gid_map": f"{_USER} {group} 1"}
    for name, text in maps.items():
        with contextlib.suppress(OSError), open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    with open("/proc/sys/user/max_user_namespaces", "w") as file:
        file.write("0")
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY, 0, _PRIVATE, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    if libc.syscall(_MOUNT_SETATTR, _HERE, b"/", _RECURSIVE, attributes, size) != 0:
        _refuse()


def _hide(libc: Any) -> None:
    """An empty /tmp and /run, three devices, and the processes of this namespace alone."""

    def cover(place: bytes, size: bytes) -> None:
        if os.path.isdir(place) and libc.mount(b"tmpfs", place, b"tmpfs", _STRICT, size):
            _refuse()

    cover(b"/tmp", b"size=16m")
    os.mkdir("/tmp/dev")
    for name in (b"null", b"zero", b"urandom"):
        open(b"/tmp/dev/" + name, "w").close()
        if libc.mount(b"/dev/" + name, b"/tmp/dev/" + name, None, _BIND, None):
            _refuse()
    if libc.mount(b"/tmp/dev", b"/dev", None, _BIND, None):
        _refuse()
    cover(b"/tmp", b"size=16m")
    cover(b"/run", b"size=1m")
    if libc.mount(b"proc", b"/proc", b"proc", _STRICT, None):
        cover(b"/proc", b"size=1m")
    os.chdir("/tmp")


def _give_up_rights(libc: Any) -> None:
    """No capability, now or later, and no socket."""
    header, none = (ctypes.c_uint32 * 2)(_CAPABILITIES, 0), (ctypes.c_uint32 * 6)()
    if libc.prctl(_NO_NEW_RIGHTS, 1, 0, 0, 0) or libc.capset(header, none):
        _refuse()
    if platform.machine() not in _SYSTEMS:
        _refuse()
    system, socket = _SYSTEMS[platform.machine()]
    allow, deny = 0x7FFF0000, 0x00050000 | errno.EPERM
    load, equal, above, give = 0x20, 0x15, 0x35, 0x06
    rules = [  # code, jump if true, jump if false, operand: of seccomp(2)
        (load, 0, 0, 4),
        (equal, 0, 4, system),
        (load, 0, 0, 0),
        (equal, 2, 0, socket),
        (equal, 1, 0, _IO_URING),
        (above, 0, 1, _OTHER_ABI),
        (give, 0, 0, deny),
        (give, 0, 0, allow),
    ]
    packed = b"".join(
        code.to_bytes(2, sys.byteorder) + bytes([true, false]) + operand.to_bytes(4, sys.byteorder)
        for code, true, false, operand in rules
    )
    filters = ctypes.create_string_buffer(packed, len(packed))
    pointer = ctypes.addressof(filters)
    program = len(rules).to_bytes(8, sys.byteorder) + pointer.to_bytes(8, sys.byteorder)
    if libc.prctl(_FILTER, 2, ctypes.create_string_buffer(program, 16), 0, 0):
        _refuse()


def _wait_for(child: int) -> None:
    """Wait for the program, then end, and with the first process of a namespace all of it."""
    while True:
        try:
            if os.wait()[0] == child:
                os._exit(0)
        except InterruptedError:
            continue
        except ChildProcessError:
            os._exit(0)


def _confine() -> None:
    """Go on as a process without rights, the child of one that ends everything when it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    _enter(libc)
    first = os.fork()
    if first:
        _wait_for(first)
    libc.prctl(_END_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    _hide(libc)
    program = os.fork()
    if program:
        _wait_for(program)
    _give_up_rights(libc)


def _adopt() -> None:
    """Without namespaces: a parent that ends whatever the program leaves behind."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(_REAP, 1, 0, 0, 0)
    child = os.fork()
    if not child:
        return

    def end(*_: object) -> None:
        for _round in range(PROCESSES):
            with contextlib.suppress(OSError):
                with open(f"/proc/self/task/{os.getpid()}/children") as file:
                    left = [int(number) for number in file.read().split()]
                for number in left:
                    os.kill(number, signal.SIGKILL)
                    os.waitpid(number, 0)
                if left:
                    continue
            break
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    with contextlib.suppress(ChildProcessError):
        while os.wait()[0] != child:
            pass
    end()


def _limit(seconds: float, memory: float, confined: bool) -> None:
    limits = {
        resource.RLIMIT_AS: int(memory * 1e9),
        resource.RLIMIT_CPU: math.ceil(seconds) + 1,
        resource.RLIMIT_FSIZE: 1 << 24,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    if confined:  # elsewhere the user's other processes would count too
        limits[resource.RLIMIT_NPROC] = PROCESSES
    for kind, limit in limits.items():
        with contextlib.suppress(ValueError, OSError):  # lower already
            resource.setrlimit(kind, (limit, limit))


def _serve(writing: int) -> None:
    task = json.loads(sys.stdin.buffer.read())
    word, confined = task["word"], task["confined"]
    if confined:
        _confine()
    else:
        _adopt()
    _limit(task["seconds"], task["memory"], confined)
    os.write(writing, READY)
    names: dict[str, Any] = {"__name__": "program"}
    try:
        for source in (task["program"], *task["tests"]):
            exec(compile(source, "<program>", "exec", dont_inherit=True), names)
    except BaseException:
        os._exit(1)
    os.write(writing, word.encode())
    os._exit(0)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
