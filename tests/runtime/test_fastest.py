"""Which precision is chosen from what a machine measures, and that no slow one is waited for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.runtime import precision, speeds
from alignkit.runtime.precision import describe_precision, fastest

LAYERS = ((64, 64), (64, 96))


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("ALIGNKIT_HOME", str(tmp_path))
    monkeypatch.setattr(speeds, "_alone", lambda: True)
    return tmp_path / "cache" / "speeds.json"


def measured(monkeypatch: pytest.MonkeyPatch, narrow: float, wide: float) -> list[Any]:
    calls: list[Any] = []

    def measure(*arguments: Any) -> dict[str, float]:
        calls.append(arguments)
        return {"bfloat16": narrow, "float32": wide}

    monkeypatch.setattr(precision, "precision_speeds", measure)
    return calls


@pytest.mark.parametrize(
    ("narrow", "wide", "chosen"),
    [(6e11, 1e11, "bfloat16"), (1.2e11, 1e11, "bfloat16"), (1.19e11, 1e11, "float32")],
)
def test_bfloat16_has_to_win_by_a_fifth(
    narrow: float, wide: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch, narrow, wide)
    dtype, reason = fastest("cpu", LAYERS)
    assert dtype == chosen
    numbers = f"bfloat16 {narrow / 1e9:,.0f} and float32 {wide / 1e9:,.0f} GFLOP/s measured here"
    assert reason == numbers


def test_a_machine_is_measured_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = measured(monkeypatch, 1e11, 1e12)
    assert fastest("cpu", LAYERS) == fastest("cpu", LAYERS)
    assert len(calls) == 1
    fastest("cpu", ((64, 64),))  # another model
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # other instructions
    fastest("cpu", LAYERS)
    assert len(calls) == 3
    home.write_text("{damaged")
    fastest("cpu", LAYERS)
    assert len(calls) == 4
    kept = json.loads(home.read_text())
    odd = ({"float32": "fast"}, {"float32": float("nan"), "bfloat16": 1e308}, [1.0])
    for number, value in enumerate(odd, start=5):
        home.write_text(json.dumps(dict.fromkeys(kept, value)))
        assert fastest("cpu", LAYERS)[0] == "float32"
        assert len(calls) == number
    home.unlink()
    home.mkdir()  # a folder where the file should be
    assert fastest("cpu", LAYERS)[0] == "float32"


def test_what_was_measured_beside_other_work_is_not_kept(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = measured(monkeypatch, 1e11, 1e12)
    for answers in ([True, False], [False, True], [True, True], []):
        monkeypatch.setattr(speeds, "_alone", iter(answers).__next__)
        dtype, reason = fastest("cpu", LAYERS)
        assert dtype == "float32"
        assert reason.endswith("measured here beside other work") == (False in answers)
    assert len(calls) == 3


def test_other_work_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(speeds, "product_speed", lambda *given: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for busy, alone in ((1.9, True), (1.7, True), (1.5, False), (1.0, False)):
        monkeypatch.setattr("time.perf_counter", iter([5.0, 6.0]).__next__)
        monkeypatch.setattr("time.process_time", iter([3.0, 3.0 + busy]).__next__)
        assert speeds._alone() is alone


def test_a_home_that_cannot_be_written_is_no_error(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch, 1e11, 1e12)
    home.parent.write_text("a file where the folder should be")
    assert fastest("cpu", LAYERS)[0] == "float32"


@pytest.mark.parametrize(("multiplies", "chosen"), [(True, "bfloat16"), (False, "float16")])
def test_on_a_card_its_own_kernels_decide(
    multiplies: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return multiplies

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert fastest("cuda", LAYERS)[0] == chosen
    assert asked == [False], "a T4 only imitates bfloat16"
    assert describe_precision("cuda").startswith(f"{chosen}: ")


def test_a_precision_that_crawls_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a CPU that imitates bfloat16: 4,096 x 14,336 would take minutes.
    slow_rounds: list[tuple[tuple[int, int], ...]] = []

    def slow(device: str, layers: Any, dtype: torch.dtype, work: float) -> float:
        if dtype == torch.float32:
            return 1e11
        slow_rounds.append(tuple(layers))
        return 1e8

    monkeypatch.setattr(speeds, "_round", slow)
    found = speeds.precision_speeds("cpu", ((4096, 14336),))
    assert found == {"float32": 1e11, "bfloat16": 1e8}
    assert ((4096, 14336),) not in slow_rounds


def test_speeds_are_of_products_of_these_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = speeds.precision_speeds("cpu", LAYERS)
    assert all(1e6 < speed < 1e15 for speed in found.values())
    monkeypatch.setattr(speeds, "_UNCACHED", 2**16)
    assert 1e6 < precision.sampling_speed("cpu", LAYERS, "float32", 3) < 1e15
    assert precision.sampling_speed("cuda", LAYERS, "float32", 3) == 0.0
