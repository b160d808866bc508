"""The DPO loss (https://arxiv.org/abs/2305.18290, eq. 7), as a file that a recipe names:

objective: {kind: custom, file: dpo.py, name: loss, parameters: {beta: 0.1}, scale: 0.1}

`pairs` has, for B pairs, `[B]` log-probs of whole completions in nats: `chosen`, `rejected`; the
same under the reference model: `reference_chosen`, `reference_rejected`; their differences
`chosen_ratio`, `rejected_ratio`; and numbers of tokens: `chosen_tokens`, `rejected_tokens`.
"""

import torch
import torch.nn.functional as F


def loss(pairs, beta: float) -> torch.Tensor:
    """`[B]` losses, one for each pair; alignkit averages them over the whole optimizer step."""
    return -F.logsigmoid(beta * (pairs.chosen_ratio - pairs.rejected_ratio))
