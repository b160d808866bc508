"""Commands that read a model: what they print and write on the processor, then on the stand-in."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from running import make_pairs, make_prompts, write_rows

from alignkit.cli.main import main
from standin.counts import counts
from standin.device import device


def compare_commands(runs: Path) -> dict[str, dict[str, Any]]:
    """Name of a command -> `cpu` and `cuda`: what it printed, parsed, and what it wrote, rows or
    hashes of weights; and the launches of the second.

    Args:
        runs: where `compare` left runs of sft and reward in float32.
    """
    policy, judge = (str(runs / stage / "float32" / "cpu") for stage in ("sft", "reward"))
    prompts = str(write_rows(runs / "prompts.jsonl", make_prompts(3)))
    pairs = str(write_rows(runs / "pairs.jsonl", make_pairs(4, seed=9)))
    question = ["how many birds fly", "the cat", "--max-new-tokens", "6"]
    commands = {
        "generate": ["generate", policy, *question],
        "best of": ["generate", policy, *question, "--best-of", "3", "--reward", judge],
        "eval": ["eval", policy],
        "eval of pairs": ["eval", judge, "--data", pairs],
        "label": ["data", "label", policy, prompts, "--reward", judge, "--max-new-tokens", "6"],
        "merge-lora": ["merge-lora", policy],
    }
    return {name: _compare(command, runs / "made") for name, command in commands.items()}


def _compare(command: list[str], folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, where in (("cpu", contextlib.nullcontext()), ("cuda", device())):
        os.environ["ALIGNKIT_DEVICE"] = name
        AcceleratorState._reset_state(True)
        counts.reset()
        written = folder / name / ("pairs.jsonl" if command[0] == "data" else "merged")
        written.parent.mkdir(parents=True, exist_ok=True)
        output = ["--output", str(written)] if command[0] in ("data", "merge-lora") else []
        with where:
            printed = _printed([*command, *output, "--json"])
        made: list[Any] = [
            hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(written.glob("**/*.safetensors"))
        ]
        if written.is_file():
            made = [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()]
        found[name] = {"printed": _without(printed, folder / name), "written": made}
    return {**found, "launches": sum(counts.launches.values())}


def _printed(arguments: list[str]) -> Any:
    out, given = io.StringIO(), sys.argv
    sys.argv = ["alignkit", *arguments]
    try:
        with contextlib.redirect_stdout(out):
            main()
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{arguments} ended with {end.code}") from end
    finally:
        sys.argv = given
    return json.loads(out.getvalue())


def _without(value: Any, folder: Path) -> Any:
    """The value without the folder that it names."""
    return json.loads(json.dumps(value).replace(str(folder), ""))
