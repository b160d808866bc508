"""The `rollout` and `guard` sections: sampling, and keeping the policy near its reference."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from alignkit.recipe.section import Positive, PositiveInt, Section, Temperature


class RolloutSpec(Section):
    """How responses are sampled."""

    prompts_per_step: PositiveInt = 32
    """Prompts per step, over all processes together."""
    samples_per_prompt: PositiveInt = 1
    """Responses per prompt."""
    max_new_tokens: PositiveInt = 64
    """Longest response in tokens, including its end-of-turn token."""
    temperature: Temperature = 1.0
    """Divides the logits, in sampling and in scoring alike."""
    missing_eos_penalty: Annotated[float, Field(ge=0.0)] | None = 1.0
    """Subtracted from the reward of a response that was cut off; null for no penalty."""
    samples_every: PositiveInt = 10
    """Steps between writes of sample responses and their rewards to samples.jsonl."""


class GuardSpec(Section):
    """What happens when the policy moves too far from the reference."""

    max_kl: Positive | None = None
    """Mean KL per response, in nats, above which the guard acts; null only reports."""
    action: Literal["stop", "raise_kl"] = "stop"
    """`stop` saves a checkpoint and ends the run; `raise_kl` multiplies kl_coef by 1.5."""


ROLLOUT_HINTS = {
    "reward": "as in {model: runs/reward}, {function: rewards.py:score}, {rule: exact}, "
    "{url: …} or {judge: …, model: …, rubric: …}; several are a list of these, each with a weight",
    "reward.pattern": "a Python regular expression; a backslash before . ( ) [ ] { } + * ? matches "
    "the character itself",
    "reward.max": "longest length that scores 1, as in {rule: length, max: 50}",
    "reward.weight": "1 is usual; a negative one turns a reward into a penalty",
    "reward.timeout": "seconds; 60 is usual",
    "reward.tolerance": "relative to the correct number: 0.01 accepts an error of 1%",
    "reward.on_failure": "stop, zero or skip",
    "reward.messages": "true gives completions as TRL's functions want them",
    "reward.judge": "the API of an OpenAI-compatible server, as in http://localhost:8000/v1",
    "reward.rubric": "what a good response is, in words, or a .md or .txt file",
    "reward.name": "letters, digits, - and _, as in name: helpful",
    "reward.api_key": "the name of an environment variable, as in OPENAI_API_KEY",
    "task": "as in {rule: numeric} or {function: rewards.py:correct}",
    "rollout": "as in {prompts_per_step: 32, max_new_tokens: 64}",
    "rollout.prompts_per_step": "prompts per step over all processes; 16 to 512 is usual",
    "rollout.samples_per_prompt": "1 is usual",
    "rollout.max_new_tokens": "tokens of a response; 32 to 1024 is usual",
    "rollout.temperature": "1 is usual and samples from the unchanged policy",
    "rollout.missing_eos_penalty": "1 is usual; null for no penalty on a response that was cut off",
    "guard": "as in {max_kl: 20, action: stop}",
    "guard.max_kl": "in nats per response; null only reports",
}
"""Key -> hint for a value that breaks a rule."""
