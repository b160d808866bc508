"""Speed and memory of a GRPO step against TRL's on the same prompts, model, groups and LoRA.

    python benchmarks/grpo_against_trl.py --model MODEL --prompts prompts.jsonl [--out FILE]

Every block is a fresh process; the engines alternate (A B B A …). Each samples its own responses,
and both are cut off at the same length; what differs in their mean length is printed. The reward is
the share of letters that are `e`, in both. The clock runs over whole steps, sampling included;
the first step, which compiles kernels, is left out.
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
from typing import Any

from machine import describe_machine

RATE = 1e-5
SCORE = """
def score(prompts, completions, **columns):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [text.count("e") / (len(text) + 1) for text in texts]
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder of a transformers checkpoint")
    parser.add_argument("--prompts", required=True, help='.jsonl rows {"prompt": text}')
    sizes = {"prompts-per-step": 8, "samples": 8, "new-tokens": 32, "steps": 3, "blocks": 1}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", choices=["alignkit", "trl"], help=argparse.SUPPRESS)
    return parser.parse_args()


def prompts(args: argparse.Namespace) -> list[str]:
    wanted = args.steps * args.prompts_per_step
    with open(args.prompts, encoding="utf-8") as lines:
        texts = [json.loads(line)["prompt"] for line in lines]
    assert len(texts) >= wanted, f"{wanted} prompts are needed"
    return texts[:wanted]


def run_alignkit(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from alignkit.recipe.reading.load import load_recipe
    from alignkit.runtime.metrics import read_metrics
    from alignkit.stages.registry import run_stage
    from alignkit.stages.running.session import RunOptions

    rows = folder / "rows.jsonl"
    turns = ([{"role": "user", "content": text}] for text in prompts(args))
    rows.write_text("".join(json.dumps({"prompt": turn}) + "\n" for turn in turns))
    (folder / "rewards.py").write_text(SCORE)
    recipe = {
        "stage": "grpo",
        "output": str(folder / "run"),
        "model": {"base": args.model, "dtype": args.dtype},
        "adapter": {"kind": "lora", "rank": 16, "alpha": 32.0},
        "data": {"train": [{"path": str(rows)}], "max_length": 512},
        "reward": {"function": f"{folder}/rewards.py:score"},
        "rollout": {
            "prompts_per_step": args.prompts_per_step,
            "samples_per_prompt": args.samples,
            "max_new_tokens": args.new_tokens,
        },
        "training": {
            "max_steps": args.steps,
            "learning_rate": RATE,
            "schedule": "constant",
            "warmup": 0,
            "save_every": 100000,
        },
        "merge": False,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    run_stage(load_recipe(str(path)).recipe, RunOptions(quiet=True))
    steps = [m for m in read_metrics(folder / "run" / "metrics.jsonl") if "step_seconds" in m]
    names = ("step_seconds", "sampling_seconds", "response_length", "loss")
    return {name: [step[name] for step in steps] for name in names}


def run_trl(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import torch
    import transformers as hf
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    scores: dict[str, Any] = {}
    exec(SCORE, scores)
    found: dict[str, Any] = {"step_seconds": [], "response_length": [], "loss": []}

    class Clock(hf.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            found["began"] = time.monotonic()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            found["step_seconds"].append(time.monotonic() - found["began"])

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "completions/mean_length" in logs:
                found["response_length"].append(logs["completions/mean_length"])
                found["loss"].append(logs["loss"])

    rows = [{"prompt": [{"role": "user", "content": text}]} for text in prompts(args)]
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        max_steps=args.steps,
        per_device_train_batch_size=args.prompts_per_step * args.samples,
        num_generations=args.samples,
        max_completion_length=args.new_tokens,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        logging_steps=1,
        use_cpu=not torch.cuda.is_available(),
        bf16=args.dtype == "bfloat16",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        hf.AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)),
        reward_funcs=scores["score"],
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=hf.AutoTokenizer.from_pretrained(args.model, padding_side="left"),
        peft_config=LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[Clock()],
    )
    trainer.train()
    return found


def work(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = run_alignkit if args.worker == "alignkit" else run_trl
        found = run(args, Path(folder))
    found["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    sys.stdout.write("\nRESULT " + json.dumps(found) + "\n")


def block(engine: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", engine]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    _, mark, result = done.stdout.rpartition("\nRESULT ")
    if not mark:
        sys.exit(f"{engine} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(result)
    each = " ".join(f"{seconds:.1f}" for seconds in found["step_seconds"])
    length = statistics.mean(found["response_length"])
    print(f"{engine:9s} steps {each} s  {found['peak_gb']:.1f} GB  length {length:.1f}", flush=True)
    return found


def main() -> None:
    args = parse()
    if args.worker:
        work(args)
        return
    engines = ("alignkit", "trl")
    blocks: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    for number in range(args.blocks):
        for engine in engines if number % 2 == 0 else reversed(engines):
            blocks[engine].append(block(engine))
    samples = args.prompts_per_step * args.samples
    summary = {}
    for engine, own in blocks.items():
        seconds = statistics.median(s for found in own for s in found["step_seconds"][1:])
        summary[engine] = {
            "step_seconds": seconds,
            "samples_per_second": samples / seconds,
            "peak_gb": statistics.median(found["peak_gb"] for found in own),
        }
    ours, theirs = summary["alignkit"], summary["trl"]
    print(
        f"TRL takes {theirs['step_seconds'] / ours['step_seconds']:.2f}× our time, "
        f"our memory is {ours['peak_gb'] / theirs['peak_gb']:.2f}× theirs"
    )
    result = {
        "stage": "grpo",
        "machine": describe_machine(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {p: version(p) for p in ("torch", "transformers", "peft", "trl", "alignkit")},
        "arguments": {k: v for k, v in vars(args).items() if isinstance(v, int)},
        "dtype": args.dtype,
        "engines": summary,
        "blocks": blocks,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
