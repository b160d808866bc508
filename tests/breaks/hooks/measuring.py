"""Coverage of one process of a recorded suite, and of what it forks, by the test that runs.

The pytest process writes the running test's name into a file, which the others read as they start.
"""

from __future__ import annotations

import atexit
import os
import secrets
from pathlib import Path
from typing import NoReturn

import coverage

RECORD = Path(os.environ["BREAKS_RECORD"])
PACKAGE = os.environ["BREAKS_PACKAGE"]

_measured: coverage.Coverage | None = None
_exit = os._exit


def start() -> None:
    """Measure from here on, under the context of the running test."""
    global _measured
    if _measured is not None:  # forked: what the parent has measured is the parent's
        _measured.stop()
    place = RECORD / f"lines.{os.getpid()}.{secrets.token_hex(4)}"
    _measured = coverage.Coverage(data_file=str(place), include=[f"{PACKAGE}/*"], config_file=False)
    _measured.set_option("run:disable_warnings", ["no-data-collected"])  # tests read stderr
    _measured.start()
    _measured.switch_context(running())


def switch(context: str) -> None:
    """Switch to another test, or to a fixture that several share."""
    Path(os.environ["BREAKS_RUNNING"]).write_text(context, encoding="utf-8")
    assert _measured is not None
    _measured.switch_context(context)


def running() -> str:
    """The context; empty before the first test."""
    place = os.environ.get("BREAKS_RUNNING", "")
    return Path(place).read_text(encoding="utf-8") if place else ""


def save() -> None:
    """Write down what was measured; once."""
    global _measured
    if _measured is not None:
        _measured.stop()
        _measured.save()
        _measured = None


def _save_and_exit(code: int) -> NoReturn:
    save()
    _exit(code)


os._exit = _save_and_exit  # a forked process ends with it, and runs nothing that atexit keeps
os.register_at_fork(after_in_child=start)
atexit.register(save)
