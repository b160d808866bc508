"""Answers that are mathematical expressions, compared as such, in a process of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from alignkit.errors import RewardError
from alignkit.generation.rewards.responses import Response
from alignkit.generation.rewards.rules import row_column
from alignkit.recipe.rules import MathReward
from alignkit.runtime.worker import Worker, WorkerLost

try:
    import math_verify
except ImportError:  # an extra: only this rule needs it
    math_verify = None

_WORKER = Worker()


def math_score(spec: MathReward) -> Callable[[Sequence[Response]], list[float]]:
    """1 for each response whose last expression equals the row's answer, else 0.

    Args:
        spec: the column of the answer, and the seconds for one response.

    Returns:
        A function from responses to numbers. It raises RewardError where the column holds no
        expression.

    Raises:
        RewardError: the package is not installed.
    """
    if math_verify is None:
        raise RewardError(
            "the reward rule `math` needs the package math-verify, which is not installed",
            hint="pip install 'alignkit[math]'",
        )

    def run(responses: Sequence[Response]) -> list[float]:
        pairs = [(str(_answer(response, spec)), response.text) for response in responses]
        found = _verify(pairs, spec.timeout)
        for response, value in zip(responses, found, strict=True):
            if value is None:
                raise RewardError(
                    f"{response.place}: the reward rule `math` finds no expression in "
                    f"{spec.column!r}",
                    hint="name another column with reward.column, or remove the row",
                )
        return [float(value) for value in found]

    return run


def _verify(pairs: list[tuple[str, str]], seconds: float) -> list[Any]:
    """What `verify_here` finds; one whose process ends is wrong, and the others are asked again."""
    timeout = 10.0 + len(pairs) * (2 * seconds + 1.0)
    try:
        here = f"{__name__}:{verify_here.__name__}"
        found: list[Any] = _WORKER.call(here, pairs, seconds, timeout=timeout, fault=RewardError)
        return found
    except WorkerLost:
        if len(pairs) == 1:
            return [0.0]
        half = len(pairs) // 2
        return [*_verify(pairs[:half], seconds), *_verify(pairs[half:], seconds)]


def _answer(response: Response, spec: MathReward) -> Any:
    value = row_column(response, spec.column, spec.rule)
    return str(value).rpartition("####")[2]


def verify_here(pairs: Sequence[tuple[str, str]], seconds: float) -> list[float | None]:
    """Whether each text's last expression is the expected one, in this process.

    Args:
        pairs: what is expected, and the text.
        seconds: for each of the steps of one pair.

    Returns:
        1 or 0; None where nothing can be expected, because there is no expression.
    """
    limit = max(1, round(seconds))  # whole seconds: it is an alarm clock
    golds: dict[str, Any] = {}
    found: list[float | None] = []
    for expected, text in pairs:
        if expected not in golds:
            golds[expected] = _parse(f"${expected}$", limit) or _parse(expected, limit)
        if not golds[expected]:
            found.append(None)
            continue
        try:
            given = _parse(text, limit)
            right = bool(given) and math_verify.verify(
                golds[expected], given, timeout_seconds=limit, raise_on_error=False
            )
        except Exception:  # whatever an expression of a model makes of sympy
            right = False
        found.append(float(right))
    return found


def _parse(text: str, seconds: int) -> list[Any]:
    found: list[Any] = math_verify.parse(text, parsing_timeout=seconds, raise_on_error=False)
    return found
