"""Prompts -> responses of the policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from alignkit.data.documents import Branch, Document
from alignkit.data.prompts import Prompt, PromptSet
from alignkit.generation.rewards.responses import Response
from alignkit.generation.rollout import RolloutEngine
from alignkit.generation.sampled import SampledResponse


@dataclass(frozen=True)
class Rollout:
    """One prompt and its responses.

    Args:
        prompt: with its row.
        document: prompt and responses as tokens; a branch for each response.
        sampled: the responses, as they were sampled.
        texts: the responses without special tokens.
    """

    prompt: Prompt
    document: Document
    sampled: tuple[SampledResponse, ...]
    texts: tuple[str, ...]

    def responses(self) -> list[Response]:
        """What a reward source reads."""
        prompt = self.prompt
        return [
            Response(prompt.shown, text, prompt.columns, prompt.place, one.ids.tolist())
            for text, one in zip(self.texts, self.sampled, strict=True)
        ]


def sample(
    prompts: PromptSet,
    items: Sequence[int],
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seed: tuple[int, ...],
) -> list[Rollout]:
    """Responses to some prompts.

    Args:
        prompts: all of them.
        items: which ones.
        engine: samples.
        tokenizer: decodes.
        samples: responses to each.
        seed: of the random numbers, together with the item and the response's number.

    Returns:
        One rollout for each item, in order.
    """
    asked = [(item, number) for item in items for number in range(samples)]
    responses = engine.generate(
        [prompts.prompts[item].ids for item, _ in asked],
        [(*seed, item, number) for item, number in asked],
    )
    rollouts = []
    for position, item in enumerate(items):
        own = tuple(responses[position * samples : (position + 1) * samples])
        branches = tuple(Branch(c.ids.astype(np.int32), np.ones(len(c.ids), np.bool_)) for c in own)
        document = Document(prompts.prompts[item].ids, branches, int(item))
        texts = tuple(tokenizer.decode(c.ids, skip_special_tokens=True).strip() for c in own)
        rollouts.append(Rollout(prompts.prompts[item], document, own, texts))
    return rollouts


def response_rows(rollouts: Sequence[Rollout]) -> list[np.ndarray]:
    """For each rollout, the rows of its responses among all responses."""
    counts = [len(rollout.sampled) for rollout in rollouts]
    return np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])
