"""Several responses to each prompt and their rewards: for best-of-n and preference pairs.

All are sampled before the reward model is loaded, so only one of the two models is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from alignkit.data.prompts import Prompt, PromptSet
from alignkit.data.report import DataReport
from alignkit.errors import ModelError, RewardError
from alignkit.evaluation.columns import MAX_TOKENS
from alignkit.generation.answers import Turns, render_prompt
from alignkit.generation.rollout import RolloutSettings, TransformersEngine, stop_tokens
from alignkit.models.adapters.switching import POLICY, Role
from alignkit.models.attention.prefix import prefix_length, prefix_states
from alignkit.models.base.loading import DTYPES, load_tokenizer
from alignkit.models.opening import OpenModel, open_language_model, open_model
from alignkit.models.scoring.scorer import causal_model
from alignkit.models.scoring.selfcheck import build_scorer
from alignkit.recipe.stages.rollouts import SAMPLING_TOKENS
from alignkit.runtime.devices import find_device
from alignkit.runtime.processes import SINGLE
from alignkit.runtime.tuning import tune_device
from alignkit.stages.rollouts.judging import Judge, RewardPart, ScoringModel
from alignkit.stages.rollouts.reward_models import check_tokens, require_reward_model
from alignkit.stages.rollouts.sampling import Rollout, sample

_PROMPTS = 64
"""Prompts that are answered between two lines of progress."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Candidate:
    """One response with its reward.

    Args:
        text: without special tokens.
        reward: raw, at its last token.
        tokens: that were sampled, the stop token included.
        finish: `stop`, or `length` if it was cut off.
    """

    text: str
    reward: float
    tokens: int
    finish: Literal["stop", "length"]


@dataclass(frozen=True)
class SampleSettings:
    """How many responses are sampled, and how.

    Args:
        samples: responses to each prompt, from 1.
        max_new_tokens: of a response at most, from 1.
        temperature: divides the logits, above 0.
        seed: of the sampling; each response has random numbers of its own.
        dtype: of the weights and of the computation.
    """

    samples: int
    max_new_tokens: int
    temperature: float
    seed: int
    dtype: str


def open_answering(model: str, reward: str, dtype: str, base: str | None = None) -> OpenModel:
    """The model that answers, after a check that the reward model can judge its tokens.

    Args:
        model: anything that writes text.
        reward: a reward model.
        dtype: of the weights.
        base: of an adapter that names another.

    Raises:
        ModelError: either is not what it should be, or their tokens differ.
    """
    tune_device()
    place = require_reward_model(reward)
    opened = open_language_model(model, dtype=DTYPES[dtype], device=find_device(), base=base)
    check_tokens(reward, load_tokenizer(place), opened.tokenizer)
    return opened


def prompts_of(opened: OpenModel, conversations: Sequence[Turns]) -> PromptSet:
    """Conversations as prompts, tokenized as `generate_answers` does.

    Args:
        opened: model and tokenizer.
        conversations: turns that end with the user's.
    """
    prompts = []
    for number, turns in enumerate(conversations, start=1):
        plain = not opened.tokenizer.chat_template
        ids = opened.tokenizer(render_prompt(opened, turns), add_special_tokens=plain)["input_ids"]
        prompts.append(Prompt(np.asarray(ids, np.int32), turns, None, {}, f"prompt {number}"))
    return PromptSet(tuple(prompts), DataReport(prompts=True), "")


def room_for_prompts(opened: OpenModel, max_new_tokens: int) -> int:
    """Longest prompt in tokens that leaves room for a response in the model's context.

    Raises:
        ModelError: no prompt fits.
    """
    context = getattr(opened.model.config.get_text_config(), "max_position_embeddings", None)
    room = int(context or 10**9) - max_new_tokens - prefix_length(opened.model)
    if room < 2:
        raise ModelError(
            f"{max_new_tokens} new tokens leave no room for a prompt in the context of "
            f"{opened.name}, which is {context}",
            hint="lower max_new_tokens",
        )
    return room


def sample_answers(
    opened: OpenModel, prompts: PromptSet, settings: SampleSettings, say: Say
) -> list[Rollout]:
    """Responses to every prompt, not yet judged.

    Args:
        opened: model and tokenizer.
        prompts: at least one; each leaves room for its responses.
        settings: of the sampling. Response `k` to a prompt does not depend on how many there are.
        say: gets lines of progress.

    Returns:
        One rollout for each prompt, in order.
    """
    inner = causal_model(opened.model)
    stops = stop_tokens(inner, opened.tokenizer)
    limits = RolloutSettings(settings.max_new_tokens, settings.temperature, stops)
    prefix = prefix_states(opened.model)
    engine = TransformersEngine(inner, DTYPES[settings.dtype], limits, SAMPLING_TOKENS, prefix)
    rollouts: list[Rollout] = []
    for items in _blocks(len(prompts), _PROMPTS):
        rollouts += sample(
            prompts,
            items,
            engine,
            opened.tokenizer,
            samples=settings.samples,
            seed=(settings.seed,),
        )
        if len(prompts) > _PROMPTS:
            say(f"{len(rollouts):,} of {len(prompts):,} prompts answered")
    return rollouts


def judge_answers(
    rollouts: Sequence[Rollout], reward: str, dtype: str, say: Say
) -> list[tuple[Candidate, ...]]:
    """The responses to each prompt with their rewards, in the order in which they were sampled.

    Args:
        rollouts: at least one, in the reward model's tokens.
        reward: a reward model.
        dtype: of its weights and of the computation.
        say: gets a line if packed rows cannot be used.

    Raises:
        RewardError: a reward is not finite.
    """
    opened = open_model(reward, dtype=DTYPES[dtype], device=find_device())
    scorer: Any = build_scorer(opened.model, DTYPES[dtype], "auto", say, opened.head).eval()
    part = RewardPart("model", 1.0, ScoringModel(Role(scorer, POLICY), 0.0, 1.0))
    judge = Judge((part,), None, MAX_TOKENS, SINGLE)
    candidates = []
    for items in _blocks(len(rollouts), _PROMPTS):
        block = [rollouts[item] for item in items]
        try:
            rewards = iter(judge(block).plain.tolist())
        except RewardError as error:
            hint = f"its weights or those of the answering model have diverged; look at {reward}"
            raise RewardError(error.message, hint=hint) from None
        for rollout in block:
            pairs = zip(rollout.texts, rollout.sampled, strict=True)
            own = (Candidate(t, next(rewards), len(c.ids), c.finish) for t, c in pairs)
            candidates.append(tuple(own))
    return candidates


def _blocks(count: int, size: int) -> Iterator[range]:
    return (range(start, min(count, start + size)) for start in range(0, count, size))


def best_of(
    opened: OpenModel, conversations: Sequence[Turns], settings: SampleSettings, say: Say
) -> list[Rollout]:
    """Responses to conversations, for `judge_answers`.

    Raises:
        ModelError: a prompt does not fit the model's context.
    """
    prompts, room = prompts_of(opened, conversations), room_for_prompts(opened, 0)
    longest = max(len(prompt.ids) for prompt in prompts.prompts)
    if longest + settings.max_new_tokens > room:
        raise ModelError(
            f"a prompt of {longest} tokens and {settings.max_new_tokens} new ones do not fit the "
            f"model's context of {room}",
            hint="shorten the prompt, or lower --max-new-tokens",
        )
    return sample_answers(opened, prompts, settings, say)
