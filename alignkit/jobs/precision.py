"""The precision in which a model is measured or talked to."""

from __future__ import annotations

import contextlib

from alignkit.errors import AlignkitError, ModelError
from alignkit.jobs.question import run_of
from alignkit.models.base.loading import DTYPES
from alignkit.recipe.reading.stored import NAME, stored_recipe
from alignkit.stages.inputs.precision import AUTO, fastest_dtype


def dtype_for(name: str, asked: str, base: str | None = None) -> str:
    """What was asked for; by default the dtype of the model's run, else the fastest here.

    Args:
        name: of any model.
        asked: name of a dtype, or `auto`.
        base: of an adapter that names another.

    Raises:
        ModelError: there is no such dtype.
    """
    if asked != AUTO:
        if asked not in DTYPES:
            choices = ", ".join((AUTO, *DTYPES))
            raise ModelError(f"--dtype cannot be {asked!r}", hint=f"one of {choices}")
        return asked
    run = run_of(name)
    if run is not None:
        with contextlib.suppress(AlignkitError):  # a damaged recipe stops no evaluation of rows
            stored = str(stored_recipe(run / NAME).model.dtype)
            if stored in DTYPES:
                return stored
    return fastest_dtype(base or name)
