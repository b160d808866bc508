"""The base class of every part of a recipe."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
COLDEST = 1e-4
"""Temperature above 0. Logits divided by less may leave the range of float32."""
Temperature = Annotated[float, Field(ge=COLDEST)]
PositiveInt = Annotated[int, Field(ge=1)]


def _expand_home(name: str) -> str:
    path = os.path.expanduser(name)
    if path.startswith("~"):
        raise ValueError("must not begin with ~ unless it names a home folder")
    return path


Folder = Annotated[str, Field(min_length=1), AfterValidator(_expand_home)]
"""A folder to write; `~` is the home folder."""


class Section(BaseModel):
    """Base of every part of a recipe: frozen, strict, no unknown keys."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )
