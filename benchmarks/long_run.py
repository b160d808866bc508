"""Memory and disk of a long run: flat, or the slope is shown.

    python benchmarks/long_run.py [--steps 2000] [--stage sft | ppo] [--json FILE]

A tiny random model is trained in this process. The resident set is read after every step; the slope
is that of a straight line through the second half, in which all caches are filled.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

PAGE = resource.getpagesize()


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE


def measure(stage: str, steps: int) -> dict[str, Any]:
    """Train and look after every step."""
    from running import make_ppo_recipe, make_recipe, train
    from tiny import save_tiny

    from alignkit.runtime.metrics import MetricsFile

    seen: list[int] = []
    write = MetricsFile.write

    def write_and_look(self: MetricsFile, step: int, values: dict[str, float]) -> None:
        write(self, step, values)
        if "loss" in values:
            seen.append(resident())

    MetricsFile.write = write_and_look  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["ALIGNKIT_HOME"] = name
        save_tiny(folder / "base")
        make = make_recipe if stage == "sft" else make_ppo_recipe
        fields = {"max_steps": steps, "learning_rate": 1e-4, "warmup": 0}
        recipe = make(folder, folder / "base", merge=False, training=fields)
        started = time.monotonic()
        train(recipe)
        seconds = time.monotonic() - started
        files = [path for path in (folder / "run").rglob("*") if path.is_file()]
        sizes = {path.name: path.stat().st_size for path in files if path.suffix == ".jsonl"}
        whole = sum(path.stat().st_size for path in files)
        checkpoints = len(list((folder / "run" / "checkpoints").iterdir()))
    half = np.array(seen[steps // 2 :], dtype=np.float64)
    slope = float(np.polyfit(np.arange(len(half)), half, 1)[0])
    return {
        "stage": stage,
        "steps": steps,
        "seconds": round(seconds, 1),
        "resident_mb": {n: round(seen[n - 1] / 1e6, 1) for n in (1, steps // 2, steps)},
        "slope_kb_a_1000_steps": round(slope, 3),  # bytes a step are kB a thousand
        "checkpoints": checkpoints,
        "run_folder_kb": round(whole / 1e3, 1),
        "bytes_a_step": {name: round(size / steps, 1) for name, size in sizes.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--stage", choices=["sft", "ppo"], default="sft")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(options.stage, options.steps)
    text = json.dumps(found, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
