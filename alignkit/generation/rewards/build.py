"""Reward sources of a recipe, except reward models, as functions from responses to scores."""

from __future__ import annotations

from alignkit.generation.rewards.failures import tolerant
from alignkit.generation.rewards.function import function_call
from alignkit.generation.rewards.judge import judge_score
from alignkit.generation.rewards.mathematics import math_score
from alignkit.generation.rewards.programs import code_score
from alignkit.generation.rewards.responses import Score, checked
from alignkit.generation.rewards.rules import rule_score
from alignkit.generation.rewards.schema import schema_score
from alignkit.generation.rewards.server import url_call
from alignkit.recipe.rewards import FunctionReward, JudgeReward, UrlReward
from alignkit.recipe.rules import CodeReward, JsonSchemaReward, MathReward, RuleReward

TextReward = FunctionReward | UrlReward | JudgeReward | RuleReward
"""Sources that read the responses as text."""


def build_score(spec: TextReward) -> Score:
    """The score that a recipe asks for, without its weight.

    Args:
        spec: a function, a server, a judge or a rule.

    Returns:
        A function from responses to their scores; see `checked`. It raises RewardError where the
        source fails and the recipe does not say otherwise.

    Raises:
        RewardError: a function's file cannot be run or does not define it; a rule needs a package.
    """
    if isinstance(spec, FunctionReward):
        call = function_call(spec)
        return tolerant(call, timeout=spec.timeout, on_failure=spec.on_failure)
    if isinstance(spec, UrlReward):
        return tolerant(url_call(spec), timeout=spec.timeout, on_failure=spec.on_failure)
    if isinstance(spec, JudgeReward):
        return judge_score(spec)
    if isinstance(spec, MathReward):
        return checked("reward rule `math`", math_score(spec))
    if isinstance(spec, CodeReward):
        return checked("reward rule `code`", code_score(spec))
    if isinstance(spec, JsonSchemaReward):
        return checked("reward rule `json_schema`", schema_score(spec))
    return checked(f"reward rule `{spec.rule}`", rule_score(spec))
