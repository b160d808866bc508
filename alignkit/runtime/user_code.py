"""Functions in the user's files, which run because a recipe names them."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import inspect
import linecache
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from alignkit.errors import AlignkitError
from alignkit.recipe.assets import show_file


def load_function(
    path: Path,
    name: str,
    error: type[AlignkitError],
    *,
    what: str,
    shape: str,
    may_be_async: bool = False,
) -> Callable[..., Any]:
    """A function in a file, which is run once, however many functions of it are used.

    Args:
        path: of the file.
        name: of the function.
        error: class to raise for faults of the file.
        what: what the file is to the user, as in `reward function`.
        shape: how such a function is written, with `{name}` in it.
        may_be_async: accept one whose result is awaited.

    Raises:
        AlignkitError: the file cannot be run, or holds no such function.
    """
    function = _find(_module(path, error, what), path, name, error, shape)
    if inspect.iscoroutinefunction(function) and not may_be_async:
        raise error(
            f"{show_file(path)}: {name} must be a plain function, got an async one",
            hint="call asyncio.run inside it",
        )
    return function


def _module(path: Path, fault: type[AlignkitError], what: str) -> ModuleType:
    """The file as a module, run at its first use, with its folder importable meanwhile."""
    path = path.resolve()
    shown = show_file(path)
    if not path.is_file():
        raise fault(
            f"{shown}: the file of the {what} does not exist",
            hint="put it back, or name another in the recipe",
        )
    content = path.read_bytes()
    # A file that has changed is another module: its hash goes into run.json.
    digest = hashlib.sha256(str(path).encode() + content).hexdigest()
    name = f"alignkit_user_{path.stem}_{digest[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # the recipe accepts names in .py only
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    sys.path.insert(0, str(path.parent))
    try:
        # not through the loader, which leaves a __pycache__ next to the user's file
        exec(compile(content, str(path), "exec"), vars(module))
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, KeyboardInterrupt):
            raise
        where, line = _line_of(error, path)
        advice = f"the line is `{line}`" if line else f"`python {shown}` shows the whole error"
        if isinstance(error, ModuleNotFoundError) and error.name:
            advice = f"install {error.name}, or put it into {show_file(path.parent)}"
        raise fault(f"{where}: cannot be imported: {_describe(error)}", hint=advice) from error
    finally:
        with contextlib.suppress(ValueError):  # the file may have removed it itself
            sys.path.remove(str(path.parent))
    return module


def _find(
    module: ModuleType, path: Path, name: str, fault: type[AlignkitError], shape: str
) -> Callable[..., Any]:
    shown = show_file(path)
    if not hasattr(module, name):
        own = [
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__
        ]
        near = difflib.get_close_matches(name, own, n=1)
        raise fault(
            f"{shown}: has no function {name!r}",
            hint=f"did you mean {near[0]}?"
            if near
            else f"functions in it: {', '.join(own) or 'none'}",
        )
    function = getattr(module, name)
    if not callable(function):
        raise fault(
            f"{shown}: {name} must be a function, got {type(function).__name__}",
            hint=f"write {shape.format(name=name)}",
        )
    return function  # type: ignore[no-any-return]


def raised(
    error: BaseException,
    path: Path,
    name: str,
    kind: type[AlignkitError],
    *,
    shape: str,
    more: str = "",
) -> AlignkitError:
    """The error to raise after the user's function raised one.

    Args:
        error: raised by the function.
        path: its file.
        name: of the function.
        kind: class of the error to raise.
        shape: how such a function is written, with `{name}` in it.
        more: what the function was called with.
    """
    where, line = _line_of(error, path)
    return kind(
        f"{where}: {name} raised {_describe(error)}{more}",
        hint=f"the line is `{line}`" if line else f"it is called as {shape.format(name=name)}",
    )


def _line_of(error: BaseException, path: Path) -> tuple[str, str]:
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


def _describe(error: BaseException) -> str:
    """Type and message of an error, on one line."""
    text = " ".join(str(error).split())
    shown = text if len(text) <= 300 else text[:297] + "..."
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__
