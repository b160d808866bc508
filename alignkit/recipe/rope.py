"""The `rope_scaling` section: longer context through scaled rotary positions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from alignkit.recipe.section import PositiveInt, Section


class RopeSpec(Section):
    """Scales positions so that the model reads longer text than it was made for."""

    kind: Literal["linear", "dynamic", "yarn"]
    """`linear` divides positions by the factor (https://arxiv.org/abs/2306.15595); `yarn` scales
    slow rotations only (https://arxiv.org/abs/2309.00071); `dynamic` (NTK) changes nothing up to
    the original context and more with each token beyond it, so it is for inference, not
    training: rows must fit the original context."""
    factor: Annotated[float, Field(gt=1.0, le=1024.0)]
    """Longest text as a multiple of the original context."""
    original_context: PositiveInt | None = None
    """Context that the model was made for, in tokens; null takes the configuration's."""
