"""`alignkit doctor`: what this machine has, and what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

import alignkit
from alignkit.cli.output import print_json, print_pairs, say, stdout
from alignkit.cli.versions import outside_versions

REQUIRED = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "pydantic")
OPTIONAL = {
    "gguf": "reads GGUF files and fetched models: pip install 'alignkit[gguf]'",
    "bitsandbytes": "quantized bases and 8-bit optimizers: pip install 'alignkit[quantization]'",
    "trl": "comparison with TRL: pip install 'alignkit[peers]'",
    "tensorboard": "the tensorboard tracker: pip install 'alignkit[trackers]'",
}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show versions, device, memory and disk, and name what would stop a run."""
    facts, problems = _examine()
    warnings = outside_versions() + _broken_stages()
    if as_json:
        print_json({**facts, "problems": problems, "warnings": warnings})
    else:
        for title, values in facts.items():
            print_pairs([(name, str(value)) for name, value in values.items()], title)
        for warning in warnings:
            say(f"warning: {warning}")
        for problem in problems:
            say(f"problem: {problem}")
        stdout.print(_verdict(len(problems), len(warnings)))
    if problems:
        raise typer.Exit(2)


def _verdict(problems: int, warnings: int) -> str:
    """The last line: whether a run can start on this machine."""
    if problems:
        return f"not ready: {problems} problem{'s' * (problems > 1)}"
    if warnings:
        return f"ready, with {warnings} warning{'s' * (warnings > 1)}"
    return "ready: no problems found"


def _broken_stages() -> list[str]:
    from alignkit.recipe.stages.registry import broken_stages

    return [f"{error.message}; {error.hint}" for error in broken_stages().values()]


def _examine() -> tuple[dict[str, dict[str, Any]], list[str]]:
    problems = []
    packages = {"alignkit": alignkit.__version__}
    for name in REQUIRED:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "missing"
            problems.append(f"{name} is not installed: pip install -e .")
    optional = {
        name: importlib.metadata.version(name) if importlib.util.find_spec(name) else f"no; {use}"
        for name, use in OPTIONAL.items()
    }
    from alignkit.recipe.assets import alignkit_home
    from alignkit.runtime.devices import describe_hardware
    from alignkit.runtime.precision import describe_precision
    from alignkit.runtime.tuning import tune_device

    tune_device()
    hardware = describe_hardware()
    machine = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": hardware.device,
        "processor": hardware.name,
        "threads": hardware.cores,
        "free memory": f"{hardware.memory / 1e9:.1f} GB",
        "precision": describe_precision(hardware.device),
    }
    home = alignkit_home()
    known = home / "models"
    place = home if home.exists() else Path.home()
    storage = {
        "alignkit home": str(home),
        "models": ", ".join(p.name for p in known.glob("[!.]*")) if known.is_dir() else "none yet",
        "free disk": f"{shutil.disk_usage(place).free / 1e9:.1f} GB",
        "hub": "offline (HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE") else "online",
    }
    if shutil.disk_usage(place).free < 2e9:
        problems.append(f"less than 2 GB of disk is free at {place}")
    if hardware.memory < 2e9:
        problems.append("less than 2 GB of memory is free")
    facts: dict[str, dict[str, Any]]
    facts = {"packages": packages, "optional": optional, "machine": machine, "storage": storage}
    return facts, problems
