"""Rules for stages that sample: rewards, groups of responses, and the losses of GRPO."""

from __future__ import annotations

import math
from typing import Any

from alignkit.recipe.importing.fields import Foreign, Rule, Settings
from alignkit.recipe.importing.sources import place

_RULES: dict[str, Settings] = {
    "accuracy_reward": {"rule": "math", "column": "solution"},
    "reasoning_accuracy_reward": {"rule": "math", "column": "solution"},
    "think_format_reward": {"rule": "format", "pattern": r"<think>.*</think>.*"},
}
"""Reward functions that TRL ships -> the rule that does the same."""

_LOSSES = {
    "dapo": {"loss": "token_mean"},
    "bnpo": {"loss": "token_mean"},
    "grpo": {"loss": "sequence_mean"},
    "dr_grpo": {"loss": "constant"},
    "cispo": {"kind": "cispo"},
}
_TIMES = "gradient_accumulation_steps"
_ADVANTAGES = {
    **dict.fromkeys(("group", "true"), "group_std"),
    **dict.fromkeys(("none", "false"), "centered"),
    "batch": "batch_std",
}

_COUNTED = tuple(
    f"training.{name}"
    for name in ("max_steps", "warmup", "decay", "eval_every", "save_every", "log_every")
)
"""Keys that count steps."""


def rewards(functions: str, weights: str, model: str = "") -> Rule:
    """Sources of rewards: a reward model, Python functions, or rules.

    Args:
        functions: their key of the list of functions.
        weights: of the list of weights, in the order of model and functions.
        model: of the reward model; empty if there is no such key.
    """

    def run(foreign: Foreign, _: str) -> Settings:
        sources: list[Settings] = []
        if model and foreign.text(model):
            name = foreign.text(model)
            foreign.differ(model, "must be a run of `alignkit reward`, or its adapter/ or merged/")
            sources.append({"model": name})
        for name in foreign.names(functions):
            sources.append(_function(foreign, functions, name, len(sources)))
        if foreign.get(weights) is not None:
            given = foreign.get(weights)
            given = given if isinstance(given, list) else [given]
            if len(given) != len(sources):
                foreign.wrong(weights, f"must have {len(sources)} weights, one a reward")
            for source, weight in zip(sources, given, strict=True):
                source["weight"] = _number(foreign, weights, weight)
        if not sources:
            return {}
        return {"reward": sources[0] if len(sources) == 1 else sources}

    return Rule(("reward",), run)


