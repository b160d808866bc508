"""What a run sets before its first product, seen in the kernels that are compiled again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from alignkit.runtime.processor import MAX_KERNELS

SHAPES = MAX_KERNELS + 40

PROGRAM = f"""
import torch
from alignkit.runtime.processor import tune_processor
tune_processor()
right = torch.ones(32, 32, dtype=torch.bfloat16)
for again in range(2):
    for rows in range(8, 8 + {SHAPES}):
        torch.ones(rows, 32, dtype=torch.bfloat16) @ right
"""


def compiled(**settings: str) -> int:
    """Kernels that are compiled for twice the same shapes."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ONEDNN_")}
    environment |= {"ONEDNN_VERBOSE": "all", "OMP_NUM_THREADS": "1", **settings}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.count("create:cache_miss")


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 products through oneDNN"
)
def test_kernels_are_kept_up_to_a_number_that_users_may_change() -> None:
    assert compiled() == 2 * SHAPES  # the oldest goes first, so each is gone when it comes again
    assert compiled(ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024") == SHAPES
