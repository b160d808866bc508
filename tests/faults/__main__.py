"""`python -m tests.faults`: many random faults, and a table of what became of them."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as for pytest: `from running import ...`


def main() -> int:
    """Make faults; the exit code is 1 if a work did not survive one."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="faults to make")
    parser.add_argument("--seed", type=int, default=1, help="draws them")
    parser.add_argument("--write", action="store_true", help="put the table into docs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="alignkit-faults-") as home:
        os.environ["ALIGNKIT_HOME"] = str(Path(home) / "alignkit")
        os.environ.update({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        from commandline import CommandLine

        from faults.engine import make_all, table, write_table
        from faults.workshop import Workshop

        commands, started = CommandLine(), time.monotonic()
        shop = Workshop(Path(home).resolve() / "work", commands)
        try:
            outcomes = make_all(
                shop,
                arguments.count,
                arguments.seed,
                say=lambda text: print(text, flush=True),
            )
        finally:
            shop.close()
            commands.close()
    text = table(outcomes, arguments.seed)
    print(f"\n{text}\n{(time.monotonic() - started) / 60:.1f} minutes")
    if arguments.write:
        write_table(text)
    return int(any(outcome.wrong for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
