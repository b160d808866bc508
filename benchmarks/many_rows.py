"""Seconds and peak memory of `data check`, `clean` and `split` on many short rows.

    python benchmarks/many_rows.py 1000000

Of the rows 2% are copies of others and 2% copies with one other word; the rest are drawn.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SYLLABLES = [
    *("ba", "ko", "ri", "ten", "lo", "mar", "si", "du", "pel", "van"),
    *("to", "ne", "gra", "ul", "che", "fi", "om", "sta", "wi", "zer"),
]
COMMANDS = {
    "check": ["check", "rows.jsonl"],
    "clean": ["clean", "rows.jsonl", "-o", "clean.jsonl", "--preset", "standard"],
    "split": ["split", "rows.jsonl", "--train", "train.jsonl", "--eval", "eval.jsonl"],
}


def write_rows(path: Path, count: int) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(20_000)]
    known: list[dict[str, str]] = []
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            kind = rng.random() if known else 1.0
            if kind < 0.04:
                row = dict(rng.choice(known))
                if kind < 0.02:
                    said = row["completion"].split()
                    said[rng.randrange(len(said))] = "zebra"
                    row["completion"] = " ".join(said)
            else:
                asked, said = (rng.choices(words, k=rng.randint(*n)) for n in ((5, 12), (8, 25)))
                row = {"prompt": " ".join(asked), "completion": " ".join(said)}
            if number % 50 == 0 and len(known) < 20_000:
                known.append(row)
            file.write(json.dumps(row) + "\n")


def measure(arguments: list[str], folder: Path) -> tuple[float, float]:
    """Seconds and gigabytes of one command."""
    begun = time.monotonic()
    command = [sys.executable, "-m", "alignkit", "data", *arguments]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"data {arguments[0]} ended with {os.waitstatus_to_exitcode(status)}")
    return time.monotonic() - begun, usage.ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    count = parser.parse_args().count
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", count)
        size = (folder / "rows.jsonl").stat().st_size / 1e6
        print(f"{count:,} rows, {size:,.0f} MB", flush=True)
        for what, arguments in COMMANDS.items():
            seconds, memory = measure(arguments, folder)
            print(f"{what}: {seconds:,.0f} s, {memory:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
