"""Bradley-Terry with a margin that every pair must reach, for reward models.

objective: {kind: custom, file: reward.py, name: loss, parameters: {least: 0.5}}
"""

import torch
import torch.nn.functional as F


def loss(
    chosen: torch.Tensor, rejected: torch.Tensor, margins: torch.Tensor, least: float
) -> torch.Tensor:
    """`[B]` losses of the `[B]` rewards of chosen and rejected completions.

    `margins` are those of the rows, 0 if a row has none.
    """
    return -F.logsigmoid(chosen - rejected - margins.clamp(min=least))
