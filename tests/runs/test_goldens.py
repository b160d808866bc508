"""What every stage computes stays the same, to the bit, unless a change means to move it.

After such a change: `python tests/golden/record.py --write`, and state in the commit by how much.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RECORD = Path(__file__).parent.parent / "golden" / "record.py"
STORED: dict[str, Any] = json.loads(RECORD.with_name("stages.json").read_text(encoding="utf-8"))

LOSS_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
"""Of losses, between machines whose kernels round differently. Rounding to bfloat16 moves a loss by
parts in a thousand, and three steps at this learning rate by a few times that."""


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    done = subprocess.run([sys.executable, str(RECORD)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.slow
def test_every_stage_computes_what_it_did(measured: dict[str, Any]) -> None:
    assert measured["runs"].keys() == STORED["runs"].keys()
    same_kernels = measured["kernels"] == STORED["kernels"]
    if same_kernels:
        assert measured["base"] == STORED["base"]
    for name, stored in STORED["runs"].items():
        found = measured["runs"][name]
        if same_kernels and ("nf4" not in name or measured["nf4"] == STORED["nf4"]):
            assert found == stored, name
        precision = "bfloat16" if name.endswith(("bfloat16", "nf4")) else "float32"
        expected = pytest.approx(stored["losses"], rel=LOSS_TOLERANCE[precision])
        assert found["losses"] == expected, name


def test_all_stages_and_precisions_are_kept() -> None:
    runs = STORED["runs"]
    for stage in ("sft", "reward", "dpo", "kto", "ppo", "grpo"):
        for precision in ("float32", "bfloat16", "nf4"):
            kept = runs[f"{stage} {precision}"]
            assert len(kept["losses"]) == 3
            assert kept["adapter"]
            assert kept["merged"]
    assert len({run["merged"] for run in runs.values()}) == len(runs)
