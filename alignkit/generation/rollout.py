"""Sampled responses with their log-probs: the engine that PPO and best-of-n draw from.

An engine takes token ids and gives token ids, log-probs and the reason each response ended. No
text is in between: what is trained is exactly what was sampled. Each response has its own random
numbers, so it does not depend on what else is in the batch, on the number of processes or on an
interruption; only the rounding of the batched products may.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

from alignkit.data.tokenize import answer_ends
from alignkit.generation.drawing import draw_tokens
from alignkit.models.attention.cached import (
    cached_forward,
    fill_cache,
    keep_rows,
    new_cache,
    round_up,
)
from alignkit.models.attention.prefix import has_window
from alignkit.models.base.fitness import require_token_rows
from alignkit.models.kernels.lora import fixed_factors
from alignkit.models.kernels.precision import compute_context, sum_dtype
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


@dataclass(frozen=True)
class SampledResponse:
    """One response.

    Args:
        ids: `[n]` sampled tokens, the stop token included.
        logprobs: `[n]` float32, of the sampled tokens under the sampling distribution.
        finish: `stop`, or `length` where it was cut off.
        entropy: mean entropy of the distributions it was sampled from, in nats.
    """

    ids: IntArray
    logprobs: npt.NDArray[np.float32]
    finish: Literal["stop", "length"]
    entropy: float


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
        settings, device = self.settings, next(self.inner.parameters()).device
        draws = np.stack(
            [np.random.default_rng(list(s)).random(settings.max_new_tokens) for s in seeds]
        )
        uniform = torch.from_numpy(draws).to(sum_dtype(device)).to(device)
        longest, before = max(map(len, prompts)), 0 if self.prefix is None else self.prefix.shape[3]
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        width = before + longest
        room = width + settings.max_new_tokens
        mask = torch.zeros(len(prompts), round_up(room), dtype=torch.bool)
        mask[:, :before] = True
        for row, prompt in enumerate(prompts):  # on the left, so that new tokens line up
            ids[row, longest - len(prompt) :] = torch.from_numpy(np.asarray(prompt, np.int64))
            mask[row, width - len(prompt) : room] = True
        ids, mask = ids.to(device), mask.to(device)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        layers = int(self.inner.config.get_text_config().num_hidden_layers)
        cache = new_cache(layers, room)
        if self.prefix is not None:
            fill_cache(cache, self.prefix.to(device, self.dtype), len(prompts))
        responses = _Responses(len(prompts), settings.max_new_tokens, device)
        live = torch.arange(len(prompts), device=device)
        stops = torch.tensor(sorted(settings.stop_tokens), device=device)
        columns = torch.arange(mask.shape[1], device=device)
        stopped = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        step_ids, start, look = ids, before, 1 if device.type == "cpu" else LOOK
        for step in range(settings.max_new_tokens):
            end = width + step
            seen = mask[:, : round_up(end)] & (columns[: round_up(end)] < end)
            logits = self._forward(step_ids, seen, positions[:, start:end], cache)
            chosen, *about = draw_tokens(logits, uniform[:, step])
            responses.add(step, live, chosen, *about)
            stopped |= torch.isin(chosen, stops)
            if (step + 1) % look == 0:
                count = len(live) - int(stopped.sum())
                if count == 0:
                    break
                if count <= COMPACT * len(live):
                    keep = (~stopped).nonzero()[:, 0]
                    live, chosen, uniform, stopped, mask, positions = (
                        x[keep] for x in (live, chosen, uniform, stopped, mask, positions)
                    )
                    keep_rows(cache, keep)
            step_ids, start = chosen[:, None], end
        return responses.sampled(settings.stop_tokens)

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any
    ) -> torch.Tensor:
        """`[B, V]` float32 logits after the last token of each row, divided by the temperature."""
        with compute_context(self.inner, self.dtype):
            hidden = self.inner.get_decoder()(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
            return next_logits(
                hidden.contiguous(), self.inner.get_output_embeddings(), self.transform
            )


class _Responses:
    """Responses being sampled, on the device. What a row adds after it has stopped is cut off."""

    def __init__(self, rows: int, tokens: int, device: torch.device) -> None:
        self.ids = torch.zeros(rows, tokens, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(rows, tokens, device=device)
        self.entropy = torch.zeros(rows, tokens, device=device)
        self.steps = 0

    def add(
        self,
        step: int,
        rows: torch.Tensor,
        chosen: torch.Tensor,
        logprobs: torch.Tensor,
        entropy: torch.Tensor,
    ) -> None:
        """Append one token to each of some rows."""
        for kept, new in ((self.ids, chosen), (self.logprobs, logprobs), (self.entropy, entropy)):
            kept.select(1, step).index_copy_(0, rows, new)
        self.steps = step + 1

    def sampled(self, stops: Collection[int]) -> list[SampledResponse]:
        """The responses of all rows, each up to its first stop token."""
        ids, logprobs, entropy = (
            x[:, : self.steps].cpu().numpy() for x in (self.ids, self.logprobs, self.entropy)
        )
        ends = np.isin(ids, list(stops))
        lengths = np.where(ends.any(1), ends.argmax(1) + 1, self.steps)
        return [
            SampledResponse(
                ids[row, :length].copy(),
                logprobs[row, :length].copy(),
                "stop" if ends[row].any() else "length",
                float(entropy[row, :length].astype(np.float64).mean()),
            )
            for row, length in enumerate(lengths.tolist())
        ]


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
