"""SFT speed and memory against TRL on the same rows, model, LoRA and optimizer step.

Every block is a fresh process; the engines alternate (A B B A ...), so drift of the machine hits
both. Both get the same token ids and labels in the same order. The first-step losses must agree
before any ratio is printed.

    python benchmarks/sft_vs_trl.py --data alpaca.json --rows 40 --blocks 2 --out result.json

Tracks: `default` is TRL as its documentation starts it (float32 weights under bf16 autocast,
gradient checkpointing); `tuned` is TRL with bf16 weights and no checkpointing. Rows are not grouped
by length in either: the order is part of the comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

BATCH = 8


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", required=True, help="rows in any format alignkit reads")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tracks", nargs="+", default=["default", "tuned"])
    parser.add_argument("--blocks", type=int, default=2, help="blocks of each engine")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def recipe_text(args: argparse.Namespace, output: str) -> str:
    return json.dumps(
        {
            "stage": "sft",
            "output": output,
            "model": {"base": args.model, "dtype": args.dtype},
            "adapter": {"kind": "lora", "rank": 16, "alpha": 32.0},
            "data": {
                "train": [{"path": args.data, "take": args.rows}],
                "max_length": args.max_length,
            },
            "training": {
                "epochs": 1,
                "batch_size": BATCH,
                "learning_rate": 2e-4,
                "schedule": "constant",
                "warmup": 0,
                "save_every": 100000,
            },
            "merge": False,
        }
    )


def run_alignkit(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Through the command's own function; the clock runs over the optimizer steps."""
    from alignkit.recipe.load import load_recipe
    from alignkit.runtime.metrics import read_metrics
    from alignkit.stages.session import RunOptions
    from alignkit.stages.sft import run_sft

    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe_text(args, str(folder / "run")))
    run_sft(load_recipe(str(recipe)).recipe, RunOptions(quiet=True))
    steps = read_metrics(folder / "run" / "metrics.jsonl")
    return {
        "losses": [m["loss"] for m in steps],
        "step_seconds": [m["step_seconds"] for m in steps],
        "tokens": sum(m["tokens"] for m in steps),
    }


def run_trl(args: argparse.Namespace, folder: Path, track: str) -> dict[str, object]:
    """Stock SFTTrainer on the ids, labels and order that alignkit trains on."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from alignkit.data.packing import step_items
    from alignkit.models.loading import find_base
    from alignkit.recipe.load import load_recipe
    from alignkit.stages.prepare import load_rows

    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe_text(args, str(folder / "run")))
    loaded = load_recipe(str(recipe)).recipe
    rows = load_rows(loaded)
    num_steps = -(-len(rows.train) // BATCH)
    order = [i for s in range(num_steps) for i in step_items(s, len(rows.train), BATCH, 0)]
    branches = [rows.train[int(i)].branches[0] for i in order]
    dataset = Dataset.from_list(
        [
            {
                "input_ids": b.ids.tolist(),
                "labels": [int(i) if t else -100 for i, t in zip(b.ids, b.trained, strict=True)],
            }
            for b in branches
        ]
    )
    times, losses = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            times.append(time.monotonic())

        def on_step_end(self, *_: object, **__: object) -> None:
            times[-1] = time.monotonic() - times[-1]

        def on_log(self, *_: object, logs: dict[str, float], **__: object) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    bf16 = args.dtype == "bfloat16"
    tuned = track == "tuned"
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        max_length=args.max_length,
        bf16=bf16,
        gradient_checkpointing=not tuned,
        train_sampling_strategy="sequential",
        model_init_kwargs={"dtype": "bfloat16" if tuned and bf16 else "float32"},
        use_cpu=not torch.cuda.is_available(),
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    trainer = SFTTrainer(
        model=find_base(args.model).location,
        args=config,
        train_dataset=dataset,
        processing_class=rows.tokenizer,
        peft_config=LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[Clock()],
    )
    trainer.train()
    return {
        "losses": losses,
        "step_seconds": times,
        "tokens": sum(len(b.ids) for b in branches),
    }


def work(args: argparse.Namespace) -> None:
    engine, _, track = args.worker.partition(":")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        found = run_alignkit(args, folder) if engine == "alignkit" else run_trl(args, folder, track)
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
        + " ".join(f"{loss:.4f}" for loss in found["losses"][:3]),  # type: ignore[index]
        flush=True,
    )
    return found


def summarise(blocks: list[dict[str, object]]) -> dict[str, float]:
    seconds = [sum(b["step_seconds"]) for b in blocks]  # type: ignore[arg-type]
    return {
        "step_seconds_total": statistics.median(seconds),
        "wall_seconds": statistics.median(b["wall_seconds"] for b in blocks),
        "peak_gb": statistics.median(b["peak_gb"] for b in blocks),
        "tokens_per_second": statistics.median(
            b["tokens"] / s for b, s in zip(blocks, seconds, strict=True)
        ),
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
    ours = summarise(found["alignkit"])
    result: dict[str, object] = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {p: version(p) for p in ("torch", "transformers", "peft", "trl", "alignkit")},
        "rows": args.rows,
        "batch": BATCH,
        "max_length": args.max_length,
        "dtype": args.dtype,
        "engines": {worker: summarise(blocks) for worker, blocks in found.items()},
        "losses": {worker: blocks[0]["losses"] for worker, blocks in found.items()},
    }
    tolerance = 2e-2 if args.dtype == "bfloat16" else 1e-4
    first = {worker: blocks[0]["losses"][0] for worker, blocks in found.items()}  # type: ignore[index]
    for worker in workers[1:]:
        gap = abs(first[worker] - first["alignkit"])
        print(f"first-step loss: alignkit {first['alignkit']:.5f}, {worker} {first[worker]:.5f}")
        if gap > tolerance:
            sys.exit(f"the losses differ by {gap:.2g}: no ratio is meaningful")
        theirs = summarise(found[worker])
        print(
            f"{worker}: {theirs['step_seconds_total'] / ours['step_seconds_total']:.2f}× our time "
            f"in steps, {theirs['wall_seconds'] / ours['wall_seconds']:.2f}× in all, "
            f"{theirs['peak_gb'] / ours['peak_gb']:.2f}× our memory"
        )
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
