"""A server as a reward: it gets prompts, completions and columns, and answers scores."""

from __future__ import annotations

import json
from collections.abc import Sequence

from alignkit.errors import RewardError
from alignkit.generation.rewards.asking import post, start_of
from alignkit.generation.rewards.failures import Call
from alignkit.generation.rewards.responses import Response, Scores, numbers, shared_columns
from alignkit.recipe.addresses import LEFT_OUT, hide_secrets
from alignkit.recipe.rewards import UrlReward

_ROOM, _ROOM_EACH = 1 << 20, 1 << 16
"""Largest answer in bytes: for all, and for each response besides."""

_EXCHANGE = 'it gets {"prompts", "completions", "columns"} and answers {"scores": [0.5, …]}'


def url_call(spec: UrlReward) -> Call:
    """A server's scores; see `post`.

    Args:
        spec: its address.

    Returns:
        A function from at least one response and seconds to what the server returns as `scores`.

    Raises:
        RewardError: the address was read from a run folder, which does not keep its query.
    """
    shown = whole_address(spec.url, "reward.url")

    def run(responses: Sequence[Response], seconds: float) -> Scores:
        body = {
            "prompts": [response.prompt for response in responses],
            "completions": [response.text for response in responses],
            "columns": shared_columns(responses),
        }
        room = _ROOM + _ROOM_EACH * len(responses)
        sent = json.dumps(body, default=str).encode()
        reply = post(spec.url, sent, seconds=seconds, room=room)
        try:
            values = json.loads(reply)
        except (ValueError, RecursionError):
            raise RewardError(
                f"{shown}: must answer JSON, got {start_of(reply)}", hint=_EXCHANGE
            ) from None
        if not isinstance(values, dict):
            raise RewardError(
                f"{shown}: must answer an object, got {type(values).__name__}", hint=_EXCHANGE
            )
        if "scores" not in values:
            keys = ", ".join(values)[:120] or "nothing in it"
            raise RewardError(
                f"{shown}: must answer an object with `scores`, got {keys}", hint=_EXCHANGE
            )
        return Scores(numbers(shown, values["scores"], responses))

    return run


def whole_address(address: str, key: str) -> str:
    """An address as it may be shown.

    Args:
        address: of a server.
        key: of the recipe.

    Raises:
        RewardError: it was read from a run folder, which does not keep its query.
    """
    shown = hide_secrets(address)
    if address.endswith(f"?{LEFT_OUT}"):
        raise RewardError(
            f"{shown}: is not the whole address: a run does not store the query",
            hint=f"name the recipe that the run was started with, or give {key} in full",
        )
    return shown
