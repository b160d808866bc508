"""This process among those of a run, sums over all of them, and what all of them agree on."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from alignkit.runtime.devices import find_device

T = TypeVar("T")


def _keep(sums: torch.Tensor) -> torch.Tensor:
    return sums


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those of a run.

    Args:
        rank: of this process.
        world: number of processes.
        reduce: sums a tensor over the processes.
    """

    rank: int = 0
    world: int = 1
    reduce: Callable[[torch.Tensor], torch.Tensor] = _keep


SINGLE = ProcessGroup()
"""A single process."""


def process_group(accelerator: Accelerator) -> ProcessGroup:
    """The processes of a run, as accelerate started them."""
    if accelerator.num_processes == 1:
        return SINGLE
    return ProcessGroup(
        accelerator.process_index,
        accelerator.num_processes,
        lambda sums: accelerator.reduce(sums.to(accelerator.device), "sum").cpu(),
    )


def world_size() -> int:
    """Number of processes that were started together, before they know each other."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def agree(value: T) -> T:
    """The first process's value, in every process of the run.

    Args:
        value: of this process; it pickles.
    """
    if world_size() == 1:
        return value
    PartialState(cpu=find_device() == "cpu")  # what accelerate goes on with
    first: T = broadcast_object_list([value])[0]
    return first
