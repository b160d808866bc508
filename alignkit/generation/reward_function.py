"""A Python function of the user's as a reward: found, called, and its faults named by line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alignkit.errors import RewardError
from alignkit.generation.responses import Response, shared_columns
from alignkit.recipe.assets import show_file
from alignkit.runtime.user_code import load_function, raised

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_SHAPE = "def {name}(prompts, completions, **columns)"


def function_score(place: str) -> Callable[[Sequence[Response]], Any]:
    """The user's function, called with lists.

    Args:
        place: `file.py:name`. The file is run once, however many functions of it are used.

    Returns:
        A function from at least one response to whatever the user's returns. It raises RewardError
        where the user's raises anything, or wants a column that not every row has.

    Raises:
        RewardError: the file cannot be run, or holds no such function.
    """
    file, _, name = place.rpartition(":")
    path = Path(file)
    function = load_function(path, name, RewardError, what="reward function", shape=_SHAPE)
    accepted, required = _parameters(function, path, name)

    def run(responses: Sequence[Response]) -> Any:
        columns = shared_columns(responses)
        absent = [column for column in required if column not in columns]
        if absent:
            raise RewardError(
                f"{function_name(place)} wants {absent[0]!r}, a column that not every row has",
                hint=f"the rows have {', '.join(columns) or 'no columns'}; give the parameter a "
                "default, or add the column",
            )
        given = {key: columns[key] for key in columns if accepted is None or key in accepted}
        try:
            return function(
                prompts=[response.prompt for response in responses],
                completions=[response.text for response in responses],
                **given,
            )
        except (Exception, SystemExit) as error:
            given_to = f", given {len(responses)} completions"
            raise raised(error, path, name, RewardError, shape=_SHAPE, more=given_to) from error

    return run


def function_name(place: str) -> str:
    """`file.py:name` as a person would type it."""
    file, _, name = place.rpartition(":")
    return f"{show_file(Path(file))}:{name}"


def _parameters(
    function: Callable[..., Any], path: Path, name: str
) -> tuple[set[str] | None, list[str]]:
    """Columns that the function accepts, None for all, and those it cannot do without."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # written in C: nothing is known, so it gets no columns
        return set(), []
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    named = {key: p for key, p in parameters.items() if p.kind in _BY_NAME}
    lacking = [key for key in ("prompts", "completions") if key not in named]
    if lacking and not takes_all:
        raise RewardError(
            f"{show_file(path)}: {name} has no parameter {' and no parameter '.join(lacking)}",
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
