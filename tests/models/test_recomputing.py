"""Activations that are computed again are those of the first time, dropped out or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tiny import tiny_model

from alignkit.models.adapters.attach import attach_adapter
from alignkit.models.adapters.switching import recompute_layers, remove_dropout
from alignkit.recipe.adapters import LoraSpec


def model_of(dropout: str) -> Any:
    torch.manual_seed(0)
    if dropout == "of the adapter":
        spec = LoraSpec(kind="lora", rank=2, alpha=4.0, dropout=0.3)
        return attach_adapter(tiny_model("llama"), spec, 0).train()
    config = transformers.GPT2Config(
        vocab_size=32,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.3 if dropout == "of the model" else 0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return transformers.GPT2LMHeadModel(config).train()


def gradients(model: Any) -> list[torch.Tensor]:
    torch.manual_seed(1)
    model.zero_grad()
    ids = torch.arange(24)[None] % 17
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("dropout", ["of the adapter", "of the model", "none"])
def test_gradients_are_those_without(dropout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    enable = transformers.PreTrainedModel.gradient_checkpointing_enable
    kept: list[bool] = []

    def watched(model: Any, options: dict[str, Any]) -> None:
        kept.append(options["preserve_rng_state"])
        enable(model, options)

    monkeypatch.setattr(transformers.PreTrainedModel, "gradient_checkpointing_enable", watched)
    model = model_of(dropout)
    expected = gradients(model)
    recompute_layers(model)
    model.enable_input_require_grads()
    for one, other in zip(gradients(model), expected, strict=True):
        assert torch.equal(one, other)
    remove_dropout(model)
    recompute_layers(model)
    assert kept == [dropout != "none", False]
