"""This process among those of a run, and sums over all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator


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
