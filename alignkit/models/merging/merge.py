"""Adapter -> dense checkpoint that plain transformers loads, verified.

The merge runs in float32, W + (alpha / rank) · B A, and is rounded once to the base's dtype,
stochastically and with a fixed seed, because rounding to the nearest loses small updates. It goes
through the base's files one by one, so memory holds one file and one layer (see MergedWeights).
Then the written files are read back and compared: every weight with the expected one, bit for bit,
and the logits with those of base + adapter on real rows. The report says how much of the update
survived.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from alignkit.models.base.generation import generation_settings
from alignkit.models.base.loading import BaseModel, load_tokenizer
from alignkit.models.merging.dense import MergedWeights, Onto, read_merged
from alignkit.models.merging.report import Drift, MergeReport, require_faithful
from alignkit.models.merging.settings import untie
from alignkit.models.merging.updates import Blend
from alignkit.models.weights.comparing import (
    Sample,
    closeness,
    mean_kl,
    mean_loss,
    read_logits,
    take_samples,
)
from alignkit.models.weights.writing import (
    add_stops,
    replace_model,
    require_free,
    write_and_read,
    write_settings,
)
from alignkit.packed import IntArray

MAX_DRIFT = 0.05
"""Nats per token that the loss may rise when an adapter trained over quantized weights goes onto
the original ones; above it `auto` merges onto the dequantized ones."""


def merge_adapter(
    base: BaseModel,
    adapter: Path | Blend,
    output: Path,
    *,
    rows: Sequence[IntArray],
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stop_tokens: Sequence[int] = (),
    overwrite: bool = False,
    onto: Onto = "auto",
) -> MergeReport:
    """Write the merged model and verify it.

    Args:
        base: the model the adapter was trained on.
        adapter: PEFT adapter folder, or several with their weights.
        output: folder to write; it appears only once the merge is verified.
        rows: token ids of real rows, at least one with two tokens.
        dtype: of the written weights.
        tokenizer: saved with the weights; None takes the base's.
        stop_tokens: ids that end a response, added to the generation settings.
        overwrite: replace an existing output.
        onto: for a base that was quantized in training, the weights that are merged onto; `auto`
            takes the original ones, unless the loss is more than `MAX_DRIFT` higher there.

    Returns:
        The measured differences.

    Raises:
        ModelError: the output exists, or the adapter does not fit.
        RoundingError: the merge is not faithful.
    """
    require_free(output, overwrite=overwrite)
    merge = MergedWeights(base, adapter, dtype)
    samples = take_samples(rows)

    def read(model: Any) -> torch.Tensor:
        return read_logits(model, samples)

    exact, quantized = merge.choose(read, onto, partial(_loss_drift, samples))
    kl_to_base = mean_kl(exact, merge.before(read, merge.source))
    with replace_model(output) as written:
        untied = merge.untied()
        if untied:
            untie(merge.config)
        merge.write(written, [*merge.stored, *untied], {})
        tokenizer = tokenizer or load_tokenizer(base)
        write_settings(base, merge.plain, dtype, tokenizer, written, stop_tokens)
        trust = base.trust_remote_code
        kind = AutoModelForCausalLM
        logits = read_merged(written, kind, merge.config, read, trust_remote_code=trust)
        report = MergeReport(
            output=str(output),
            dtype=str(dtype).removeprefix("torch."),
            modules=merge.modules,
            survived=merge.survived,
            rounding_error=merge.rounding_error,
            mean_kl_to_base=kl_to_base,
            **vars(closeness(exact, logits)),
            loss=mean_loss(exact, samples),
            merged_loss=mean_loss(logits, samples),
            quantized=quantized,
            notes=(*merge.notes, *filter(None, [generation_settings(base)[1]])),
        )
        require_faithful(report)
    return report


def _loss_drift(samples: Sequence[Sample], trained: torch.Tensor, original: torch.Tensor) -> Drift:
    losses = mean_loss(trained, samples), mean_loss(original, samples)
    distance = f"KL {mean_kl(trained, original):.2g} nats/token"
    return Drift("loss", *losses, distance, MAX_DRIFT, losses[1] - losses[0] > MAX_DRIFT)


def write_dense(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    dtype: torch.dtype,
    stop_tokens: Sequence[int],
) -> None:
    """Write a model whose weights were all trained, and read it back bit for bit.

    Args:
        model: cast in place.
        tokenizer: saved with its chat template.
        output: folder to write, replaced if it exists; it appears only once it is verified.
        dtype: of the written weights.
        stop_tokens: ids that end a response, added to the generation settings.

    Raises:
        ModelError: the files do not hold what was written.
    """
    add_stops(model.generation_config, stop_tokens)
    read = partial(AutoModelForCausalLM.from_pretrained, dtype=dtype, use_safetensors=True)
    with replace_model(output) as written:
        write_and_read(model.to(dtype), tokenizer, written, read)
