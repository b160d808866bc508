"""Rows and responses while they are sampled: tensors that stay in place on the device."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from alignkit.models.attention.cached import round_up
from alignkit.models.kernels.copies import on_device
from alignkit.models.kernels.precision import sum_dtype
from alignkit.packed import IntArray


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


@dataclass
class SampledRows:
    """Rows that are sampled, on the device.

    Args:
        ids: `[B, 1]` last tokens.
        live: `[B]` which of the responses each row is.
        stopped: `[B]` whether it has ended.
        mask: `[B, room]` True where a token is or will be.
        positions: `[B, room]` of each.
        uniform: `[B, new]` random numbers in [0, 1).
    """

    ids: torch.Tensor
    live: torch.Tensor
    stopped: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    uniform: torch.Tensor

    def only(self, keep: torch.Tensor) -> SampledRows:
        """These rows."""
        return SampledRows(**{name: value[keep] for name, value in vars(self).items()})


def start_rows(
    prompts: Sequence[npt.NDArray[np.integer[Any]]],
    seeds: Sequence[Sequence[int]],
    before: int,
    new: int,
    device: torch.device,
) -> tuple[torch.Tensor, SampledRows]:
    """Prompts, filled up on the left so that new tokens line up, and their rows.

    Args:
        prompts: token ids, at least one each.
        seeds: of each response's random numbers.
        before: tokens that come before every prompt.
        new: most tokens of a response.
        device: where they go.

    Returns:
        `[B, p]` ids of the prompts, and the rows before their first token.
    """
    draws = np.stack([np.random.default_rng(list(seed)).random(new) for seed in seeds])
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    room = before + longest + new
    mask = torch.zeros(len(prompts), round_up(room), dtype=torch.bool)
    mask[:, :before] = True
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(np.asarray(prompt, np.int64))
        mask[row, before + longest - len(prompt) : room] = True
    uniform = torch.from_numpy(draws).to(sum_dtype(device))
    ids, mask, uniform = (on_device(x.numpy(), device) for x in (ids, mask, uniform))
    return ids, SampledRows(
        ids=torch.zeros(len(prompts), 1, dtype=torch.int64, device=device),
        live=torch.arange(len(prompts), device=device),
        stopped=torch.zeros(len(prompts), dtype=torch.bool, device=device),
        mask=mask,
        positions=(mask.long().cumsum(1) - 1).clamp(min=0),
        uniform=uniform,
    )


class Responses:
    """Responses being sampled, on the device. What a row adds after it has stopped is cut off.

    Args:
        rows: number of responses.
        tokens: most tokens of one.
        stops: ids that end one.
        device: where they are.
    """

    def __init__(
        self, rows: int, tokens: int, stops: Collection[int], device: torch.device
    ) -> None:
        self.ids = torch.zeros(rows, tokens, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(rows, tokens, device=device)
        self.entropy = torch.zeros(rows, tokens, device=device)
        self.stops = np.asarray(sorted(stops), np.int64)
        self.ends = on_device(self.stops, device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.steps = 0

    def add(
        self,
        rows: torch.Tensor,
        chosen: torch.Tensor,
        logprobs: torch.Tensor,
        entropy: torch.Tensor,
    ) -> None:
        """Append one token to each of some rows.

        Args:
            rows: `[B]` which responses.
            chosen: `[B]` ids.
            logprobs: `[B]` of these.
            entropy: `[B]` of their distributions, in nats.
        """
        places = rows, self.step.expand(len(rows))
        for kept, new in ((self.ids, chosen), (self.logprobs, logprobs), (self.entropy, entropy)):
            kept.index_put_(places, new)
        self.step += 1
        self.steps += 1

    def sampled(self) -> list[SampledResponse]:
        """The responses of all rows, each up to its first stop token."""
        ids, logprobs, entropy = (
            x[:, : self.steps].cpu().numpy() for x in (self.ids, self.logprobs, self.entropy)
        )
        ends = np.isin(ids, self.stops)
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
