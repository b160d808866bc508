"""Calls that fail: which responses they fail for, and what becomes of these."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from alignkit.errors import RewardError
from alignkit.generation.rewards.responses import Failure, Response, Score, Scores, joined
from alignkit.recipe.rewards import OnFailure

LONGEST = 4.0
"""Timeouts that the search may take together; responses that are left then count as failed."""

SHORTEST = 5.0
"""Seconds that a call with fewer responses may take at least, if the whole may."""

Call = Callable[[Sequence[Response], float], Scores]
"""Responses, and the seconds that the call may take -> their scores."""


class Unanswered(RewardError):
    """A function took too long, or ended its process: it cannot say for which response."""


def tolerant(call: Call, *, timeout: float, on_failure: OnFailure) -> Score:
    """A score whose failures cost the run, or only the responses that a call fails for.

    A call that fails is repeated with each half of its responses, down to single ones, in
    proportionally less time. With `stop` that is only to name the row, where nothing else can.

    Args:
        call: scores some responses.
        timeout: seconds for all of them.
        on_failure: as in the recipe.

    Returns:
        A score; it raises RewardError with `stop`. The others never do: whether nothing at all can
        be scored is for those to say who see all responses of a step.
    """

    def run(responses: Sequence[Response]) -> Scores:
        if not responses:
            return Scores([])
        longest = LONGEST * max(timeout, SHORTEST)  # a process that starts again takes time too
        deadline = time.monotonic() + longest
        return _Search(call, longest, on_failure, deadline).scores(responses, timeout)

    return run


@dataclass
class _Search:
    call: Call
    longest: float
    on_failure: OnFailure
    deadline: float

    def scores(self, responses: Sequence[Response], seconds: float) -> Scores:
        try:
            return self.call(responses, seconds)
        except RewardError as error:
            failed = error
        if self.on_failure == "stop" and not isinstance(failed, Unanswered):
            raise failed
        if len(responses) == 1 and self.on_failure == "stop":
            raise RewardError(
                f"{failed.message}; the response is to {responses[0].place}", hint=failed.hint
            )
        if len(responses) == 1:
            return self._given_up(responses, failed.message)
        if time.monotonic() > self.deadline:
            late = f"not asked alone: the search took {self.longest:g} seconds"
            if self.on_failure == "stop":
                raise failed
            return self._given_up(responses, f"{failed.message}; {late}")
        half = len(responses) // 2
        shorter = min(seconds, max(seconds / 2, SHORTEST))
        parts = [self.scores(part, shorter) for part in (responses[:half], responses[half:])]
        if self.on_failure == "stop":  # it fails for none of them alone
            raise failed
        return joined(parts)

    def _given_up(self, responses: Sequence[Response], reason: str) -> Scores:
        return Scores(
            [0.0 if self.on_failure == "zero" else math.nan] * len(responses),
            notes={number: {"failed": reason} for number in range(len(responses))},
            failures=tuple(Failure(response.place, reason) for response in responses),
        )
