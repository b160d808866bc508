"""Numbers of threads, from what Linux says of a machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alignkit.runtime import processor
from alignkit.runtime.processor import thread_counts


def describe(system: Path, *, clocks: dict[int, int], pairs: bool = False, quota: str = "") -> Path:
    """A folder like /sys of a machine with these CPUs, two of a core next to each other."""
    for cpu, clock in clocks.items():
        folder = system / "devices/system/cpu" / f"cpu{cpu}"
        (folder / "topology").mkdir(parents=True)
        (folder / "cpufreq").mkdir()
        first = cpu - cpu % 2
        names = f"{first}-{first + 1}" if pairs else str(cpu)
        (folder / "topology/thread_siblings_list").write_text(names + "\n")
        if clock:
            (folder / "cpufreq/cpuinfo_max_freq").write_text(f"{clock}\n")
    if quota:
        (system / "fs/cgroup").mkdir(parents=True)
        (system / "fs/cgroup/cpu.max").write_text(quota + "\n")
    return system


@pytest.mark.parametrize(
    ("clocks", "pairs", "quota", "expected"),
    [
        pytest.param(dict.fromkeys(range(2), 0), False, "", [2], id="a plain virtual machine"),
        pytest.param(dict.fromkeys(range(8), 5000000), True, "", [8, 4], id="two a core"),
        pytest.param(
            {n: 5_600_000 if n < 4 else 4_200_000 for n in range(12)},
            False,
            "",
            [12, 4],
            id="fast and slow cores",
        ),
        pytest.param(
            {n: 5_600_000 - 100_000 * n for n in range(6)}, False, "", [6], id="clocks much alike"
        ),
        pytest.param(
            dict.fromkeys(range(64), 3000000), True, "400000 100000", [4], id="a container of four"
        ),
        pytest.param(dict.fromkeys(range(4), 0), False, "150000 100000", [2], id="one and a half"),
        pytest.param(dict.fromkeys(range(4), 0), False, "max 100000", [4], id="no quota"),
    ],
)
def test_thread_counts(
    clocks: dict[int, int], pairs: bool, quota: str, expected: list[int], tmp_path: Path
) -> None:
    system = describe(tmp_path, clocks=clocks, pairs=pairs, quota=quota)
    assert thread_counts(set(clocks), system) == expected


def test_only_the_cpus_of_this_process_count(tmp_path: Path) -> None:
    system = describe(tmp_path, clocks=dict.fromkeys(range(16), 4000000), pairs=True)
    assert thread_counts({0, 1, 2}, system) == [3, 2]
    assert thread_counts({5}, tmp_path / "nothing") == [1]


@pytest.mark.parametrize(
    ("speeds", "expected"), [({2: 100.0, 1: 110.0}, 2), ({2: 100.0, 1: 120.0}, 1)]
)
def test_fewer_threads_have_to_be_clearly_faster(
    speeds: dict[int, float], expected: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ALIGNKIT_HOME", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(processor, "thread_counts", lambda allowed: [2, 1])
    monkeypatch.setattr(processor, "_speed", lambda count: speeds[count])
    before = torch.get_num_threads()
    try:
        processor.tune_processor()
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(processor, "thread_counts", lambda allowed: [99])
    before = torch.get_num_threads()
    processor.tune_processor()
    assert torch.get_num_threads() == before
