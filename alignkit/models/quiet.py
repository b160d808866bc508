"""transformers without its progress bars and warnings."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

from transformers.utils import logging as transformers_logging


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence progress bars and warnings of transformers; errors pass."""
    level = transformers_logging.get_verbosity()
    loud = level < logging.ERROR  # each change of a level makes every logger forget what it knew
    bars = transformers_logging.is_progress_bar_enabled()
    if loud:
        transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if loud:
            transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
