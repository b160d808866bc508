"""Longer context by scaled rotary positions, as recipes name it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from alignkit.recipe.section import PositiveInt, Section


class RopeSpec(Section):
    """Positions are scaled so that the model reads longer text than it was made for."""

    kind: Literal["linear", "dynamic", "yarn"]
    """`linear` divides positions by the factor (https://arxiv.org/abs/2306.15595); `yarn` scales
    slow rotations only (https://arxiv.org/abs/2309.00071); `dynamic` (NTK) changes nothing up to
    the original context and more with each token beyond it, so it is for reading, not training:
    rows stay within the original context."""
    factor: Annotated[float, Field(gt=1.0, le=1024.0)]
    """Longest text, as a multiple of the original context."""
    original_context: PositiveInt | None = None
    """Tokens that the model was made for; null takes the configuration's."""
