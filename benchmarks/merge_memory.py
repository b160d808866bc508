"""Peak memory of a merge, as a function of the model's size and of its largest file.

    python benchmarks/merge_memory.py [--layers 12 48] [--files 100MB 400MB] [--json FILE]

A random bfloat16 model is written in files of a given size, a LoRA adapter over all its linear
layers beside it, and `merge_adapter` runs in a process of its own. Its peak resident set (mapped
file pages included) is compared with that of a process that only imports the libraries.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch


def write_model(folder: Path, layers: int, file_size: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    from alignkit.models.base.loading import load_tokenizer
    from alignkit.models.base.places import resolve
    from alignkit.models.quiet import quiet_transformers

    tokenizer = load_tokenizer(resolve("smollm2-135m-instruct").whole())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder / "base", max_shard_size=file_size)
        tokenizer.save_pretrained(folder / "base")
        adapted = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.data = 0.01 * torch.randn_like(weight)
        adapted.save_pretrained(folder / "adapter")


def child(folder: Path, work: bool) -> None:
    """Merge, or only import what a merge imports, and print the peak."""
    from alignkit.models.base.loading import BaseModel
    from alignkit.models.merging.merge import merge_adapter

    report, start = None, time.perf_counter()
    if work:
        rows = [torch.arange(100 + n, 200 + n).numpy() for n in range(4)]
        report = merge_adapter(
            BaseModel(str(folder / "base")),
            folder / "adapter",
            folder / "merged",
            rows=rows,
            dtype=torch.bfloat16,
            overwrite=True,
        )
    seconds = time.perf_counter() - start
    # Not ru_maxrss: it keeps what the parent had before this program was started.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    found = {"peak": peak, "seconds": seconds, "kl": report.mean_kl if report else None}
    print(json.dumps(found))


def run(folder: Path, work: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", str(folder), *(["--work"] if work else [])]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(json.loads(out.strip().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 48])
    parser.add_argument("--files", nargs="+", default=["100MB", "400MB"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.work)
        return
    rows = []
    for layers in options.layers:
        for size in options.files:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch)
                write_model(folder, layers, size)
                sizes = [path.stat().st_size for path in (folder / "base").glob("*.safetensors")]
                adapter = (folder / "adapter/adapter_model.safetensors").stat().st_size
                idle, busy = run(folder, work=False), run(folder, work=True)
                above = busy["peak"] - idle["peak"]
                row = {
                    "layers": layers,
                    "model_gb": sum(sizes) / 1e9,
                    "largest_file_gb": max(sizes) / 1e9,
                    "adapter_gb": adapter / 1e9,
                    "imports_gb": idle["peak"] / 1e9,
                    "peak_gb": busy["peak"] / 1e9,
                    "above_imports_gb": above / 1e9,
                    "above_3_files_gb": (above - 3 * max(sizes)) / 1e9,
                    "seconds": busy["seconds"],
                    "kl": busy["kl"],
                }
                rows.append(row)
                print(json.dumps(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
