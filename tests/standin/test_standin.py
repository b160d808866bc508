"""Every stage as on a GPU: the same numbers as on the processor, and no more work than today.

A count that rises fails: one more synchronisation, a launch more in every layer, a slower kernel
of attention. One that falls is lowered here. A kernel that is not in the table is not called.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from standin.attention import kernel_of
from standin.library import obstacle

# Launches, synchronisations, calls of attention by kernel: two steps with their setup, evaluation
# and checkpoint on compute capability 8.0, with the versions in constraints.txt. In 16 bits a whole
# row is one varlen call; float32 takes the memory-efficient kernel, with key heads repeated. The
# merge of an NF4 base quantizes its layers once more on the device.
CEILINGS: dict[str, tuple[int, int, dict[str, int]]] = {
    "sft/float32": (2114, 211, {"efficient": 76}),
    "reward/float32": (2943, 220, {"efficient": 182}),
    "dpo/float32": (3690, 215, {"efficient": 286}),
    "kto/float32": (3831, 218, {"efficient": 258}),
    "ppo/float32": (14520, 446, {"efficient": 398}),
    "grpo/float32": (9728, 277, {"efficient": 500}),
    "dpo/bfloat16": (3260, 215, {"varlen": 24, "efficient": 2}),
    "sft/float16": (2366, 211, {"varlen": 14, "efficient": 2}),
    "sft/nf4": (2927, 337, {"efficient": 76}),
}
KINDS = [f"sft/float32/{kind}" for kind in ("full", "dora", "ia3", "prefix")]
EXACT = [run for run in CEILINGS if not run.endswith("16")]
ROUNDED = [run for run in CEILINGS if run.endswith("16")]
RESUMED = ["ppo/float16"]  # in 16 bits another processor may sample other responses
NARROW = ["grpo"]

REFUSED = {
    **dict.fromkeys(("mixed add", "mixed product", "mixed in place"), "same device, at"),
    "mixed attention": "two devices, at",
    "numpy": "Use Tensor.cpu() first",
}
"""Probe -> what CUDA's error says."""

WAITS = {
    "item": "aten._local_scalar_dense.default",
    "synchronize": "torch.cuda.synchronize",
    **dict.fromkeys(("to the host", "tolist"), "to the host"),
    **dict.fromkeys(("from the host", "copied into", "made there"), "from the host"),
    "boolean index": "boolean index",
    "index on the host": "index on the host",
}
"""Probe -> why the host waits once."""

LAUNCHES = {
    "host scalar": {"aten.mul.Tensor": 1},
    "sum": {"aten.sum.default": 1},
    "view": {},
    "filled mask": {"aten.gt.Scalar": 1, "aten.index_put_.default": 1},
    "not waiting": {"aten._to_copy.default": 1},
    "attention": {"attention forward": 1},
}
"""Probe that waits for nothing -> what it launches."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All runs and checks, in a process of their own: the device is there before torch is."""
    reason = obstacle()
    if reason is not None:
        pytest.skip(reason)
    path = tmp_path_factory.mktemp("standin") / "found.json"
    command = [sys.executable, "-m", "standin", *CEILINGS, *KINDS, "--json", str(path)]
    command += ["--benchmark", "--checks"]
    # Either fails the whole run: a byte that differs, or a tensor of float64 on the device.
    command += ["--resume", *RESUMED, "--narrow", *NARROW]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-6000:]
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


