"""Commands in processes of their own that die at a chosen moment.

A moment is a delay, or a call that changes the file system: each of them is counted in the child.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commandline import CommandLine, Done

COUNT_CALLS = """
import builtins, io, os, signal
calls = os.open(_LOG_, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
number = [0]

def hit(when):
    if when == "before":
        number[0] += 1
        os.write(calls, b".")
    if number[0] == _AT_ and when == _WHEN_:
        os.kill(os.getpid(), signal.SIGKILL)

def counted(function):
    def call(*args, **kwargs):
        hit("before")
        result = function(*args, **kwargs)
        hit("after")
        return result
    return call

for name in ("replace", "rename", "fsync", "mkdir", "unlink", "remove", "rmdir"):
    setattr(os, name, counted(getattr(os, name)))

opened, kept = counted(builtins.open), builtins.open

def open_counted(file, mode="r", *args, **kwargs):
    writes = any(letter in mode for letter in "wax+")
    return (opened if writes else kept)(file, mode, *args, **kwargs)

builtins.open = io.open = open_counted
"""
"""Code for `before` of a command: it dies at its call number _AT_."""

DIE_AFTER_STEP = """
import os, signal
from alignkit.runtime.metrics import MetricsFile
write = MetricsFile.write
def write_and_die(self, step, values):
    write(self, step, values)
    if step == STEP and "loss" in values:
        os.kill(os.getpid(), signal.SIGKILL)
MetricsFile.write = write_and_die
"""

NO_END = 180.0
"""Seconds after which a command is taken to hang."""


@dataclass(frozen=True)
class Moment:
    """When a process is killed.

    Args:
        delay: seconds after its start; None where a call decides.
        call: number of the call, from 1.
        after: die after the call, not before it.
        number: the signal.
    """

    delay: float | None = None
    call: int = 0
    after: bool = False
    number: int = signal.SIGKILL

    def __str__(self) -> str:
        if self.delay is not None:
            return f"{signal.Signals(self.number).name} after {self.delay:.3f} s"
        return f"SIGKILL {'after' if self.after else 'before'} call {self.call}"


class Hung(AssertionError):
    """A command that did not end."""


def run(
    commands: CommandLine,
    arguments: tuple[str, ...],
    folder: Path,
    moment: Moment | None = None,
    before: str = "",
) -> Done:
    """Run a command to its end, or to its death.

    Args:
        commands: forks it.
        arguments: of `alignkit`.
        folder: working folder.
        moment: when it dies.
        before: Python that runs in the process first.
    """
    if moment is not None and moment.delay is None:
        before += at_call(folder.parent / "calls", moment.call, after=moment.after)
    running = commands.start(*arguments, cwd=folder, before=before)
    timers = [threading.Timer(NO_END, send, (running.pid, signal.SIGKILL))]
    if moment is not None and moment.delay is not None:
        timers.append(threading.Timer(moment.delay, send, (running.pid, moment.number)))
    for timer in timers:
        timer.start()
    done = running.wait()
    hung = not timers[0].is_alive()
    for timer in timers:
        timer.cancel()
    if hung:
        raise Hung(f"{' '.join(arguments)} had no end: {done.stderr[-500:]}")
    return done


def send(pid: int, number: int) -> None:
    """A signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def at_call(log: Path, call: int, *, after: bool) -> str:
    """Code that counts calls into the length of a file, and dies at one of them (0: at none)."""
    code = COUNT_CALLS.replace("_LOG_", repr(str(log))).replace("_AT_", str(call))
    return code.replace("_WHEN_", repr("after" if after else "before"))


def count_calls(commands: CommandLine, arguments: tuple[str, ...], folder: Path) -> tuple[int, Any]:
    """Run a command undisturbed.

    Returns:
        Calls that changed the file system, and how it ended.
    """
    log = folder.parent / "calls"
    done = run(commands, arguments, folder, before=at_call(log, 0, after=False))
    assert done.code == 0, done.stderr
    return log.stat().st_size, done
