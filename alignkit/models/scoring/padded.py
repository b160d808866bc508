"""The plain path: padded rows, transformers' masks and full logits; slow, and the yardstick."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from alignkit.models.attention.prefix import with_cached_prefix
from alignkit.models.kernels.precision import compute_context
from alignkit.models.kernels.vocab_head import TokenScores
from alignkit.models.scoring.scorer import Reading, Scorer, Scores, sequence_rows
from alignkit.models.transformers_parts import attention_of
from alignkit.packed import PackedBatch


class PaddedScorer(Scorer):
    """The plain path: one padded row per sequence, transformers' masks, full logits.

    Args:
        model: as for `Scorer`.
        dtype: compute precision.
        head: as for `Scorer`.
        reading: as for `Scorer`.
        temperature: as for `Scorer`.
        attention: an implementation of transformers that takes padded batches.
    """

    def __init__(
        self,
        model: Any,
        dtype: torch.dtype,
        head: nn.Linear | None = None,
        *,
        reading: Reading = "ends",
        temperature: float = 1.0,
        attention: str = "sdpa",
    ) -> None:
        super().__init__(model, dtype, head, reading=reading, temperature=temperature)
        try:
            self.causal.set_attn_implementation(attention)
        except ValueError:
            if attention != "sdpa":
                raise
            self.causal.set_attn_implementation("eager")  # Gemma 2 and others have no sdpa

    @property
    def attention(self) -> str:
        """How rows are attended to, in words."""
        return f"padded rows, {attention_of(self.causal.config.get_text_config())}"

    def places(self, batch: PackedBatch, *, targets: bool) -> torch.Tensor:
        """Where states are among those that layers read; see `TokenScorer.places`."""
        rows = sequence_rows(batch)
        width = max(map(len, rows))
        if targets:
            columns = batch.position_ids[batch.target_rows]
            return torch.from_numpy(batch.target_sequences * width + columns)
        every = [number * width + np.arange(len(row)) for number, row in enumerate(rows)]
        return torch.from_numpy(np.concatenate(every))

    def forward(self, batch: PackedBatch) -> Scores:
        """Log-probs of the batch's targets, or what the head reads; see `TokenScorer.forward`."""
        rows = sequence_rows(batch)
        ids = [torch.from_numpy(batch.input_ids[row]) for row in rows]
        ones = [torch.ones_like(row) for row in ids]
        device = next(self.causal.parameters()).device
        inputs = {
            "input_ids": pad_sequence(ids, batch_first=True).to(device),
            "attention_mask": pad_sequence(ones, batch_first=True).to(device),
            "use_cache": False,
        }
        sequences = self.tensor(batch.target_sequences)
        columns = self.tensor(batch.position_ids[batch.target_rows])
        with compute_context(self.causal, self.dtype):
            read = None
            if self.head is not None:
                read_inputs = with_cached_prefix(self.model, inputs)
                hidden = self.causal.get_decoder()(**read_inputs).last_hidden_state
                if self.reading == "ends":
                    last = torch.tensor([len(row) - 1 for row in rows], device=device)
                    return self.rewards(hidden[torch.arange(len(rows), device=device), last])
                read = self.rewards(hidden[sequences, columns])
                if self.reading == "targets":
                    return read
            logits = self.causal(**with_cached_prefix(self.model, inputs)).logits
        logprobs = torch.log_softmax(logits.float() / self.temperature, dim=-1)
        picked = logprobs[sequences, columns]
        chosen = picked.gather(1, self.tensor(batch.target_ids)[:, None])[:, 0]
        scores = TokenScores(chosen, chosen.detach() >= picked.detach().amax(1))
        return scores if read is None else (scores, read)