@pytest.mark.slow
@pytest.mark.parametrize("run", [*EXACT, *KINDS])
def test_every_measurement_is_that_of_the_processor(found: dict[str, Any], run: str) -> None:
    # Not bit for bit: the device's branches add up in another order (attention of one document
    # against blocks of a row, norms, LoRA), some 5e-7 after two steps of Adam.
    cpu, cuda = found["runs"][run]["cpu"], found["runs"][run]["cuda"]
    assert sum("loss" in line for line in cuda) == 2
    assert len(cpu) == len(cuda)
    for one, other in zip(cpu, cuda, strict=True):
        assert other == pytest.approx(one, rel=5e-6, abs=5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("run", ROUNDED)
def test_losses_in_bfloat16_are_close(found: dict[str, Any], run: str) -> None:
    # One rounding is 4e-3 of a number; in the mean over some hundred tokens, 1e-3 of the loss.
    cpu, cuda = (
        [line["loss"] for line in found["runs"][run][name] if "loss" in line]
        for name in ("cpu", "cuda")
    )
    assert len(cuda) == 2
    assert cuda == pytest.approx(cpu, abs=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("run", CEILINGS)
def test_no_more_work_than_measured(found: dict[str, Any], run: str) -> None:
    launches, syncs, attention = CEILINGS[run]
    counts = found["runs"][run]
    assert 0 < sum(counts["launches"].values()) <= launches
    assert 0 < sum(counts["syncs"].values()) <= syncs, counts["syncs"]
    assert counts["attention"]
    above = {k: n for k, n in counts["attention"].items() if n > attention.get(k, 0)}
    assert above == {}
    names = {
        "varlen": ("torch_attn._varlen_attn.default", "torch_attn._varlen_attn_backward.default"),
        "efficient": ("attention forward", "attention backward"),
    }
    kernel = "efficient" if run in EXACT else "varlen"
    forward, backward = (counts["launches"].get(name, 0) for name in names[kernel])
    assert forward == counts["attention"][kernel] > backward > 0


@pytest.mark.slow
def test_the_device_refuses_what_cuda_refuses(found: dict[str, Any]) -> None:
    probes = found["device"]
    assert probes.keys() == REFUSED.keys() | WAITS.keys() | LAUNCHES.keys()
    for name, text in REFUSED.items():
        assert text in probes[name].get("refused", ""), name


@pytest.mark.slow
def test_one_synchronisation_is_counted_with_its_line(found: dict[str, Any]) -> None:
    for name, reason in WAITS.items():
        assert found["device"][name]["syncs"] == {f"{reason}, somewhere.py:3": 1}, name


@pytest.mark.slow
def test_launches_are_counted_where_nothing_waits(found: dict[str, Any]) -> None:
    for name, launches in LAUNCHES.items():
        assert found["device"][name]["syncs"] == {}, name
        assert found["device"][name]["launches"] == launches, name


@pytest.mark.slow
def test_half_precision_never_meets_the_math_kernel(found: dict[str, Any]) -> None:
    for run in CEILINGS:
        assert found["runs"][run]["attention"].get("math", 0) == 0, run
        assert run not in ROUNDED or found["runs"][run]["attention"]["varlen"] > 0


@pytest.mark.slow
def test_the_benchmark_of_a_card_runs_whole(found: dict[str, Any]) -> None:
    rows = found["card"]
    assert list(rows) == [
        *("attention", "bits", "tiny sft", "tiny dpo", "tiny groups"),
        *("tiny trl sft", "tiny trl dpo", "tiny sampling", "tiny graph"),
    ]
    assert [name for name, values in rows.items() if "skipped" in values] == ["tiny graph"]
    assert "Stream" in rows["tiny graph"]["skipped"]  # nothing can be captured without a card
    assert rows["attention"]["output differs by"] < 0.016
    assert rows["bits"]["numbers that differ"] == 0
    assert rows["tiny sft"]["planned GB"] > 0


@pytest.mark.slow
def test_commands_print_and_write_what_they_do_on_the_processor(found: dict[str, Any]) -> None:
    assert len(found["commands"]) == 6
    for name, command in found["commands"].items():
        cpu, cuda = command["cpu"], command["cuda"]
        assert same(cuda["printed"], cpu["printed"]), name
        assert same(cuda["written"], cpu["written"]), name
        assert bool(cpu["written"]) == (name in ("label", "merge-lora"))
        assert (command["launches"] > 0) == (name != "merge-lora"), name


def same(one: Any, other: Any) -> bool:
    """Texts are equal, and numbers but for what the order of a sum changes."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(other, float):
        return bool(one == pytest.approx(other, rel=1e-5, abs=1e-5))
    return bool(one == other)


@pytest.mark.slow
def test_what_stays_on_the_host_is_an_error_with_its_line(found: dict[str, Any]) -> None:
    assert len(found["faults"]) == 5
    for name, error in found["faults"].items():
        assert "same device, at " in error or "Cannot copy" in error, (name, error)


@pytest.mark.slow
def test_a_base_in_nf4_never_lies_in_16_bits(found: dict[str, Any]) -> None:
    load = found["load"]
    assert load["quantized"] == 6 * 7
    assert load["alive"] <= 2 * load["largest"] < load["stored"] / 8
    assert load["codes"] == 0


@pytest.mark.slow
def test_varlen_attention_is_masked_attention(found: dict[str, Any]) -> None:
    # bfloat16 keeps 8 bits: half of the last one of a number near 4 is 8e-3.
    assert len(found["varlen"]) == 8
    assert max(found["varlen"].values()) < 0.016


@pytest.mark.parametrize(
    ("capability", "changes", "kernel"),
    [
        (80, {}, "flash"),
        (90, {}, "cudnn"),
        (75, {}, "math"),
        (75, {"dtype": torch.float16, "groups": 1}, "efficient"),
        (80, {"groups": 1, "mask": True}, "efficient"),
        (80, {"mask": True}, "math"),
        (80, {"dtype": torch.float32, "groups": 1}, "efficient"),
        (80, {"dtype": torch.float32}, "math"),
        (80, {"keys": 9, "causal": True}, "math"),
        (80, {"keys": 9}, "flash"),
        (80, {"width": 320}, "math"),
        (90, {"width": 256}, "flash"),
    ],
)
def test_the_kernel_of_attention(capability: int, changes: dict[str, Any], kernel: str) -> None:
    how = {"dtype": torch.bfloat16, "groups": 2, "keys": 7, "width": 64} | changes
    query = torch.zeros(1, 4, 7, how["width"], dtype=how["dtype"])
    key = torch.zeros(1, 4 // how["groups"], how["keys"], how["width"], dtype=how["dtype"])
    mask = torch.ones(7, how["keys"], dtype=torch.bool) if how.get("mask") else None
    assert kernel_of(query, key, key, mask, how.get("causal", False), capability) == kernel


def test_without_a_compiler_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert obstacle() == "no C++ compiler: the stand-in device cannot be built"
