"""Sanity checks before the first step on sampled responses, on real prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from alignkit.data.documents import Branch, Document
from alignkit.errors import TrainingError
from alignkit.evaluation.intervals import mean_interval
from alignkit.generation.sampled import SampledResponse
from alignkit.objectives.ppo import log_ratio
from alignkit.rendering import render_chat
from alignkit.stages.rollouts.judging import Rewards
from alignkit.stages.rollouts.passes import group_rollouts
from alignkit.stages.rollouts.run import RolloutRun
from alignkit.stages.rollouts.sampling import Rollout
from alignkit.stages.rollouts.scoring import Scored, score_rollouts

PROMPTS = 4
"""Prompts of the dry run."""

ANSWERS = 64
"""The most answers of the data that are scored."""

DRY_RUN = 13
"""First number of the dry run's seed."""

DRIFT = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
"""Largest mean difference of log-probs between two correct passes, one with a cache, in nats."""

SAME = 1e-4
"""Largest log-ratio, in nats, of two passes that should be one."""


Backward = Callable[[RolloutRun, Sequence[Rollout], Scored, list[list[int]]], None]
"""Adds the gradients of made-up advantages of 1."""


def dry_run(
    run: RolloutRun, first_step: int, backward: Backward, trained: str
) -> tuple[list[Rollout], Rewards, float]:
    """Check the run on a few prompts; nothing changes.

    Args:
        run: what is checked.
        first_step: steps already done; a resumed policy may differ from the reference.
        backward: of the stage.
        trained: what gets gradients, in words.

    Returns:
        The responses, what they earned, and the seconds that sampling them took.

    Raises:
        TrainingError: the ratio is not 1, the KL is not 0, or weights other than the expected
            ones would be trained.
        RewardError: the reward cannot score responses.
    """
    prompts = run.rows.train
    items = list(range(min(PROMPTS, len(prompts))))
    started = time.monotonic()
    rollouts = run.collect(prompts, items, (run.seed, DRY_RUN))
    seconds = time.monotonic() - started
    rewards = run.score(rollouts)
    run.look(rewards, whole=False)
    groups = group_rollouts(rollouts, items, run.plan.microbatch_tokens)
    scored = score_rollouts(run.roles, rollouts, groups)[0]
    again = score_rollouts(run.roles, rollouts, groups)[0]
    ratio = _largest(log_ratio(again.policy, scored.policy))
    _must_vanish(ratio, "two passes of the policy over the same responses differ", "this is a bug")
    line = f"ratio 1 (largest log-ratio {ratio:.1g})"
    if first_step == 0 and run.roles.reference is not None:
        kl = _largest(scored.policy - scored.reference)
        _must_vanish(
            kl, "the policy differs from the reference before it is trained", "their weights differ"
        )
        line += f", KL 0 (largest difference {kl:.1g})"
    drift = (_sampled_logprobs(rollouts, scored) - scored.policy)[scored.mask].abs()
    _check_drift(float(drift.mean()), run.recipe.model.dtype)
    backward(run, rollouts, scored, groups)
    check_gradients(run)
    agree = f"{drift.mean():.1g} nats a token (at most {drift.max():.1g})"
    run.progress.say(
        f"before step {first_step + 1}: {line}, only {trained} gradients, sampling and scoring "
        f"agree to {agree}"
    )
    if first_step == 0:
        _say_reference_rewards(run)
    return rollouts, rewards, seconds


def _largest(values: torch.Tensor) -> float:
    return float(values.abs().max())


def _must_vanish(difference: float, what: str, why: str) -> None:
    if not difference <= SAME:
        raise TrainingError(
            f"{what}: by up to {difference:.3g} nats at a token",
            hint=f"{why}; set model.attention=sdpa, or report it",
        )


def _check_drift(mean: float, dtype: str) -> None:
    """Apart from rounding, the engine must sample from the distribution that is scored."""
    if not mean <= DRIFT[dtype]:
        raise TrainingError(
            f"sampling and scoring differ by {mean:.3g} nats a token, more than rounding to "
            f"{dtype} explains",
            hint="alignkit does not know how this model transforms its logits; please report it",
        )


def _sampled_logprobs(rollouts: Sequence[Rollout], scored: Scored) -> torch.Tensor:
    """Log-probs from the engine, in the places of the scored ones."""
    logprobs = scored.policy.clone()
    rows = [c for rollout in rollouts for c in rollout.sampled]
    for row, response in enumerate(rows):
        logprobs[row, : len(response.logprobs)] = torch.from_numpy(response.logprobs)
    return logprobs


def check_gradients(run: RolloutRun) -> None:
    """The losses must have reached the trained weights and no others; gradients are dropped.

    Args:
        run: after its losses' backward pass.

    Raises:
        TrainingError: they have not.
    """
    expected = {id(p) for _, p in (*run.roles.policy_weights, *run.roles.value_weights)}
    for name, weight in run.roles.trained.named_parameters():
        if (id(weight) in expected) != (weight.grad is not None):
            fault = "gets no gradient" if id(weight) in expected else "gets a gradient"
            raise TrainingError(
                f"{name} {fault} from the losses of {run.recipe.stage}",
                hint="this is a bug; please report it",
            )
    for part in run.updater.stepper.optimizers.parts.values():
        part.zero_grad(set_to_none=True)


def _end_of_turn(run: RolloutRun) -> int:
    """The token that ends an assistant turn in the chat template, else the tokenizer's EOS."""
    tokenizer, stops = run.rows.tokenizer, run.engine.settings.stop_tokens
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        text = render_chat(tokenizer, turns)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        end = next((i for i in reversed(ids) if i in stops), None)
        if end is not None:
            return int(end)
    return int(tokenizer.eos_token_id)


def _say_reference_rewards(run: RolloutRun) -> None:
    """Print what the data's own answers earn, if the rows have any."""
    chosen = [prompt for prompt in run.rows.train.prompts if prompt.answer][:ANSWERS]
    if not chosen or not run.engine.settings.stop_tokens:
        return
    end = _end_of_turn(run)
    answered = []
    for prompt in chosen:
        assert prompt.answer is not None
        ids = [*run.rows.tokenizer(prompt.answer, add_special_tokens=False)["input_ids"], end]
        tokens = np.asarray(ids, np.int64)
        branch = Branch(tokens.astype(np.int32), np.ones(len(tokens), np.bool_))
        response = SampledResponse(tokens, np.zeros(len(tokens), np.float32), "stop", 0.0)
        document = Document(prompt.ids, (branch,), 0)
        answered.append(Rollout(prompt, document, (response,), (prompt.answer,)))
    earned = run.score(answered)
    if not earned.known.any():
        run.progress.say("no reward applies to the data's own answers")
        return
    mean, low, high = mean_interval(earned.plain[earned.known].double().numpy())
    run.progress.say(
        f"the data's own answers earn {mean:.3f} ({low:.3f} to {high:.3f}, {len(chosen)} answers)"
    )
