"""Speed and memory of a stage against TRL on the same rows, model, LoRA and optimizer step.

Every block is a fresh process; the engines alternate (A B B A ...), so drift of the machine hits
both. Both get the same token ids, mask and order, the same random half of the adapter and the same
head. The first-step losses must agree before any ratio is printed.

    python benchmarks/against_trl.py dpo --data pairs.json --rows 12 --batch 4 --out result.json

What a ratio could be is printed beside it. If our steps ran at the machine's own product of large
matrices, measured in turns with the engines, the ratio would be (TRL's operations / ours) / (TRL's
share of that peak), which is TRL's time × the peak / our operations. TRL's operations are counted
while it runs once more; ours are those of the base's products
(alignkit/recipe/planning/duration.py).

Tracks: `default` is TRL as its documentation starts it (float32 weights under bf16 autocast,
gradient checkpointing); `tuned` is TRL with bf16 weights and no checkpointing. Rows are not grouped
by length in either: the order is part of the comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from machine import describe_machine, product_seconds, product_work

OBJECTIVES = {"dpo": {"kind": "dpo", "beta": 0.1}, "kto": {"kind": "kto", "beta": 0.1}}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=["sft", "reward", "dpo", "kto"])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", required=True, help="rows in any format alignkit reads")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8, help="rows of one optimizer step")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tracks", nargs="+", default=["default", "tuned"])
    parser.add_argument("--reference", default="auto", help="of dpo and kto: auto, cached, ...")
    parser.add_argument("--blocks", type=int, default=2, help="blocks of each engine")
    parser.add_argument("--no-count", action="store_true", help="of TRL's operations, a slow run")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def recipe_text(args: argparse.Namespace, output: str) -> str:
    recipe = {
        "stage": args.stage,
        "output": output,
        "model": {"base": args.model, "dtype": args.dtype},
        "adapter": {"kind": "lora", "rank": 16, "alpha": 32.0},
        "data": {"train": [{"path": args.data, "take": args.rows}], "max_length": args.max_length},
        "training": {
            "max_steps": args.rows // args.batch,
            "batch_size": args.batch,
            "learning_rate": 2e-4 if args.stage in ("sft", "reward") else 2e-5,
            "schedule": "constant",
            "warmup": 0,
            "save_every": 100000,
        },
        "merge": False,
    }
    if args.stage in OBJECTIVES:
        recipe["objective"] = OBJECTIVES[args.stage]
        recipe["reference"] = {"kind": args.reference}
    return json.dumps(recipe)


def run_alignkit(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Through the command's own function; the clock runs over the optimizer steps."""
    from alignkit.recipe.planning.duration import step_work
    from alignkit.recipe.reading.load import load_recipe
    from alignkit.runtime.metrics import read_metrics
    from alignkit.stages.inputs.precision import with_precision
    from alignkit.stages.registry import plan_stage, run_stage
    from alignkit.stages.running.session import RunOptions

    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe_text(args, str(folder / "run")))
    loaded = with_precision(load_recipe(str(recipe)).recipe, 1)
    plan = plan_stage(loaded, 1)[1]
    run_stage(loaded, RunOptions(quiet=True))
    steps = read_metrics(folder / "run" / "metrics.jsonl")
    return {
        "losses": [m["loss"] for m in steps],
        "step_seconds": [m["step_seconds"] for m in steps],
        "tokens": sum(m["tokens"] for m in steps),
        "operations": step_work(
            loaded, plan.model, plan.data, plan.steps, plan.gradient_checkpointing, plan.reference
        ),
        "planned_gb": plan.memory.peak / 1e9,
    }


def run_trl(args: argparse.Namespace, folder: Path, track: str) -> dict[str, object]:
    """TRL's stock trainer on the ids, labels and order that alignkit trains on."""
    from alignkit.peers.trl import run_trl
    from alignkit.recipe.reading.load import load_recipe
    from alignkit.stages.inputs.base import start_model
    from alignkit.stages.inputs.precision import with_precision
    from alignkit.stages.inputs.rows import load_rows

    path = folder / "recipe.yaml"
    path.write_text(recipe_text(args, str(folder / "run")))
    recipe = with_precision(load_recipe(str(path)).recipe, 1)
    rows = load_rows(recipe, start_model(recipe.model))
    steps = args.rows // args.batch
    found = run_trl(
        recipe,
        rows.base,
        rows.tokenizer,
        rows.train,
        folder / "trl",
        max_steps=steps,
        tuned=track == "tuned",
    )
    return {"losses": found.losses, "step_seconds": found.step_seconds, "tokens": 0}


