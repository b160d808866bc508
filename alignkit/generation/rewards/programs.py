"""Programs that must pass the tests of their row."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from alignkit.errors import RewardError
from alignkit.generation.rewards.responses import Response
from alignkit.generation.rewards.rules import row_column
from alignkit.recipe.rules import CodeReward
from alignkit.runtime.confined import NotConfined, passes

_BLOCK = re.compile(r"```(?:python|py|python3)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)


def code_score(spec: CodeReward) -> Callable[[Sequence[Response]], list[float]]:
    """1 for each response whose program passes the tests of its row, else 0.

    Args:
        spec: the column of the tests, and what a program may take.

    Returns:
        A function from responses to numbers. It raises RewardError where a row holds no tests, and
        where the system cannot confine a program.
    """
    run = partial(passes, seconds=spec.timeout, memory=spec.memory, confined=spec.confined)

    def one(response: Response) -> float:
        return float(run(program_of(response.text), _tests(response, spec)))

    def score(responses: Sequence[Response]) -> list[float]:
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
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

    return score


def program_of(text: str) -> str:
    """The last Python block of a response; all of it if there is none.

    Args:
        text: of the response.
    """
    blocks = _BLOCK.findall(text)
    return str(blocks[-1]) if blocks else text


def _tests(response: Response, spec: CodeReward) -> list[str]:
    value = row_column(response, spec.column, spec.rule, lists=True)
    return value if isinstance(value, list) else [str(value)]
