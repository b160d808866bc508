"""The user's Python function as a reward: loaded, called, and its errors located by line.

It runs in a process of its own, where `load_here` and `score_here` are called.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alignkit.errors import RewardError
from alignkit.generation.rewards.failures import Call, Unanswered
from alignkit.generation.rewards.responses import Response, Scores, numbers, shared_columns
from alignkit.recipe.assets import show_file
from alignkit.recipe.rewards import FunctionReward
from alignkit.runtime.user_code import load_function, raised
from alignkit.runtime.worker import Worker, WorkerLost

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_SHAPE = "def {name}(prompts, completions, **columns)"
_AS_TRL = "; reward.messages: true gives completions as messages, as TRL does"
_GIVEN = ("prompts", "completions", "completion_ids")
_LOGS = ("log_metric", "log_extra")

_START = 60.0
"""Seconds that loading a file may take at least: `reward.timeout` is about calls."""

_WORKER = Worker()
"""One for all functions: those of one file share its variables."""


def function_call(spec: FunctionReward) -> Call:
    """The scores of the user's function, which runs in a process of its own.

    Args:
        spec: names the file and the function, and how it is called.

    Returns:
        A function from responses and seconds to scores. It raises RewardError where the user's
        raises anything or gives anything else, and Unanswered where it takes too long, too much
        memory, or ends its process.

    Raises:
        RewardError: the file cannot be run, or holds no such function.
    """

    digest = _digest(spec.function)
    start = max(spec.timeout, _START)

    def call(target: str, timeout: float, *arguments: Any) -> Any:
        try:
            return _WORKER.call(
                f"{__name__}:{target}", *arguments, timeout=timeout, fault=RewardError
            )
        except WorkerLost as lost:
            raise Unanswered(
                f"{function_name(spec.function)}: {lost}",
                hint="what it printed stands above; reward.timeout is the limit for one call",
            ) from None

    def run(responses: Sequence[Response], seconds: float) -> Scores:
        if not _WORKER.running:  # the last call ended it; what the file imports may take long
            call(load_here.__name__, start, spec.function, digest)
        place = spec.function, spec.messages
        found = call(score_here.__name__, seconds, *place, digest, list(responses))
        notes = {int(number): note for number, note in found["notes"].items()}
        values = [math.nan if value is None else value for value in found["values"]]
        return Scores(values, notes, found["metrics"])

    call(load_here.__name__, start, spec.function, digest)
    return run


def _digest(place: str) -> str:
    """Hash of the function's file; empty if it is not there, which loading it will say."""
    path = Path(place.rpartition(":")[0])
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


Local = Callable[[Sequence[Response]], dict[str, Any]]
_LOADED: dict[tuple[str, bool], Local] = {}


def load_here(place: str, digest: str) -> None:
    """Run the user's file in this process.

    Args:
        place: `file.py:name`.
        digest: of the file when the run began.

    Raises:
        RewardError: the file cannot be run, or holds no such function.
    """
    if digest != _digest(place):
        raise RewardError(
            f"{function_name(place)}: the file has changed since the run began, and its process "
            "had to be started again",
            hint="put it back; --resume goes on from the last checkpoint with the new one",
        )
    _LOADED[place, False] = local_score(place)
    _LOADED[place, True] = local_score(place, messages=True)


def score_here(
    place: str, messages: bool, digest: str, responses: Sequence[Response]
) -> dict[str, Any]:
    """The function's scores, called in this process.

    Returns:
        `values`, with None where it does not apply; `notes` and `metrics` that it logged.

    Raises:
        RewardError: it raises anything, or gives no usable scores.
    """
    if (place, messages) not in _LOADED:  # another function has started this worker
        load_here(place, digest)
    return _LOADED[place, messages](responses)


