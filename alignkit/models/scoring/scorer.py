"""TokenScorer: the one forward of every stage, PackedBatch -> log-probs at the targets.

It runs the decoder on the packed row, gathers the hidden states that are scored and projects only
those: to the vocabulary, or through a scalar head to one reward for each sequence. The padded
scorers compute the same the way transformers does, with padding, masks and full logits: slower,
and the yardstick of the start-up check and of the tests.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from alignkit.models.attention.backend import planned_attention
from alignkit.models.attention.packed import PACKED
from alignkit.models.attention.prefix import prefix_states
from alignkit.models.kernels.copies import on_device
from alignkit.models.kernels.gated import use_gated_products
from alignkit.models.kernels.norms import use_fast_norms
from alignkit.models.kernels.precision import compute_context, sum_dtype, widen_layer_norms
from alignkit.models.kernels.vocab_head import TokenScores, logit_transform, score_targets
from alignkit.models.quiet import quiet_transformers
from alignkit.packed import PackedBatch, Segment


def causal_model(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


ROUNDING = 64
"""Packed rows are filled up to a multiple of this, so that few shapes reach the matrix kernels:
each shape costs time at its first use and, on a CPU, memory for good."""


def round_up(batch: PackedBatch, multiple: int) -> PackedBatch:
    """The batch with unscored tokens appended as a segment of their own.

    Args:
        batch: `T` tokens.
        multiple: the new length is the next multiple of it.
    """
    extra = -batch.num_tokens % multiple
    if not extra:
        return batch
    return dataclasses.replace(
        batch,
        input_ids=np.concatenate([batch.input_ids, np.zeros(extra, np.int64)]),
        position_ids=np.concatenate([batch.position_ids, np.arange(extra)]),
        segments=(*batch.segments, Segment(batch.num_tokens, extra)),
    )


Reading = Literal["ends", "targets", "both"]
"""Where a scalar head reads: at the last token of each sequence; at the states that predict the
targets; or at these states, together with the log-probs."""

Scores = TokenScores | torch.Tensor | tuple[TokenScores, torch.Tensor]


class Scorer(nn.Module):
    """Base of all scorers: a model, what it scores with, and in which precision.

    Args:
        model: a transformers causal language model, or PEFT around one.
        dtype: compute precision; trainable weights may be stored wider.
        head: `[1, H]` scalar head; without one the scorer gives log-probs.
        reading: where the head reads.
        temperature: divides the logits, as sampling did.
    """

    def __init__(
        self,
        model: Any,
        dtype: torch.dtype,
        head: nn.Linear | None = None,
        *,
        reading: Reading = "ends",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.head = head
        self.reading = reading
        self.temperature = temperature
        widen_layer_norms(model)

    @property
    def causal(self) -> Any:
        """The transformers model inside."""
        return causal_model(self.model)

    @property
    def attention(self) -> str:
        """How rows are attended to, in words."""
        raise NotImplementedError

    def tensor(self, array: Any) -> torch.Tensor:
        """A numpy array on the model's device."""
        return on_device(array, next(self.causal.parameters()).device)

    def places(self, batch: PackedBatch, *, targets: bool) -> torch.Tensor:
        """Where states are among those that layers read; see `TokenScorer.places`."""
        raise NotImplementedError

    def rewards(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[S]` float32 rewards of `[S, H]` last hidden states."""
        assert self.head is not None
        with torch.autocast(hidden.device.type, enabled=False):
            # Row by row: a matrix-vector product rounds a row by its place among the others, and
            # equal responses would earn unequal rewards.
            rewards = (hidden.float() * self.head.weight[0].float()).sum(-1)
            return rewards if self.head.bias is None else rewards + self.head.bias.float()


class TokenScorer(Scorer):
    """Scores packed batches; the root module that accelerate wraps."""

    def __init__(
        self,
        model: Any,
        dtype: torch.dtype,
        head: nn.Linear | None = None,
        *,
        reading: Reading = "ends",
        temperature: float = 1.0,
    ) -> None:
        super().__init__(model, dtype, head, reading=reading, temperature=temperature)
        inner = self.causal
        with quiet_transformers():
            inner.set_attn_implementation(PACKED)
        use_fast_norms(inner)
        use_gated_products(inner)
        transform = logit_transform(inner.config.get_text_config())
        self.transform = dataclasses.replace(transform, temperature=temperature)

    @property
    def attention(self) -> str:
        """How rows are attended to, in words."""
        device = next(self.causal.parameters()).device.type
        return planned_attention(self.causal.config, device, self.dtype)

    def places(self, batch: PackedBatch, *, targets: bool) -> torch.Tensor:
        """`[N]` where the states that predict the targets are among those that layers read.

        Args:
            batch: `N` targets.
            targets: False gives the places of all tokens of all sequences instead, one sequence
                after another. What sequences share counts for each of them, so that neither
                depends on how documents are packed.
        """
        rows = batch.target_rows if targets else np.concatenate(sequence_rows(batch))
        return torch.from_numpy(rows)

    def forward(self, batch: PackedBatch) -> Scores:
        """Log-probs of the batch's targets, or what the head reads.

        Args:
            batch: `T` tokens, `N` targets, `S` sequences.

        Returns:
            `[N]` scores in the order of the batch's targets; with a head `[S]` float32 rewards,
            read at the last token of each sequence, or `[N]` float32 values at the targets, alone
            or after the scores.
        """
        batch = round_up(batch, ROUNDING)
        with compute_context(self.causal, self.dtype):
            prefix = prefix_states(self.model)
            before = 0 if prefix is None else prefix.shape[3]
            hidden = self.causal.get_decoder()(
                input_ids=self.tensor(batch.input_ids)[None],
                position_ids=self.tensor(batch.position_ids + before)[None],
                use_cache=False,
                segments=batch.segments,
                prefix_states=prefix,
            ).last_hidden_state[0]
            if self.head is not None and self.reading == "ends":
                return self.rewards(hidden.index_select(0, self.tensor(batch.sequence_ends)))
            picked = hidden.index_select(0, self.tensor(batch.target_rows))
            if self.head is not None and self.reading == "targets":
                return self.rewards(picked)
            head = self.causal.get_output_embeddings()
            scores = score_targets(picked, head, self.tensor(batch.target_ids), self.transform)
            return scores if self.head is None else (scores, self.rewards(picked))


@contextlib.contextmanager
def evaluating(scorer: nn.Module) -> Iterator[None]:
    """The scorer in evaluation mode and without gradients; its mode is restored afterwards."""
    was_training = scorer.training
    scorer.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        scorer.train(was_training)


def sum_by_sequence(logprobs: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Log-prob of each sequence's trained tokens together, log π(y|x) = Σ log π(y_t | x, y_<t).

    Args:
        logprobs: `[N]` of the batch's targets.
        batch: says which sequence each target belongs to.

    Returns:
        `[S]` sums, at most 0: float64, if the device has it. A float32 sum near -1,000 is 6e-5
        off, and objectives subtract two of them.
    """
    device, wide = logprobs.device, sum_dtype(logprobs.device)
    owners = on_device(batch.target_sequences, device)
    zeros = torch.zeros(batch.num_sequences, dtype=wide, device=device)
    return zeros.index_add(0, owners, logprobs.to(wide))


def sequence_rows(batch: PackedBatch) -> list[np.ndarray]:
    """Positions in the packed row of each sequence, its prompt included, in reading order."""
    rows = []
    by_end = {segment.start + segment.length - 1: segment for segment in batch.segments}
    for end in batch.sequence_ends:
        segment: Segment = by_end[int(end)]
        prefix = np.arange(segment.prefix_start, segment.prefix_start + segment.prefix_length)
        rows.append(np.concatenate([prefix, np.arange(segment.start, int(end) + 1)]))
    return rows
