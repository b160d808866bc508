"""The `model` section of a recipe: the model to start from."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PrivateAttr

from alignkit.recipe.rope import RopeSpec
from alignkit.recipe.section import Section


class ModelSpec(Section):
    """The model to start from."""

    base: Annotated[str, Field(min_length=1)]
    """Hub id, folder, `.gguf` file, run folder (its `merged/`) or a name from `alignkit fetch`."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute precision. `auto` is bfloat16 on a GPU that multiplies it, else float16; on a CPU the
    faster of float32 and bfloat16, measured in a second or two, once for a machine. The choice is
    stored with the run. Trainable weights and loss arithmetic are float32 in every case."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Storage of the frozen base weights: `nf4` keeps them in 4 bits with double quantization
    (QLoRA, https://arxiv.org/abs/2305.14314), `int8` in 8 bits with one scale per row. Products
    are computed in `dtype`; the adapter is merged into the original weights if it works as well
    there."""
    attention: Literal["auto", "packed", "sdpa", "eager", "flash_attention_2"] = "auto"
    """`auto` packs rows without padding, or pads them if packing does not reproduce the model's own
    attention; `packed` stops instead; the others use padded batches in transformers."""
    chat_template: str | None = None
    """A template file or the name of a shipped one; null keeps the model's own."""
    rope_scaling: RopeSpec | None = None
    """Longer context, as in {kind: yarn, factor: 4}; stored in the merged configuration."""
    add_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that become one token each. Their embedding and output rows start as the mean of the
    tokens they were split into before, are trained, and are saved with the adapter."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for sources you trust."""

    _dtype_reason: str = PrivateAttr("as the recipe says")

    @property
    def dtype_reason(self) -> str:
        """Why `dtype` is what it is."""
        return self._dtype_reason

    def computing_in(self, dtype: str, reason: str) -> Self:
        """The same model in a dtype that was chosen for it."""
        return self.model_copy(update={"dtype": dtype}).chosen_because(reason)

    def chosen_because(self, reason: str) -> Self:
        """This model, which from now on says why its dtype was chosen."""
        self._dtype_reason = reason
        return self
