"""metrics.jsonl: whole lines, no step twice."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pytest

from alignkit.runtime.metrics import MetricsFile, read_metrics


def write(path: Path, steps: list[int], resume_step: int | None = None) -> None:
    file = MetricsFile(path, resume_step)
    for step in steps:
        file.write(step, {"loss": step / 2})
    file.close()


def test_one_object_a_line_and_flushed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, None)
    file.write(1, {"loss": 0.5})
    assert path.read_text(encoding="utf-8") == '{"step": 1, "loss": 0.5}\n'  # before it is closed
    file.close()


def test_numbers_come_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, None)
    values = {"loss": 0.1 + 0.2, "grad_norm": 1e-300, "tokens": 2**40}
    file.write(3, values)
    file.close()
    assert read_metrics(path) == [{"step": 3, **values}]


def test_values_that_are_not_finite_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, None)
    file.write(1, {"loss": math.nan, "grad_norm": math.inf, "tokens": 5})
    file.close()
    line = path.read_text(encoding="utf-8")
    assert json.loads(line) == {"step": 1, "loss": None, "grad_norm": None, "tokens": 5}
    assert "NaN" not in line


def test_resuming_drops_later_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3, 4, 5, 6])
    write(path, [5, 6, 7], resume_step=4)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_new_run_starts_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3])
    write(path, [1])
    assert len(read_metrics(path)) == 1


def test_torn_lines_are_left_out_and_not_glued_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "lo')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    write(path, [3], resume_step=2)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    assert path.read_text(encoding="utf-8").count("\n") == 3


def test_a_full_disk_while_resuming_loses_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3])

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        MetricsFile(path, 2)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]


def test_resuming_without_a_file(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", [3], resume_step=2)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [3]
