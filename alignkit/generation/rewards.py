"""Reward sources of a recipe, except reward models, as functions from responses to numbers."""

from __future__ import annotations

from alignkit.generation.responses import Response, Score, checked
from alignkit.generation.reward_function import function_score
from alignkit.generation.reward_server import url_score
from alignkit.generation.rules import rule_score
from alignkit.recipe.addresses import hide_secrets
from alignkit.recipe.rewards import FunctionReward, RuleReward, UrlReward

__all__ = ["Response", "Score", "build_score", "checked"]


def build_score(spec: FunctionReward | UrlReward | RuleReward) -> Score:
    """The score that a recipe asks for, without its weight.

    Args:
        spec: a function, a server or a rule.

    Returns:
        A function from responses to one finite number for each; see `checked`. It raises
        RewardError where the source fails.

    Raises:
        RewardError: a function's file cannot be run or does not define it; a rule needs a package.
    """
    if isinstance(spec, FunctionReward):
        return function_score(spec)
    if isinstance(spec, UrlReward):
        return checked(hide_secrets(spec.url), url_score(spec))
    return checked(f"reward rule `{spec.rule}`", rule_score(spec))
