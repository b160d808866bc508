"""Which kernels compute packed attention."""

from __future__ import annotations

from typing import Literal

import torch
from transformers import PreTrainedConfig

from alignkit.models.attention.varlen import torch_kernel

Backend = Literal["processor", "varlen", "segments"]
"""`processor`: blocks of queries in matrix products (attention/processor.py). `varlen`: one flash
call for a row (attention/varlen.py). `segments`: one call of torch's attention for each segment
(attention/plain.py)."""

_WIDEST = 256
"""Largest head dimension of flash attention, which takes multiples of 8."""


def choose_backend(
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    value_width: int,
    *,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> Backend:
    """The fastest backend that computes this attention.

    Args:
        device: of the tensors.
        dtype: of the products.
        width: dimension of a query's or key's head.
        value_width: dimension of a value's head.
        dropout: probability on the weights.
        softcap: cap of the scores.
    """
    if width != value_width or dropout or softcap is not None:
        return "segments"
    if device.type == "cpu":
        return "processor"
    fits = dtype in (torch.float16, torch.bfloat16) and width % 8 == 0 and width <= _WIDEST
    return "varlen" if fits and has_flash(device) and torch_kernel() else "segments"


def has_flash(device: torch.device) -> bool:
    """Whether torch's flash attention runs there: on CUDA from compute capability 8.0 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


IN_WORDS: dict[Backend, str] = {
    "processor": "packed rows, blocks of queries on the processor",
    "varlen": "packed rows, one flash call a layer",
    "segments": "packed rows, one call a layer for each segment",
}
"""What the plan and run.json say of each backend."""


def planned_attention(config: PreTrainedConfig, device: str, dtype: torch.dtype) -> str:
    """How a model's packed rows will be attended to, in words.

    Args:
        config: of the model.
        device: type of the device.
        dtype: of the products.
    """
    text = config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    softcap = getattr(text, "attn_logit_softcapping", None)
    return IN_WORDS[choose_backend(torch.device(device), dtype, width, width, softcap=softcap)]