def _number(foreign: Foreign, key: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        foreign.wrong(key, "must hold numbers")


def _function(foreign: Foreign, key: str, name: str, index: int) -> Settings:
    if name in _RULES:
        if name == "accuracy_reward" or name == "reasoning_accuracy_reward":
            foreign.differ(key, f"{name}: the last expression is compared, wherever it stands")
        return dict(_RULES[name])
    module, dot, function = name.rpartition(".")
    if not dot:
        foreign.wrong(
            key,
            f"names {name}, for which alignkit has no rule",
            hint="name your own as rewards.score for score in rewards.py; length penalties are "
            "objective: {overlong: penalize}",
        )
    path = f"{module.replace('.', '/')}.py"
    many = len(foreign.names(key)) > 1 or index > 0
    where = ("reward", index, "function") if many else ("reward", "function")
    return {"function": f"{place(foreign, path, where)}:{function}", "messages": True}


def groups(micro: str, accumulate: str, group: str) -> Rule:
    """Prompts of a step, responses to each, and updates: there a batch counts responses.

    Args:
        micro: their key of responses in a pass.
        accumulate: of passes in an optimizer step.
        group: of responses to a prompt.
    """

    def run(foreign: Foreign, _: str) -> Settings:
        processes, size = foreign.processes or 1, foreign.whole(group)
        one_step = foreign.whole(micro) * foreign.whole(accumulate) * processes
        sampled, key = one_step, ""
        if foreign.get("generation_batch_size") is not None:
            key, sampled = "generation_batch_size", foreign.whole("generation_batch_size")
        elif foreign.get("steps_per_generation") is not None:
            key = "steps_per_generation"
            sampled = foreign.whole(micro) * foreign.whole(key) * processes
        if size < 1 or sampled < size or sampled % size:
            foreign.wrong(
                group, f"must divide the {sampled} responses of a step", "give --processes N"
            )
        sampled = _whole_steps(foreign, key, sampled, one_step)
        settings: Settings = {
            "rollout.prompts_per_step": sampled // size,
            "rollout.samples_per_prompt": size,
        }
        if sampled > one_step:
            settings["objective.minibatches"] = sampled // one_step
        if foreign.processes is None:
            foreign.differ(micro, "counted for one process; give --processes N if there are more")
        foreign.differ(micro, "counts responses there; here a step counts prompts")
        return settings

    return Rule(
        ("rollout.prompts_per_step", "rollout.samples_per_prompt", "objective.minibatches"), run
    )


def _whole_steps(foreign: Foreign, key: str, sampled: int, one_step: int) -> int:
    """Responses that a step here samples: at least those of an optimizer step.

    Args:
        foreign: gets a note where an optimizer step there samples several times.
        key: theirs that says how many are sampled at once; empty if none does.
        sampled: that many.
        one_step: responses of an optimizer step.
    """
    if one_step < 1 or (sampled % one_step and one_step % sampled):
        foreign.wrong(
            key or _TIMES,
            f"samples {sampled} responses at once, and an optimizer step reads {one_step}: one "
            "must be a multiple of the other",
            "a step here samples once, and makes a whole number of updates",
        )
    if sampled >= one_step:
        return sampled
    if foreign.get("num_iterations") not in (None, 1, "1"):
        foreign.wrong(
            key,
            "makes an optimizer step read the same responses several times, with num_iterations",
            "alignkit makes a step for each reading: sample those of a whole step",
        )
    foreign.differ(
        key,
        f"a step there samples {one_step // sampled} times {sampled} responses with the same "
        f"weights; here it samples the {one_step} at once",
    )
    return one_step


def responses(most: str, prompt: str) -> Rule:
    """Lengths of responses and prompts.

    Args:
        most: their key of tokens of a response.
        prompt: of tokens of a prompt.
    """

    def run(foreign: Foreign, _: str) -> Settings:
        longest = foreign.whole(most)
        settings: Settings = {"rollout.max_new_tokens": longest}
        if foreign.get(prompt) is not None:
            settings["data.max_length"] = longest + foreign.whole(prompt)
            return settings | {"data.too_long": "truncate_left"}
        foreign.differ("", "prompts of more than 1024 tokens are dropped and counted")
        return settings | {"data.max_length": longest + 1024}

    return Rule(("rollout.max_new_tokens", "data.max_length", "data.too_long"), run)


def group_loss(loss: str, scale: str, low: str, high: str) -> Rule:
    """The objective of GRPO: kind, loss, advantage and clipping.

    Args:
        loss: their key of the loss.
        scale: of what advantages are divided by.
        low: of the clip below.
        high: of the clip above.
    """

    def run(foreign: Foreign, _: str) -> Settings:
        rloo = foreign.script == "rloo"
        name = "rloo" if rloo else foreign.text(loss) or "dapo"
        if not rloo and name not in _LOSSES:
            foreign.wrong(
                loss, "names a loss that alignkit does not have", f"known: {', '.join(_LOSSES)}"
            )
        settings: Settings = {"objective.kind": "rloo" if rloo else "grpo"}
        settings |= {f"objective.{k}": v for k, v in _LOSSES.get(name, {}).items()}
        divided = str(foreign.get(scale)).lower()
        if not rloo and foreign.get(scale) is not None:
            if divided not in _ADVANTAGES:
                foreign.wrong(scale, "must be group, batch or none")
            settings["objective.advantage"] = _ADVANTAGES[divided]
        if foreign.get(low) is not None:
            below = foreign.number(low)
            above = foreign.number(high) if foreign.get(high) is not None else below
            settings["objective.clip"] = [None if name == "cispo" else below, above]
        if name == "bnpo":
            foreign.differ(loss, "averaged over the tokens of the step, not of each pass")
        return settings

    return Rule(("objective.kind", "objective.loss", "objective.advantage", "objective.clip"), run)


def overlong(key: str) -> Rule:
    """Whether responses that are cut off are left out of the loss."""

    def run(foreign: Foreign, _: str) -> Settings:
        return {"objective.overlong": "mask"} if foreign.flag(key) else {}

    return Rule(("objective.overlong",), run)


def in_rollouts(foreign: Foreign, key: str, made: Settings, before: Settings) -> Settings:
    """What a rule has made, with its steps counted in rollouts.

    For GRPO the others count optimizer steps, of which a rollout here has several. LLaMA-Factory's
    PPO counts rollouts, as alignkit does.

    Args:
        foreign: gets a note of what has been divided.
        key: theirs, that the rule has read.
        made: by the rule; a share of the steps stays.
        before: what other rules have made, the updates of a rollout among them.
    """
    updates = before.get("objective.epochs", 1) * before.get("objective.minibatches", 1)
    if foreign.stage != "grpo" or updates < 2:
        return made
    counted = dict(made)
    for ours in made.keys() & _COUNTED:
        steps = made[ours]
        if steps is None or isinstance(steps, bool) or steps < 1:
            continue
        counted[ours] = math.ceil(steps / updates)
        foreign.differ(
            key,
            f"{ours}: {steps} optimizer steps there are {counted[ours]} here, where a step is a "
            f"rollout and its {updates} updates",
        )
    return counted
