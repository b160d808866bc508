"""Memory that runs out, as an error with a hint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from alignkit.errors import TrainingError
from alignkit.models.heap import is_out_of_memory

FEWER = (
    "lower training.microbatch_tokens or data.max_length, or set "
    "training.gradient_checkpointing=true"
)
"""Hint where a pass does not fit."""
SMALLER = "use LoRA, model.quantization=nf4, or a smaller model"
"""Hint where weights do not fit."""


class OutOfMemoryError(TrainingError):
    """Memory ran out."""


@contextlib.contextmanager
def within_memory(what: str, *, hint: str = FEWER) -> Iterator[None]:
    """Turn running out of memory into an error with a hint.

    Args:
        what: what does not fit, as in `step 3`.
        hint: what to do.

    Raises:
        OutOfMemoryError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"{what} does not fit in memory", hint=hint) from error
