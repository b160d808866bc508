"""`python -m standin STAGE/PRECISION …`: what runs on a GPU would launch and wait for."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from standin.library import load_device

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # the device is there in one thread
load_device()  # before anything imports torch

import torch  # noqa: E402

from standin.checks import check_device, check_varlen  # noqa: E402
from standin.commands import compare_commands  # noqa: E402
from standin.device import device  # noqa: E402
from standin.faults import check_faults  # noqa: E402
from standin.loads import check_load  # noqa: E402
from standin.runs import STAGES, compare, resume, without_float64  # noqa: E402


def main(options: argparse.Namespace) -> None:
    """Run what the command line asks for; a line for each run, or everything as JSON.

    Args:
        options: as from `parse`.
    """
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # each run searches for garbage twice: most of its time beside all that is imported
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ALIGNKIT_HOME"] = f"{folder}/home"
        for run in options.runs:
            found[run] = compare(run, Path(folder), options.steps, options.capability)
            show(run, found[run], options.sites)
        card = measure_card() if options.benchmark else {}
        for run in options.resume:
            resume(run, Path(folder))
            print(f"{run}: resumed to the same bytes")
        for stage in options.narrow:
            without_float64(stage, Path(folder))
            print(f"{stage}: no float64 on the device")
        checks: dict[str, Any] = {"card": card}
        if options.checks:
            checks["commands"] = compare_commands(Path(folder))
            checks["faults"] = check_faults(Path(folder))
            checks["load"] = check_load(Path(folder))
            checks |= {"device": check_device(), "varlen": check_varlen()}
    if options.json:
        options.json.write_text(json.dumps({"runs": found, **checks}), encoding="utf-8")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m standin", description=__doc__)
    every = [f"{stage}/float32" for stage in STAGES]
    parser.add_argument(
        "runs", nargs="*", default=every, help="such as dpo/bfloat16 or sft/float32/dora"
    )
    parser.add_argument("--steps", type=int, default=2, help="of training, after the same setup")
    parser.add_argument("--capability", type=int, default=80, help="75, 80 or 90")
    parser.add_argument("--sites", type=int, default=0, help="most frequent waits and launches")
    parser.add_argument("--resume", nargs="*", default=[], help="runs to break off and resume")
    parser.add_argument("--narrow", nargs="*", default=[], help="stages to run without float64")
    parser.add_argument("--benchmark", action="store_true", help="benchmarks/gpu.py, tiny")
    parser.add_argument("--checks", action="store_true", help="commands, faults, loads, itself")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    return parser.parse_args()


def measure_card() -> dict[str, Any]:
    """What `benchmarks/gpu.py` measures of the stand-in, with a tiny model."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    import gpu

    with device():
        rows = gpu.main(["--shapes", "tiny", "--tokens", "256", "--new", "3"])["rows"]
    return dict(rows)


def show(run: str, found: dict[str, Any], sites: int) -> None:
    """One line for a run, and the most frequent of its events.

    Args:
        run: its name.
        found: as from `compare`.
        sites: how many events of each kind to list.
    """
    pairs = zip(found["cpu"], found["cuda"], strict=True)
    apart = max(abs(one["loss"] - other["loss"]) for one, other in pairs if "loss" in one)
    print(
        f"{run}: {sum(found['launches'].values())} launches, {sum(found['syncs'].values())} "
        f"synchronisations, attention {found['attention']}, losses differ by {apart:.1e}"
    )
    for kind in ("syncs", "launches"):
        for name, count in list(found[kind].items())[:sites]:
            print(f"  {count:6d} {name}")


if __name__ == "__main__":
    options, code = parse(), 1
    try:
        main(options)
        code = 0
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)  # autograd's thread of the device would outlive the interpreter
