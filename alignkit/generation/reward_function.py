"""The user's Python function as a reward: loaded, called, and its errors located by line.

It runs in a process of its own, where `load_here` and `score_here` are called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alignkit.errors import RewardError
from alignkit.generation.responses import Response, Score, checked, shared_columns
from alignkit.recipe.assets import show_file
from alignkit.recipe.rewards import FunctionReward
from alignkit.runtime.user_code import load_function, raised
from alignkit.runtime.worker import Worker, WorkerLost

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_SHAPE = "def {name}(prompts, completions, **columns)"

_WORKER = Worker()
"""One for all functions: those of one file share its variables."""


def function_score(spec: FunctionReward) -> Score:
    """The scores of the user's function, which runs in a process of its own.

    Args:
        spec: names the file and the function, and the seconds that a call may take.

    Returns:
        A function from responses to one finite number for each. It raises RewardError where the
        user's raises anything, gives anything else, takes too long or ends its process.

    Raises:
        RewardError: the file cannot be run, or holds no such function.
    """

    def call(target: str, *arguments: Any) -> Any:
        try:
            return _WORKER.call(
                f"{__name__}:{target}",
                spec.function,
                *arguments,
                timeout=spec.timeout,
                fault=RewardError,
            )
        except WorkerLost as lost:
            raise RewardError(
                f"{function_name(spec.function)}: {lost}",
                hint="what it printed stands above; reward.timeout is the limit for one call",
            ) from None

    def run(responses: Sequence[Response]) -> list[float]:
        return list(call(score_here.__name__, list(responses))) if responses else []

    call(load_here.__name__)
    return run


_LOADED: dict[str, Score] = {}


def load_here(place: str) -> None:
    """Run the user's file in this process.

    Args:
        place: `file.py:name`.

    Raises:
        RewardError: the file cannot be run, or holds no such function.
    """
    _LOADED[place] = checked(function_name(place), local_score(place))


def score_here(place: str, responses: Sequence[Response]) -> list[float]:
    """The function's scores, called in this process.

    Raises:
        RewardError: it raises anything, or gives no usable scores.
    """
    if place not in _LOADED:  # a worker before this one loaded it
        load_here(place)
    return _LOADED[place](responses)


def local_score(place: str) -> Callable[[Sequence[Response]], Any]:
    """The user's function, called with lists.

    Args:
        place: `file.py:name`. The file is run once, however many functions of it are used.

    Returns:
        A function from at least one response to whatever the user's function returns. It raises
        RewardError if that raises anything, or needs a column that not every row has.

    Raises:
        RewardError: the file cannot be run, or holds no such function.
    """
    file, _, name = place.rpartition(":")
    path = Path(file)
    function = load_function(path, name, RewardError, what="reward function", shape=_SHAPE)
    accepted, required = _parameters(function, path, name)

    def run(responses: Sequence[Response]) -> Any:
        columns = shared_columns(responses)
        missing = [column for column in required if column not in columns]
        if missing:
            raise RewardError(
                f"{function_name(place)} wants {missing[0]!r}, a column that not every row has",
                hint=f"the rows have {', '.join(columns) or 'no columns'}; give the parameter a "
                "default, or add the column",
            )
        wanted = {key: columns[key] for key in columns if accepted is None or key in accepted}
        try:
            return function(
                prompts=[response.prompt for response in responses],
                completions=[response.text for response in responses],
                **wanted,
            )
        except BaseException as error:  # nothing of the user's may end the worker
            call = f", given {len(responses)} completions"
            raise raised(error, path, name, RewardError, shape=_SHAPE, more=call) from error

    return run


def function_name(place: str) -> str:
    """`file.py:name` as a person would type it."""
    file, _, name = place.rpartition(":")
    return f"{show_file(Path(file))}:{name}"


def _parameters(
    function: Callable[..., Any], path: Path, name: str
) -> tuple[set[str] | None, list[str]]:
    """Columns that the function accepts (None: all), and those it requires."""
    try:
        parameters = inspect.signature(function).parameters
    except (
        TypeError,
        ValueError,
    ):  # written in C: its parameters are unknown, so it gets no columns
        return set(), []
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    named = {key: p for key, p in parameters.items() if p.kind in _BY_NAME}
    missing = [key for key in ("prompts", "completions") if key not in named]
    if missing and not takes_all:
        raise RewardError(
            f"{show_file(path)}: {name} has no parameter {' and no parameter '.join(missing)}",
            hint=f"write {_SHAPE.format(name=name)}; columns may also be named one by one",
        )
    required = [
        key
        for key, p in parameters.items()
        if p.default is p.empty
        and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        and key not in ("prompts", "completions")
    ]
    return None if takes_all else set(named), required
