"""A Python function of the user's as a reward: found, called, and its faults named by line."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import inspect
import linecache
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from alignkit.errors import RewardError
from alignkit.generation.responses import Response, shared_columns
from alignkit.recipe.assets import show_file

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
    function = _find(_module(path), path, name)
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
                completions=[response.completion for response in responses],
                **given,
            )
        except (Exception, SystemExit) as error:
            where, line = _where(error, path)
            raise RewardError(
                f"{where}: {name} raised {_said(error)}, given {len(responses)} completions",
                hint=f"the line is `{line}`" if line else "the error arose outside the file",
            ) from error

    return run


def function_name(place: str) -> str:
    """`file.py:name` as a person would type it."""
    file, _, name = place.rpartition(":")
    return f"{show_file(Path(file))}:{name}"


def _module(path: Path) -> ModuleType:
    """The file as a module, run at its first use; its folder is importable meanwhile."""
    path = path.resolve()
    name = f"alignkit_reward_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    shown = show_file(path)
    if not path.is_file():
        raise RewardError(f"{shown}: the file of the reward function does not exist")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # the recipe accepts names in .py only
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    sys.path.insert(0, str(path.parent))
    try:
        # not through the loader, which leaves a __pycache__ beside the user's file
        exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        where, line = _where(error, path)
        advice = f"the line is `{line}`" if line else f"`python {shown}` shows the whole error"
        if isinstance(error, ModuleNotFoundError) and error.name:
            advice = f"install {error.name}, or put it into {show_file(path.parent)}"
        raise RewardError(f"{where}: cannot be imported: {_said(error)}", hint=advice) from error
    finally:
        with contextlib.suppress(ValueError):  # the file may have removed it itself
            sys.path.remove(str(path.parent))
    return module


def _find(module: ModuleType, path: Path, name: str) -> Callable[..., Any]:
    shown = show_file(path)
    if not hasattr(module, name):
        own = [
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__
        ]
        near = difflib.get_close_matches(name, own, n=1)
        raise RewardError(
            f"{shown}: has no function {name!r}",
            hint=f"did you mean {near[0]}?"
            if near
            else f"functions in it: {', '.join(own) or 'none'}",
        )
    function = getattr(module, name)
    if not callable(function):
        raise RewardError(
            f"{shown}: {name} must be a function, got {type(function).__name__}",
            hint=f"write {_SHAPE.format(name=name)}",
        )
    if inspect.iscoroutinefunction(function):
        raise RewardError(
            f"{shown}: {name} must be a plain function, got an async one",
            hint="call asyncio.run inside it",
        )
    return function  # type: ignore[no-any-return]


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


def _where(error: BaseException, path: Path) -> tuple[str, str]:
    """`file:line` of the last line of the user's file that led to an error, and that line."""
    file = str(path.resolve())
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == file and frame.lineno
    ]
    if isinstance(error, SyntaxError) and error.filename == file and error.lineno:
        lines.append(error.lineno)
    if not lines:
        return show_file(path), ""
    linecache.checkcache(file)
    return f"{show_file(path)}:{lines[-1]}", linecache.getline(file, lines[-1]).strip()


def _said(error: BaseException) -> str:
    """Type and message of an error, on one line."""
    text = " ".join(str(error).split())
    shown = text if len(text) <= 300 else text[:297] + "..."
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__
