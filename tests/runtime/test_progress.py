"""What a person sees: durations, and lines on stderr only."""

from __future__ import annotations

import math

import pytest

from alignkit.runtime.progress import StepProgress, show_duration

METRICS = {
    "loss": 1.23456,
    "learning_rate": 2e-4,
    "grad_norm": 0.5,
    "step_seconds": 0.0,
    "tokens_per_second": 1234.5,
    "memory_gb": 1.26,
}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (0.9, "0:00"),
        (59.9, "0:59"),
        (60, "1:00"),
        (75, "1:15"),
        (3599, "59:59"),
        (3600, "1:00:00"),
        (7325, "2:02:05"),
        (360_000, "100:00:00"),
        (math.inf, "-"),
        (math.nan, "-"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert show_duration(seconds) == text


def test_lines_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    progress = StepProgress(steps=5, first_step=0, log_every=2, quiet=False)
    for step in range(1, 6):
        progress.step(step, METRICS)
    progress.say("held out [all]")
    progress.close()
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    # Every second step and the last one.
    assert [line.split("  ")[0] for line in lines[:3]] == ["step 2/5", "step 4/5", "step 5/5"]
    assert "loss 1.2346  lr 2.00e-04  grad 0.50  1,234 tokens/s  1.3 GB  0:00 left" in lines[0]
    assert lines[3] == "held out [all]"


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    progress = StepProgress(steps=2, first_step=0, log_every=1, quiet=True)
    progress.step(1, METRICS)
    progress.say("held out")
    progress.close()
    assert capsys.readouterr() == ("", "")
