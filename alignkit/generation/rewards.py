"""Reward sources of a recipe, except reward models, as functions from responses to numbers."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

from alignkit.errors import RewardError
from alignkit.generation.responses import Response, Score, checked, shared_columns
from alignkit.generation.reward_function import function_score
from alignkit.generation.rules import rule_score
from alignkit.recipe.rewards import FunctionReward, RuleReward, UrlReward

__all__ = ["Response", "Score", "build_score", "checked"]

_PAUSE = 1.0
"""Seconds before an unreachable server is tried once more."""


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
        return checked(_shown(spec.url), url_score(spec))
    return checked(f"reward rule `{spec.rule}`", rule_score(spec))


def url_score(spec: UrlReward) -> Callable[[Sequence[Response]], Any]:
    """A server's scores.

    Args:
        spec: its address, and the seconds it may take.

    Returns:
        A function from at least one response to what the server returns as `scores`. A failed
        connection is tried once more; a late or wrong reply is not.
    """

    def run(responses: Sequence[Response]) -> Any:
        body = {
            "prompts": [response.prompt for response in responses],
            "completions": [response.text for response in responses],
            "columns": shared_columns(responses),
        }
        reply = _post(spec, json.dumps(body, default=str).encode())
        shown = _shown(spec.url)
        try:
            values = json.loads(reply)
        except (ValueError, RecursionError):
            raise RewardError(
                f"{shown}: must answer JSON, got {_start(reply)}", hint=_EXCHANGE
            ) from None
        if not isinstance(values, dict):
            raise RewardError(
                f"{shown}: must answer an object, got {type(values).__name__}", hint=_EXCHANGE
            )
        if "scores" not in values:
            keys = ", ".join(values) or "nothing in it"
            raise RewardError(
                f"{shown}: must answer an object with `scores`, got {keys}", hint=_EXCHANGE
            )
        return values["scores"]

    return run


_EXCHANGE = 'it gets {"prompts", "completions", "columns"} and answers {"scores": [0.5, …]}'


def _post(spec: UrlReward, body: bytes) -> bytes:
    request = urllib.request.Request(
        spec.url, data=body, headers={"Content-Type": "application/json"}, method="POST"
    )
    shown, reason = _shown(spec.url), ""
    for attempt in range(2):
        if attempt:
            time.sleep(_PAUSE)
        try:
            with urllib.request.urlopen(request, timeout=spec.timeout) as opened:
                reply: bytes = opened.read()
                return reply
        except urllib.error.HTTPError as error:
            raise RewardError(
                f"{shown}: answered HTTP {error.code} {error.reason}: {_body(error)}",
                hint="see the server's own log",
            ) from None
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(cause, TimeoutError):
                raise RewardError(
                    f"{shown}: gave no answer within {spec.timeout:g} seconds",
                    hint="raise reward.timeout, or lower rollout.prompts_per_step",
                ) from None
            reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    raise RewardError(
        f"{shown}: cannot be reached, tried twice: {reason}",
        hint="start the server, or check reward.url",
    )


def _body(error: urllib.error.HTTPError) -> str:
    try:
        return _start(error.read())
    except (OSError, http.client.HTTPException):
        return "no text"


def _shown(url: str) -> str:
    """The address without its query, which may hold a secret."""
    return url.partition("?")[0]


def _start(reply: bytes) -> str:
    text = " ".join(reply[:400].decode("utf-8", "replace").split())
    return repr(text if len(text) <= 120 else text[:117] + "...")
