"""Programs that must pass the tests of their row."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psutil

from alignkit.errors import RewardError
from alignkit.generation.rewards.responses import Response
from alignkit.generation.rewards.rules import row_column
from alignkit.recipe.rules import CodeReward
from alignkit.runtime.confined import NotConfined, passes

_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*$", re.MULTILINE)
_PYTHON = ("", "py", "python", "python3")


def code_score(spec: CodeReward) -> Callable[[Sequence[Response]], list[float]]:
    """1 for each response whose program passes the tests of its row, else 0.

    Args:
        spec: the column of the tests, and what a program may take.

    Returns:
        A function from responses to numbers. It raises RewardError where a row holds no tests, and
        where the system cannot confine a program, or start one.
    """
    run = partial(
        passes, seconds=spec.timeout, memory=spec.memory, confined=spec.confined, weigh=weigh
    )

    def one(response: Response) -> float:
        return float(run(program_of(response.text), _tests(response, spec)))

    def score(responses: Sequence[Response]) -> list[float]:
        with ThreadPoolExecutor(_at_once()) as pool:
            try:
                return list(pool.map(one, responses))
            except NotConfined:
                raise RewardError(
                    "the reward rule `code` cannot confine programs here: the system gives this "
                    "user no namespaces",
                    hint="allow them (sysctl kernel.unprivileged_userns_clone=1, or docker run "
                    "--security-opt seccomp=unconfined); in a machine that may be lost, "
                    "reward.confined: false",
                ) from None
            except OSError as error:
                raise RewardError(
                    f"the reward rule `code` cannot start a process: {error.strerror}",
                    hint="free memory, or raise the limits of open files and processes",
                ) from None

    return score


def _at_once() -> int:
    """Processors of this process; macOS does not say which they are."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def weigh(process: int) -> tuple[int, int]:
    """Bytes that a process and its descendants hold, and how many they are.

    Args:
        process: its number.
    """
    held = count = 0
    with contextlib.suppress(psutil.Error):  # it has just ended
        own = psutil.Process(process)
        for member in (own, *own.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                held, count = held + member.memory_info().rss, count + 1
    return held, count


def program_of(text: str) -> str:
    """The last Python block of a response; all of it if there is none.

    Args:
        text: of the response.
    """
    found, opened = "", None
    for fence in _FENCE.finditer(text):
        if opened is None:
            opened = fence
            continue
        if opened[1].lower() in _PYTHON:
            found = text[opened.end() + 1 : fence.start()]
        opened = None
    return found or text


def _tests(response: Response, spec: CodeReward) -> list[str]:
    value = row_column(response, spec.column, spec.rule, lists=True)
    tests = value if isinstance(value, list) else [value]
    if not all(isinstance(test, str) and test.strip() for test in tests) or not tests:
        raise RewardError(
            f"{response.place}: the reward rule `code` finds no tests in {spec.column!r}",
            hint='write Python statements, or a list of them, as in ["assert f(2) == 4"]',
        )
    return tests