def count_trl(args: argparse.Namespace, folder: Path, track: str) -> dict[str, object]:
    """TRL's run with the operations of its products and attention; slower, so not timed."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        found = run_trl(args, folder, track)
    return {**found, "operations": counter.get_total_flops()}


def peak_flops(dtype: str) -> float:
    """Operations a second of large products, once the kernels are there."""
    import torch

    seconds = [product_seconds(getattr(torch, dtype)) for _ in range(6)]
    return product_work() / statistics.median(seconds[1:])


def work(args: argparse.Namespace) -> None:
    engine, _, track = args.worker.partition(":")
    track, _, counted = track.partition(":")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if engine == "alignkit":
            found = run_alignkit(args, folder)
        elif counted:
            found = count_trl(args, folder, track)
        else:
            found = run_trl(args, folder, track)
    found["peak_flops"] = peak_flops(args.dtype)
    found["wall_seconds"] = time.monotonic() - started
    found["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    sys.stdout.write("RESULT " + json.dumps(found) + "\n")


def block(args: argparse.Namespace, worker: str) -> dict[str, object]:
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", worker]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in done.stdout.split("\n") if line.startswith("RESULT ")]
    if not lines:
        sys.exit(f"{worker} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found: dict[str, object] = json.loads(lines[-1].removeprefix("RESULT "))
    total = sum(found["step_seconds"])  # type: ignore[arg-type]
    print(
        f"{worker:14s} {total:7.1f} s in steps  {found['wall_seconds']:7.1f} s in all  "
        f"{found['peak_gb']:5.1f} GB  losses "
        + " ".join(f"{loss:.4f}" for loss in found["losses"]),  # type: ignore[attr-defined]
        flush=True,
    )
    return found


def summarise(blocks: list[dict[str, object]], rows: int) -> dict[str, float]:
    seconds = [sum(b["step_seconds"]) for b in blocks]  # type: ignore[arg-type]
    return {
        "step_seconds_total": statistics.median(seconds),
        "wall_seconds": statistics.median(b["wall_seconds"] for b in blocks),
        "peak_gb": statistics.median(b["peak_gb"] for b in blocks),
        "rows_per_second": rows / statistics.median(seconds),
    }


def bound(
    ours: list[dict[str, object]],
    theirs: list[dict[str, object]],
    counted: dict[str, object] | None,
) -> dict[str, float]:
    """What the ratio of times would be at the machine's own peak, and what it is of that."""
    peak = statistics.median(block["peak_flops"] for block in [*ours, *theirs])  # type: ignore[type-var]
    our_work = float(ours[0]["operations"])  # type: ignore[arg-type]
    our_time, their_time = (summarise(b, 1)["step_seconds_total"] for b in (ours, theirs))
    most = their_time * peak / our_work
    shares = {"peak GFLOP/s": peak / 1e9, "our share of it": our_work / our_time / peak}
    if counted is not None:
        their_work = float(counted["operations"])  # type: ignore[arg-type]
        shares["their share"] = their_work / their_time / peak
        shares["their operations / ours"] = their_work / our_work
    return {
        **shares,
        "most that the ratio could be": most,
        "reached of it": their_time / our_time / most,
    }


def main() -> None:
    args = parse()
    if args.worker:
        work(args)
        return
    workers = ["alignkit", *(f"trl:{track}" for track in args.tracks)]
    found: dict[str, list[dict[str, object]]] = {worker: [] for worker in workers}
    for number in range(args.blocks):
        for worker in workers if number % 2 == 0 else reversed(workers):
            found[worker].append(block(args, worker))
    used = args.rows // args.batch * args.batch
    ours = summarise(found["alignkit"], used)
    result: dict[str, object] = {
        "stage": args.stage,
        "machine": describe_machine(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {p: version(p) for p in ("torch", "transformers", "peft", "trl", "alignkit")},
        "rows": used,
        "batch": args.batch,
        "max_length": args.max_length,
        "dtype": args.dtype,
        "engines": {worker: summarise(blocks, used) for worker, blocks in found.items()},
        "losses": {worker: blocks[0]["losses"] for worker, blocks in found.items()},
    }
    tolerance = 2e-2 if args.dtype == "bfloat16" else 1e-4
    first = {worker: blocks[0]["losses"][0] for worker, blocks in found.items()}  # type: ignore[index]
    limits: dict[str, dict[str, float]] = {}
    result["bounds"] = limits
    for worker in workers[1:]:
        gap = abs(first[worker] - first["alignkit"])
        print(f"first-step loss: alignkit {first['alignkit']:.5f}, {worker} {first[worker]:.5f}")
        if gap > tolerance:
            sys.exit(f"the losses differ by {gap:.2g}: no ratio is meaningful")
        theirs = summarise(found[worker], used)
        counted = None if args.no_count else block(args, f"{worker}:count")
        limits[worker] = bound(found["alignkit"], found[worker], counted)
        print(
            f"{worker}: {theirs['step_seconds_total'] / ours['step_seconds_total']:.2f}× our time "
            f"in steps, {theirs['wall_seconds'] / ours['wall_seconds']:.2f}× in all, "
            f"our memory {ours['peak_gb'] / theirs['peak_gb']:.2f}× theirs"
        )
        print("  " + ", ".join(f"{name} {value:.3g}" for name, value in limits[worker].items()))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
