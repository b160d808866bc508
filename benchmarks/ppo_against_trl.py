"""Speed and memory of a PPO step against TRL's on the same prompts, models and sizes.

TRL's PPO is experimental (`trl.experimental.ppo`, 1.12) and gone from later releases, so it runs in
an environment of its own: trl==1.12.0 transformers==5.23.0 peft==0.21.2. Every block is a fresh
process; the engines alternate (A B B A ...), so drift of the machine hits both.

    python benchmarks/ppo_against_trl.py --model MODEL --prompts prompts.jsonl --trl-python PYTHON

Both get the same prompt tokens, reward model, LoRA shape and optimizer steps. What differs:

- Each samples its own responses, and shuffles the prompts itself. Both see all prompts once.
- TRL trains all weights of a value model; `--trl-value lora` gives it an adapter, which TRL's
  documentation does not show. alignkit trains an adapter.
- TRL knows padding by its token. Where that also ends a turn it would neither train nor score it,
  so another special token pads here, and the result names it.
- TRL's models are loaded in bfloat16, as its example does with such a checkpoint. Its trainer makes
  an accelerator that does not hear of `bf16=True`: there is no autocast, whatever `--trl-dtype`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from machine import describe_machine

KL_COEF = 0.05
LEARNING_RATE = 3e-6
PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "alignkit")
MAX_FIRST_KL = 0.5  # nats of a response before the first update, when only rounding differs
MAX_LENGTH_GAP = 0.15  # relative difference of the mean response length


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="folder of a transformers checkpoint")
    add("--reward-model", default="new", help="reward run or classifier; `new` draws a head")
    add("--prompts", required=True, help='.jsonl rows {"prompt": text}')
    sizes = {"prompts-per-step": 16, "new-tokens": 24, "steps": 3, "epochs": 4, "blocks": 2}
    # Longest text of a user, and rows of one of TRL's backward passes.
    for name, size in {**sizes, "prompt-tokens": 40, "trl-micro-batch": 16}.items():
        add(f"--{name}", type=int, default=size)
    add("--engines", nargs="+", choices=["alignkit", "trl"], default=["alignkit", "trl"])
    add("--set", nargs="*", default=[], help="key=value for the alignkit recipe")
    add("--trl-python", default=sys.executable, help="interpreter that has TRL 1.12")
    add("--trl-dtype", choices=["bfloat16", "float32"], default="bfloat16")
    add("--trl-value", choices=["full", "lora"], default="full")
    add("--out", type=Path)
    add("--worker", choices=["prepare", "trl"], help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.trl_micro_batch = min(args.trl_micro_batch, args.prompts_per_step)
    if args.prompts_per_step % args.trl_micro_batch:
        parser.error("--prompts-per-step must be a multiple of --trl-micro-batch")
    return args


def prepare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prompts as text and token ids, the padding token, and a reward model if none is given."""
    from transformers import AutoTokenizer

    from alignkit.models.rewards.classifier import choose_padding

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    padding = choose_padding(tokenizer, [tokenizer.eos_token_id])
    assert padding is not None, "the tokenizer has no special token to pad with"
    pad = tokenizer.convert_tokens_to_ids(padding)
    wanted = args.steps * args.prompts_per_step
    with open(args.prompts, encoding="utf-8") as lines:
        texts = [json.loads(line)["prompt"] for line in itertools.islice(lines, wanted)]
    assert len(texts) == wanted, f"{args.prompts} has {len(texts)} prompts, {wanted} are needed"
    # Cut and rendered as text: what is tokenized in the end is the same string for both.
    for number, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: args.prompt_tokens]
        texts[number] = tokenizer.decode(ids)
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": texts[number]}]
            options = {"add_generation_prompt": True, "tokenize": False}
            texts[number] = tokenizer.apply_chat_template(turns, **options)
    written = texts[0].startswith(tokenizer.bos_token or " ")
    rows = [tokenizer(text, add_special_tokens=not written)["input_ids"] for text in texts]
    assert not any(pad in row for row in rows), f"TRL would take {padding} in a prompt for padding"
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": t}) for t in texts))
    reward = folder / "reward" if args.reward_model == "new" else Path(args.reward_model)
    if args.reward_model == "new":
        new_reward_model(args.model, tokenizer, pad, reward)
    classifier = reward / "merged" if (reward / "merged").is_dir() else reward
    return {"ids": rows, "pad": padding, "reward": str(reward), "classifier": str(classifier)}


def new_reward_model(model: str, tokenizer: Any, pad: int, output: Path, seed: int = 0) -> None:
    """Write a classifier with a fresh head, whose scores cost what others cost."""
    from transformers import AutoModelForSequenceClassification

    from alignkit.models.rewards.head import new_head

    classifier = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    classifier.score.weight.data.copy_(new_head(classifier, seed).weight)
    classifier.config.pad_token_id = pad
    classifier.save_pretrained(output)
    tokenizer.save_pretrained(output)


