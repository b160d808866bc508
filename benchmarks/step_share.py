"""Useful work of training steps as a share of the machine's own product of large matrices.

    python benchmarks/step_share.py sft --data rows.jsonl [--rows 16] [--batch 8] [--json FILE]

Work is that of the base's products (alignkit/recipe/planning/duration.py); attention, the adapter,
norms and the optimizer are what else the time goes to. Products of 2,048 x 2,048 take turns with
the steps, in the run's precision; the first step, which compiles kernels, is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import describe_machine, product_seconds, product_work


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=["sft", "reward", "dpo", "kto"])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", required=True, help="rows in any format alignkit reads")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train for one pass over the rows, with products after every step."""
    import torch

    from alignkit.recipe.planning.duration import step_work
    from alignkit.recipe.reading.load import load_recipe
    from alignkit.runtime.metrics import MetricsFile, read_metrics
    from alignkit.stages.inputs.precision import with_precision
    from alignkit.stages.registry import plan_stage, run_stage
    from alignkit.stages.running.session import RunOptions

    values = {
        "stage": args.stage,
        "output": str(folder / "run"),
        "model": {"base": args.model, "dtype": args.dtype},
        "adapter": {"kind": "lora", "rank": 16, "alpha": 32.0},
        "data": {"train": [{"path": args.data, "take": args.rows}], "max_length": args.max_length},
        "training": {"epochs": 1, "batch_size": args.batch, "warmup": 0, "save_every": 100000},
        "merge": False,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values))
    recipe = with_precision(load_recipe(str(path)).recipe, 1)
    plan = plan_stage(recipe, 1)[1]
    products: list[float] = []
    write = MetricsFile.write

    def write_and_multiply(self: MetricsFile, step: int, metrics: dict[str, float]) -> None:
        write(self, step, metrics)
        products.extend(product_seconds(getattr(torch, recipe.model.dtype)) for _ in range(3))

    MetricsFile.write = write_and_multiply  # type: ignore[method-assign]
    run_stage(recipe, RunOptions(quiet=True))
    steps = [line for line in read_metrics(folder / "run" / "metrics.jsonl") if "loss" in line]
    later = steps[1:]
    tokens = sum(step["tokens"] for step in later) / sum(step["tokens"] for step in steps)
    work = step_work(
        recipe, plan.model, plan.data, plan.steps, plan.gradient_checkpointing, plan.reference
    )
    seconds = sum(step["step_seconds"] for step in later)
    peak = product_work() / statistics.median(products[3:])
    return {
        "stage": args.stage,
        "dtype": recipe.model.dtype,
        "steps": len(later),
        "seconds": seconds,
        "gflops": work * tokens / seconds / 1e9,
        "peak_gflops": peak / 1e9,
        "share": work * tokens / seconds / peak,
        "memory_gb": max(step["memory_gb"] for step in steps),
        "planned_gb": plan.memory.peak / 1e9,
    }


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, Path(folder))
    found |= {"machine": describe_machine(), "date": time.strftime("%Y-%m-%d")}
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