def local_score(place: str, *, messages: bool = False) -> Local:
    """The user's function, called with lists.

    Args:
        place: `file.py:name`. The file is run once, however many functions of it are used.
        messages: give the completions of chat rows as messages.

    Returns:
        A function from at least one response to what `score_here` returns. It raises RewardError
        if the user's raises anything or needs a column that not every row has.

    Raises:
        RewardError: the file cannot be run, or holds no such function.
    """
    file, _, name = place.rpartition(":")
    path, shown = Path(file), function_name(place)
    what = "reward function"
    function = load_function(path, name, RewardError, what=what, shape=_SHAPE, may_be_async=True)
    accepted, required = _parameters(function, path, name)

    def run(responses: Sequence[Response]) -> dict[str, Any]:
        columns = shared_columns(responses)
        missing = [column for column in required if column not in columns]
        if missing:
            raise RewardError(
                f"{shown} wants {missing[0]!r}, a column that not every row has",
                hint=f"the rows have {', '.join(columns) or 'no columns'}; give the parameter a "
                "default, or add the column",
            )
        log = _Log(len(responses))
        given = {
            "prompts": [response.prompt for response in responses],
            "completions": [_completion(response, messages) for response in responses],
            "completion_ids": [list(response.ids) for response in responses],
            **columns,
        }
        wanted = {key: given[key] for key in given if accepted is None or key in accepted}
        wanted |= {key: getattr(log, key) for key in _LOGS if key in (accepted or named)}
        try:
            result = function(**wanted)
            if inspect.isawaitable(result):
                result = _loop().run_until_complete(_awaited(result))
        except BaseException as error:  # nothing of the user's may end the worker
            call = f", given {len(responses)} completions"
            fault = raised(error, path, name, RewardError, shape=_SHAPE, more=call)
            inside = fault.hint.startswith("the line is")
            if inside and isinstance(error, TypeError | AttributeError) and not messages:
                fault.hint += _AS_TRL * _chat(responses)
            raise fault from error
        values = [None if math.isnan(x) else x for x in numbers(shown, result, responses)]
        return {"values": values, "notes": log.notes, "metrics": log.metrics}

    named = _named(function)
    return run


class _Log:
    """What a function says beside its scores, through TRL's two functions."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.notes: dict[int, dict[str, Any]] = {}
        self.metrics: dict[str, float] = {}

    def log_metric(self, name: str, value: float) -> None:
        """A number about all responses of the call."""
        self.metrics[str(name)] = float(value)

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """One value for each response, for its line in samples.jsonl."""
        if len(values) != self.count:
            raise ValueError(f"log_extra got {len(values)} values for {self.count} completions")
        for number, value in enumerate(values):
            plain = value if isinstance(value, str | int | float | bool | None) else str(value)
            self.notes.setdefault(number, {})[str(column)] = plain


def _chat(responses: Sequence[Response]) -> bool:
    return any(isinstance(response.prompt, list) for response in responses)


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """One for all calls: a client that a file keeps belongs to the loop of its first call."""
    return asyncio.new_event_loop()


async def _awaited(result: Any) -> Any:
    return await result


def _completion(response: Response, messages: bool) -> Any:
    if messages and isinstance(response.prompt, list):
        return [{"role": "assistant", "content": response.text}]
    return response.text


def function_name(place: str) -> str:
    """`file.py:name` as a person would type it."""
    file, _, name = place.rpartition(":")
    return f"{show_file(Path(file))}:{name}"


def _named(function: Callable[..., Any]) -> set[str]:
    """Names of the function's parameters; none if it is written in C."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return set()
    return {key for key, p in parameters.items() if p.kind in _BY_NAME}


def _parameters(
    function: Callable[..., Any], path: Path, name: str
) -> tuple[set[str] | None, list[str]]:
    """What the function accepts by name (None: everything), and the columns it requires."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # written in C: its parameters are unknown
        return {"prompts", "completions"}, []
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    named = _named(function)
    if not named & set(_GIVEN) and not takes_all:
        raise RewardError(
            f"{show_file(path)}: {name} has no parameter completions",
            hint=f"write {_SHAPE.format(name=name)}; columns may also be named one by one",
        )
    required = [
        key
        for key, p in parameters.items()
        if p.default is p.empty
        and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        and key not in (*_GIVEN, *_LOGS)
    ]
    return None if takes_all else named, required