def recipe_text(args: argparse.Namespace, inputs: dict[str, Any], folder: Path, run: Path) -> str:
    rollout = {"prompts_per_step": args.prompts_per_step, "max_new_tokens": args.new_tokens}
    loop = {"max_steps": args.steps, "learning_rate": LEARNING_RATE, "schedule": "constant"}
    recipe = {
        "stage": "ppo",
        "output": str(run),
        "model": {"base": args.model, "dtype": "bfloat16"},
        "adapter": {"kind": "lora", "rank": 16, "alpha": 32.0, "targets": "all-linear"},
        "data": {"train": [{"path": str(folder / "prompts.jsonl")}]},
        "reward": {"model": inputs["reward"], "normalize": False},
        "rollout": {**rollout, "temperature": 1.0, "missing_eos_penalty": None},
        "objective": {"kind": "ppo", "epochs": args.epochs, "minibatches": 1, "kl_coef": KL_COEF},
        "value": {"kind": "adapter", "learning_rate": LEARNING_RATE},
        "training": {**loop, "warmup": 0, "save_every": 100000},
        "merge": False,
    }
    return json.dumps(recipe)


def run_alignkit(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Through the command line; the clock is the run's own, over whole PPO steps."""
    inputs = json.loads((folder / "inputs.json").read_text())
    run, recipe = folder / "run", folder / "recipe.yaml"
    recipe.write_text(recipe_text(args, inputs, folder, run))
    command = [sys.executable, "-m", "alignkit", "ppo", str(recipe), *args.set, "--quiet"]
    found = measured([*command, "--overwrite"], folder)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    steps = [m for m in map(json.loads, lines) if "step_seconds" in m]
    same = {name: [m[name] for m in steps] for name in ("step_seconds", "response_length")}
    renamed = {"score": [m["reward"] for m in steps], "kl": [m["kl/k1"] for m in steps]}
    return found | same | renamed | {"versions": versions()}


def run_self(python: str, name: str, folder: Path) -> dict[str, Any]:
    """Through this file under an interpreter."""
    command = [python, __file__, *sys.argv[1:], "--worker", name, "--folder", str(folder)]
    return measured(command, folder)


def work_trl(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """TRL's stock trainer; its clock runs from one step's end to the next one's."""
    import torch
    import transformers as hf
    from datasets import Dataset
    from peft import LoraConfig, inject_adapter_in_model
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    inputs = json.loads((folder / "inputs.json").read_text())
    tokenizer = hf.AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.pad_token = inputs["pad"]
    found: dict[str, Any] = {"step_seconds": [], "response_length": [], "score": [], "kl": []}

    class Clock(hf.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            found["step_seconds"].append(time.monotonic() - started - sum(found["step_seconds"]))

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            found["score"].append(logs["objective/scores"])
            found["kl"].append(logs["objective/kl"])

    truncate = ppo_trainer.truncate_response  # the trainer logs no lengths; this sees responses

    def counted(stop: int, pad: int, responses: torch.Tensor) -> Any:
        cut = truncate(stop, pad, responses)
        found["response_length"].append((cut != pad).sum(1).float().mean().item())
        return cut

    ppo_trainer.truncate_response = counted
    options = {"dtype": getattr(torch, args.trl_dtype)}
    reward, value = (  # alignkit's value model starts from the reward model too
        hf.AutoModelForSequenceClassification.from_pretrained(inputs["classifier"], **options)
        for _ in range(2)
    )
    shape = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    if args.trl_value == "lora":
        inject_adapter_in_model(LoraConfig(**shape, task_type="SEQ_CLS"), value)
        value.score.requires_grad_(True)
    sampled = {"response_length": args.new_tokens, "stop_token": "eos", "temperature": 1.0}
    loop = {"num_ppo_epochs": args.epochs, "kl_coef": KL_COEF, "lr_scheduler_type": "constant"}
    optimizer = {"learning_rate": LEARNING_RATE, "adam_epsilon": 1e-5, "disable_tqdm": True}
    silent = {"num_sample_generations": 0, "save_strategy": "no", "report_to": "none"}
    config = PPOConfig(
        output_dir=str(folder / "trl"),
        total_episodes=args.steps * args.prompts_per_step,
        per_device_train_batch_size=args.trl_micro_batch,
        gradient_accumulation_steps=args.prompts_per_step // args.trl_micro_batch,
        local_rollout_forward_batch_size=args.prompts_per_step,
        use_cpu=not torch.cuda.is_available(),
        **{**sampled, **loop, **optimizer, **silent},
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=hf.AutoModelForCausalLM.from_pretrained(args.model, **options),
        ref_model=None,  # the policy without its adapter
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": inputs["ids"]}),
        callbacks=[Clock()],
        peft_config=LoraConfig(**shape, task_type="CAUSAL_LM"),
    )
    trainer.remove_callback(hf.PrinterCallback)
    started = time.monotonic()
    trainer.train()
    return found | {
        "versions": versions(),
        "autocast": trainer.accelerator.mixed_precision,
        "trained": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }


def versions() -> dict[str, str]:
    return {found.name: found.version for found in distributions() if found.name in PACKAGES}


def measured(command: list[str], folder: Path) -> dict[str, Any]:
    """Run a fresh process: the result it prints, with its wall clock and peak memory."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    out, err = folder / "stdout", folder / "stderr"
    started = time.monotonic()
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment)
        _, status, usage = os.wait4(process.pid, 0)  # the usage of this child alone
    process.returncode = os.waitstatus_to_exitcode(status)
    _, mark, result = out.read_text().rpartition("\nRESULT ")
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{result[-2000:]}\n{err.read_text()[-4000:]}")
    found: dict[str, Any] = json.loads(result) if mark else {}
    peak = usage.ru_maxrss * 1024 / 1e9
    return {**found, "wall_seconds": time.monotonic() - started, "peak_gb": peak}


def summarise(args: argparse.Namespace, blocks: list[dict[str, Any]]) -> dict[str, Any]:
    steps = [b["step_seconds"] for b in blocks]
    seconds = statistics.median(s for block in steps for s in block[1:] or block)
    length = statistics.mean(n for b in blocks for n in b["response_length"])
    return {
        "first_step_seconds": statistics.median(block[0] for block in steps),
        "step_seconds": seconds,
        "samples_per_second": args.prompts_per_step / seconds,
        "response_tokens_per_second": args.prompts_per_step * length / seconds,
        **{k: statistics.median(b[k] for b in blocks) for k in ("wall_seconds", "peak_gb")},
        "mean_response_length": length,
        "mean_score": statistics.mean(s for b in blocks for s in b["score"]),
        "first_step_kl": max((b["kl"][0] for b in blocks), key=abs),
    }


def differences(engines: dict[str, dict[str, Any]]) -> list[str]:
    """Why the engines did not do the same work; empty if they did."""
    kls = [(name, engine["first_step_kl"]) for name, engine in engines.items()]
    found = [f"{name} starts at KL {kl:.2g}" for name, kl in kls if abs(kl) > MAX_FIRST_KL]
    lengths = [engine["mean_response_length"] for engine in engines.values()]
    if max(lengths) - min(lengths) > MAX_LENGTH_GAP * max(lengths):
        found.append(f"mean response lengths are {' and '.join(f'{n:.1f}' for n in lengths)}")
    return found


def main() -> None:
    args = parse()
    if args.worker:
        work = {"prepare": prepare, "trl": work_trl}[args.worker]
        print("\nRESULT " + json.dumps(work(args, args.folder)))
        return
    trl, found = args.trl_python, {name: list[dict[str, Any]]() for name in args.engines}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # In a process of its own: the peak memory of a child starts at that of its parent.
        inputs = run_self(sys.executable, "prepare", folder)
        (folder / "inputs.json").write_text(json.dumps(inputs))
        for number in range(args.blocks):
            for name in args.engines if number % 2 == 0 else reversed(args.engines):
                block = run_self(trl, name, folder) if name == "trl" else run_alignkit(args, folder)
                found[name].append(block)
                each = " ".join(f"{seconds:.2f}" for seconds in block["step_seconds"])
                print(f"{name:9s} steps {each} s  {block['peak_gb']:.2f} GB", flush=True)
    engines = {engine: summarise(args, blocks) for engine, blocks in found.items()}
    lengths = sorted(len(row) for row in inputs["ids"])
    result: dict[str, Any] = {
        "stage": "ppo",
        "machine": describe_machine(),
        "date": time.strftime("%Y-%m-%d"),
        "arguments": {k: v for k, v in vars(args).items() if isinstance(v, int)},
        "trl": {"dtype": args.trl_dtype, "value": args.trl_value, "padding": inputs["pad"]},
        "prompt_tokens": {"median": lengths[len(lengths) // 2], "longest": lengths[-1]},
        "engines": engines,
        "differences": differences(engines),
        "blocks": found,
    }
    if len(engines) == 2 and not result["differences"]:
        ours, theirs = engines["alignkit"], engines["trl"]
        ratio = result["ratio"] = {k: theirs[k] / ours[k] for k in ("step_seconds", "peak_gb")}
        print(f"trl: {ratio['step_seconds']:.2f}× our time, {ratio['peak_gb']:.2f}× our memory")
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    if result["differences"]:
        sys.exit(f"no ratio is meaningful: {'; '.join(result['differences'])}")


if __name__ == "__main__":
    main()
