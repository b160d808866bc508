"""Regular expressions of files and recipes: none may keep the program busy for ever."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from alignkit.errors import ModelError
from alignkit.limits import TimeUp, time_limit

SECONDS = 10.0
"""For all patterns over all names; those of PEFT take a few hundredths of a second."""


def _of_kind(kind: type, value: Any) -> Any:
    """A value, or an empty one if it is of another type: PEFT refuses it later."""
    return value if isinstance(value, kind) else kind()


def require_quick_patterns(config: Any, weights: Callable[[], Iterable[str]], folder: Path) -> None:
    """Refuse patterns that do not come to an end over a model's names.

    Args:
        config: PEFT's, from a file.
        weights: gives their names in the model.
        folder: of the adapter, for the message.

    Raises:
        ModelError: a pattern takes too long, or is not a regular expression.
    """
    whole = [getattr(config, key, None) for key in ("target_modules", "exclude_modules")]
    keys = [
        rf"(.*\.)?({key})"
        for field in ("rank_pattern", "alpha_pattern")
        for key in _of_kind(dict, getattr(config, field, None))
        if not is_plain(key)
    ]
    layers = getattr(config, "layers_pattern", None)
    listed = [layers] if isinstance(layers, str) else _of_kind(list, layers)
    keys += [rf".*\.({key})\.(\d+)\..*" for key in listed if isinstance(key, str)]
    patterns = [one for one in whole if isinstance(one, str)] + keys
    if not patterns:
        return
    names = set(weights())
    names |= {name.rpartition(".")[0] for name in names}
    fault = pattern_fault(tuple(patterns), tuple(sorted(names)))
    if fault:
        raise ModelError(
            f"{folder}/adapter_config.json: a pattern {fault}: {patterns[0][:80]!r}",
            hint="name the modules in a list; do not trust a file that does this",
        )


def is_plain(pattern: str) -> bool:
    """Whether a pattern holds no sign of a regular expression but dots: as quick as a name."""
    return re.fullmatch(r"[\w.]*", pattern) is not None


@functools.lru_cache(maxsize=64)
def pattern_fault(patterns: tuple[str, ...], names: tuple[str, ...]) -> str:
    """What is wrong with patterns over some names; empty if they are quick to match."""
    try:
        with time_limit(SECONDS):
            for matcher in map(re.compile, patterns):
                for name in names:
                    matcher.fullmatch(name)
    except TimeUp:
        return f"takes more than {SECONDS:g} s to match"
    except (re.error, RecursionError, OverflowError):
        return "is no regular expression"
    return ""
