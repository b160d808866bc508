"""Sampled responses with their log-probs: the engine that PPO and best-of-n draw from.

An engine takes token ids and gives token ids, log-probs and the reason each response ended. No
text is in between: what is trained is exactly what was sampled. Each response has its own random
numbers, so it does not depend on what else is in the batch, on the number of processes or on an
interruption; only the rounding of the batched products may.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

from alignkit.data.tokenize import answer_ends
from alignkit.generation.drawing import draw_tokens
from alignkit.generation.sampled import Responses, SampledResponse, SampledRows, start_rows
from alignkit.models.attention.cached import GrowingCache, cached_forward
from alignkit.models.attention.prefix import has_window
from alignkit.models.base.fitness import require_token_rows
from alignkit.models.kernels.copies import on_device
from alignkit.models.kernels.factors import fixed_factors
from alignkit.models.kernels.precision import compute_context
from alignkit.models.kernels.vocab_head import logit_transform, next_logits
from alignkit.packed import IntArray

COMPACT = 0.75
"""Finished rows leave the batch once at most this share of it is still running."""

LOOK = 8
"""Tokens after which a device is asked which rows have stopped: each question waits for it."""


@dataclass(frozen=True)
class RolloutSettings:
    """How responses are sampled.

    Args:
        max_new_tokens: longest response in tokens, the stop token included; at least 1.
        temperature: divides the logits, above 0. Nothing else shapes the distribution, so the
            log-probs are those of the sampling distribution.
        stop_tokens: ids that end a response.
    """

    max_new_tokens: int
    temperature: float
    stop_tokens: frozenset[int]


class RolloutEngine(Protocol):
    """Whatever samples responses: this process, or a server."""

    def generate(
        self, prompts: Sequence[npt.NDArray[np.integer[Any]]], seeds: Sequence[Sequence[int]]
    ) -> list[SampledResponse]:
        """One response to each prompt.

        Args:
            prompts: token ids, at least one each.
            seeds: of each response's random numbers.
        """
        ...


class TransformersEngine:
    """Batched sampling with a key-value cache in this process.

    Args:
        inner: transformers causal model; the caller sets its adapters.
        dtype: compute precision.
        settings: lengths, temperature, stop tokens.
        budget: tokens of one batch, prompts and room for responses together.
        prefix: `[L, 2, K, P, D]` keys and values of each layer that come before every prompt.
    """

    def __init__(
        self,
        inner: Any,
        dtype: torch.dtype,
        settings: RolloutSettings,
        budget: int = 16384,
        prefix: torch.Tensor | None = None,
    ) -> None:
        self.inner, self.dtype, self.settings, self.budget = inner, dtype, settings, budget
        self.prefix, self.alike = prefix, prefix is not None and has_window(inner.config)
        transform = logit_transform(inner.config.get_text_config())
        self.transform = replace(transform, temperature=settings.temperature)

    def generate(
        self, prompts: Sequence[npt.NDArray[np.integer[Any]]], seeds: Sequence[Sequence[int]]
    ) -> list[SampledResponse]:
        """See `RolloutEngine.generate`. Prompts of similar length share a batch."""
        for prompt in prompts:
            require_token_rows(self.inner.config, prompt, "a prompt")
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
        responses: dict[int, SampledResponse] = {}
        was_training = self.inner.training
        self.inner.eval()
        try:
            with torch.no_grad(), cached_forward(self.inner), fixed_factors(self.inner):
                for batch in self._batches([len(prompts[i]) for i in order]):
                    rows = [order[position] for position in batch]
                    sampled = self._sample([prompts[i] for i in rows], [seeds[i] for i in rows])
                    responses.update(zip(rows, sampled, strict=True))
        finally:
            self.inner.train(was_training)
        return [responses[i] for i in range(len(prompts))]

    def _batches(self, lengths: Sequence[int]) -> list[range]:
        """Consecutive rows that fit the budget with their room; lengths are in falling order."""
        batches, start = [], 0
        while start < len(lengths):
            room = lengths[start] + self.settings.max_new_tokens
            stop = min(len(lengths), start + max(1, self.budget // room))
            if self.alike:
                stop = min(stop, start + lengths[start:].count(lengths[start]))
            batches.append(range(start, stop))
            start = stop
        return batches

    def _sample(
        self, prompts: Sequence[npt.NDArray[np.integer[Any]]], seeds: Sequence[Sequence[int]]
    ) -> list[SampledResponse]:
        settings = self.settings
        rows, responses, cache = self.begin(prompts, seeds)
        look = 1 if rows.ids.device.type == "cpu" else LOOK
        for step in range(1, settings.max_new_tokens):
            if step % look == 0:
                count = len(rows.live) - int(rows.stopped.sum())
                if count == 0:
                    break
                if count <= COMPACT * len(rows.live):
                    keep = (~rows.stopped).nonzero()[:, 0]
                    rows = rows.only(keep)
                    cache.keep(keep)
            self.next_token(rows, responses, cache)
        return responses.sampled()

    def begin(
        self, prompts: Sequence[npt.NDArray[np.integer[Any]]], seeds: Sequence[Sequence[int]]
    ) -> tuple[SampledRows, Responses, GrowingCache]:
        """Read the prompts and draw the first token of each response.

        A prompt that stands there several times in a row is read once.

        Args:
            prompts: token ids, at least one each.
            seeds: of each response's random numbers.
        """
        settings, device = self.settings, next(self.inner.parameters()).device
        before = 0 if self.prefix is None else self.prefix.shape[3]
        ids, rows = start_rows(prompts, seeds, before, settings.max_new_tokens, device)
        width = before + ids.shape[1]
        layers = int(self.inner.config.get_text_config().num_hidden_layers)
        first, owners = _once(prompts)
        room = width + settings.max_new_tokens
        alone = len(first) == len(prompts)
        cache = GrowingCache(layers, room if alone else width)
        if self.prefix is not None:
            cache.fill(self.prefix.to(device, self.dtype), len(first))
        responses = Responses(len(prompts), settings.max_new_tokens, settings.stop_tokens, device)
        mask, positions = rows.mask, rows.positions[:, before:width]
        if not alone:
            one, each = (on_device(places, device) for places in (first, owners))
            ids, mask, positions = (x[one] for x in (ids, mask, positions))
        logits = self._forward(ids, mask, positions, cache)
        cache.advance(ids.shape[1])
        if not alone:
            logits, cache = logits[each], cache.spread(each, room)
        self._take(logits, rows, responses)
        return rows, responses, cache

    def next_token(self, rows: SampledRows, responses: Responses, cache: GrowingCache) -> None:
        """One more token of every row: no number of the host decides what the device does.

        Args:
            rows: changed in place.
            responses: the token is added.
            cache: likewise.
        """
        positions = rows.positions.index_select(1, cache.store.place)
        logits = self._forward(rows.ids, rows.mask, positions, cache)
        cache.advance(1)
        self._take(logits, rows, responses)

    def _take(self, logits: torch.Tensor, rows: SampledRows, responses: Responses) -> None:
        """Draw the next token of every row from `[B, V]` logits."""
        uniform = rows.uniform.index_select(1, responses.step)[:, 0]
        chosen, *about = draw_tokens(logits, uniform)
        rows.stopped |= (chosen[:, None] == responses.ends).any(1)
        rows.ids.copy_(chosen[:, None])
        responses.add(rows.live, chosen, *about)

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: GrowingCache
    ) -> torch.Tensor:
        """`[B, V]` float32 logits after the last token of each row, divided by the temperature."""
        width, _ = cache.get_mask_sizes(ids.shape[1], 0)
        with compute_context(self.inner, self.dtype):
            hidden = self.inner.get_decoder()(
                input_ids=ids,
                attention_mask=mask[:, :width],  # what is not written yet lies ahead of the token
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
            return next_logits(
                hidden.contiguous(), self.inner.get_output_embeddings(), self.transform
            )


def _once(prompts: Sequence[npt.NDArray[np.integer[Any]]]) -> tuple[IntArray, IntArray]:
    """The first of each run of equal prompts, and for each prompt which of these it is."""
    new = [
        number == 0 or not np.array_equal(prompt, prompts[number - 1])
        for number, prompt in enumerate(prompts)
    ]
    return np.flatnonzero(new), np.cumsum(new) - 1


def stop_tokens(inner: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end a response: those of the model's generation settings and `answer_ends`.

    Args:
        inner: transformers model.
        tokenizer: its tokenizer.
    """
    named = getattr(inner.generation_config, "eos_token_id", None)
    ids: Sequence[int | None] = named if isinstance(named, list) else [named]
    rows = inner.config.get_text_config().vocab_size  # a file may name ids beyond it
    every: list[Any] = [*ids, *answer_ends(tokenizer)]
    return frozenset(i for i in every if type(i) is int and 0 <= i < rows)
