"""A process for the user's functions, so that nothing they do but their result reaches the run.

The working folder, the gradient mode, the standard output and the life of that process are its
own. It answers in JSON: what it sends is read, never executed. It ends with the run.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import importlib
import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import psutil

from alignkit.errors import AlignkitError

_LENGTH = struct.Struct("!Q")
_LONGEST = 1 << 30
"""Bytes of an answer."""
_LOOK = 0.25
"""Seconds between two looks at a worker's memory."""
_SHARE = 0.5
"""Of the machine's memory, the most that a worker and its children may take."""
_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


class TooLarge(Exception):
    """A worker takes more memory than it may."""


class WorkerLost(Exception):
    """The worker gave no result: `str` says why, as in `was ended by SIGSEGV`."""


class Worker:
    """A process that starts at its first call, and again after one that ended it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._owner = 0

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._socket is not None and self._owner == os.getpid()

    def call(self, target: str, *arguments: Any, timeout: float, fault: type[AlignkitError]) -> Any:
        """What a function of ours, which calls the user's, returns there.

        Args:
            target: `module:function`.
            arguments: anything that pickles.
            timeout: seconds for the whole call.
            fault: raised here for any AlignkitError raised there.

        Returns:
            The result, as JSON carries it.

        Raises:
            WorkerLost: no result in time, or the process ended.
        """
        deadline = time.monotonic() + timeout
        try:
            answer = self._exchange(pickle.dumps((os.getcwd(), target, arguments)), deadline)
        except TimeoutError:
            self.close()
            raise WorkerLost(f"gave no result within {timeout:g} seconds") from None
        except TooLarge as error:
            self.close()
            raise WorkerLost(str(error)) from None
        except OSError:
            raise WorkerLost(self._ending()) from None
        except BaseException:  # interrupted: what comes next must not read this answer
            self.close()
            raise
        if "fault" in answer:
            message, hint = answer["fault"]
            raise fault(message, hint=hint)
        if "bug" in answer:
            raise RuntimeError(answer["bug"])
        return answer["result"]

    def close(self) -> None:
        """End the process at once."""
        process, channel = self._process, self._socket
        self._process = self._socket = None
        if channel is not None:
            channel.close()
        if process is not None and self._owner == os.getpid():
            _kill(process)

    def _exchange(self, message: bytes, deadline: float) -> dict[str, Any]:
        if not self.running:
            self._start()
        assert self._socket is not None
        self._socket.settimeout(_remaining(deadline))
        self._socket.sendall(_LENGTH.pack(len(message)) + message)
        (length,) = _LENGTH.unpack(_receive(self._socket, _LENGTH.size, deadline, self._watch))
        if length > _LONGEST:
            raise ConnectionError  # not from `serve`
        answer: dict[str, Any] = json.loads(_receive(self._socket, length, deadline))
        return answer

    def _watch(self) -> None:
        """End a worker that takes too much memory, before the run has none left."""
        assert self._process is not None
        with contextlib.suppress(psutil.Error):  # it has just ended
            own = psutil.Process(self._process.pid)
            family = [own, *own.children(recursive=True)]
            taken = sum(member.memory_info().rss for member in family)
            limit = int(_SHARE * psutil.virtual_memory().total)
            if taken > limit:
                raise TooLarge(f"took more than {limit / 1e9:.1f} GB, half of the machine's memory")

    def _start(self) -> None:
        own, other = socket.socketpair()
        with other:
            code = (
                f"import sys; sys.path[:] = {sys.path!r}; "
                f"from alignkit.runtime.worker import serve; serve({other.fileno()}, {os.getpid()})"
            )
            self._process = subprocess.Popen(
                # -P: the working folder is not where alignkit comes from
                [sys.executable, "-P", "-c", code],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what it prints is no data
                start_new_session=True,  # Ctrl-C is for the run
            )
        self._socket, self._owner = own, os.getpid()
        atexit.register(self.close)

    def _ending(self) -> str:
        """How the process ended."""
        process, self._process = self._process, None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if process is None:
            return "has no process"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
        code = _kill(process)
        if code >= 0:
            return f"ended its process with exit code {code}"
        names = {number.value: number.name for number in signal.Signals}
        return f"was ended by {names.get(-code, f'signal {-code}')}"


def _kill(process: subprocess.Popen[bytes]) -> int:
    """End a worker and the processes that the user's functions have started; its exit code."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # it leads a group of its own
    return process.wait()


def _remaining(deadline: float) -> float:
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError
    return remaining


def _receive(
    channel: socket.socket,
    count: int,
    deadline: float | None = None,
    watch: Callable[[], None] | None = None,
) -> bytes:
    """So many bytes.

    Args:
        channel: to read from.
        count: of bytes.
        deadline: on the monotonic clock.
        watch: called every quarter of a second while nothing comes.

    Raises:
        TimeoutError: not in time.
        ConnectionError: the other side has gone.
    """
    parts: list[bytes] = []
    while count:
        if deadline is not None:
            left = _remaining(deadline)
            channel.settimeout(left if watch is None else min(left, _LOOK))
        try:
            part = channel.recv(min(count, 1 << 20))
        except TimeoutError:
            if watch is None:
                raise
            watch()
            continue
        if not part:
            raise ConnectionError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def serve(handle: int, parent: int) -> None:
    """Answer calls until the run has gone. The other side of `Worker`.

    Args:
        handle: file descriptor of the socket.
        parent: process that asks.
    """
    _end_with(parent)
    faulthandler.enable()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    with socket.socket(fileno=handle) as channel:
        while True:
            try:
                (length,) = _LENGTH.unpack(_receive(channel, _LENGTH.size))
                folder, target, arguments = pickle.loads(_receive(channel, length))
            except ConnectionError:
                return
            os.chdir(folder)  # wherever the last call has gone
            answer = json.dumps(_answer(target, arguments)).encode()
            channel.sendall(_LENGTH.pack(len(answer)) + answer)


def _answer(target: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
    module, _, name = target.partition(":")
    try:
        return {"result": getattr(importlib.import_module(module), name)(*arguments)}
    except AlignkitError as error:
        return {"fault": [error.message, error.hint]}
    except BaseException:
        return {"bug": traceback.format_exc()}


def _end_with(parent: int) -> None:
    """Be killed when the parent is, also in the middle of a call; Linux only."""
    set_option = getattr(ctypes.CDLL(None), "prctl", None)
    if set_option is not None:
        set_option(_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit
