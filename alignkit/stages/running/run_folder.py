"""The run folder: who may write into it, and what it says about how it was made."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import yaml

import alignkit
from alignkit.errors import RunError
from alignkit.recipe.planning.plan import Plan
from alignkit.recipe.reading.load import render_recipe
from alignkit.recipe.stages.base import Recipe

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy")


def check_output(recipe: Recipe, *, resume: bool, overwrite: bool) -> Path:
    """The recipe's run folder, if this run may use it. Writes nothing.

    Args:
        recipe: names the folder.
        resume: continue what is there.
        overwrite: replace what is there.

    Raises:
        RunError: the folder holds something else, another recipe's run, or what the run reads.
    """
    folder = Path(recipe.output)
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file", hint="choose another output folder")
    if resume and overwrite:
        raise RunError(
            "--resume continues a run and --overwrite deletes it", hint="give one of the two"
        )
    if overwrite:
        _check_inputs_outside(recipe, folder)
    used = folder.is_dir() and any(child.name != ".lock" for child in folder.iterdir())
    is_run = (folder / "run.json").is_file()
    if used and not is_run:
        raise RunError(
            f"{folder} is not empty and is no run folder",
            hint="choose another folder: output=runs/another-name",
        )
    if resume and is_run:
        _check_same_recipe(recipe, folder)
    elif used and not overwrite:
        raise RunError(
            f"{folder} already holds a run",
            hint="add --resume to continue it, --overwrite to replace it, or choose another "
            "folder: output=runs/another-name",
        )
    return folder


def _check_inputs_outside(recipe: Recipe, folder: Path) -> None:
    paths = [recipe.model.base]
    paths += [s.path for s in (*recipe.data.train, *recipe.data.eval) if s.path is not None]
    for path in paths:
        if Path(path).exists() and Path(path).resolve().is_relative_to(folder.resolve()):
            raise RunError(
                f"{folder} holds {path}, which this run reads: --overwrite would delete it",
                hint="choose another folder: output=runs/another-name",
            )


def _check_same_recipe(recipe: Recipe, folder: Path) -> None:
    if not (folder / "recipe.yaml").is_file():
        return  # killed before it was written
    stored = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    changed = _differences(stored, recipe.as_dict(), "")
    if changed:
        raise RunError(
            f"{folder} was started with another recipe: {'; '.join(changed[:3])}",
            hint="put these keys back to resume, or start anew with --overwrite",
        )


def _differences(old: Any, new: Any, path: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [
            difference
            for key in keys
            for difference in _differences(old.get(key), new.get(key), f"{path}.{key}".strip("."))
        ]
    return [] if old == new else [f"{path} was {old!r}, is {new!r}"]


class RunFolder:
    """A run folder that this process owns until `close`.

    Args:
        path: of the folder; created.
        overwrite: empty it first.

    Raises:
        RunError: another process owns it.
    """

    def __init__(self, path: Path, *, overwrite: bool) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self.lock = (path / ".lock").open("a+")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"{path} is in use by another process", hint="wait for it, or choose another output"
            ) from None
        if overwrite:
            for child in path.iterdir():
                if child.name not in (".lock", "run.json"):  # run.json marks it as a run folder
                    shutil.rmtree(child) if child.is_dir() else child.unlink()
        self.about: dict[str, Any] = {}

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def describe(self, recipe: Recipe, plan: Plan, about: dict[str, Any]) -> None:
        """Write recipe.yaml, plan.json and run.json.

        Args:
            recipe: resolved.
            plan: what is going to be executed.
            about: fingerprints and counts beside the versions that are added here.
        """
        self.about = {"status": "running", "started": _now(), **provenance(), **about}
        self._write_about()
        write_text(self.path / "recipe.yaml", render_recipe(recipe))
        write_text(self.path / "plan.json", json.dumps(plan.to_json(), indent=2) + "\n")

    def finish(self, status: str, **values: Any) -> None:
        """Record how the run ended.

        Args:
            status: `finished`, `interrupted` or `failed`.
            values: further entries of run.json.
        """
        self.about = {**self.about, **values, "status": status, "ended": _now()}
        self._write_about()

    def _write_about(self) -> None:
        write_text(self.path / "run.json", json.dumps(self.about, indent=2, default=str) + "\n")

    def close(self) -> None:
        """Let other processes use the folder."""
        self.lock.close()  # the file stays: removing it would let two processes lock two files


def read_about(folder: Path) -> dict[str, Any]:
    """run.json of a run folder.

    Raises:
        RunError: there is none, or it cannot be read.
    """
    try:
        about: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise RunError(
            f"{folder} is no run folder: run.json cannot be read ({error})",
            hint="start anew with --overwrite, or choose another output",
        ) from None
    return about


def read_plan(folder: Path) -> dict[str, Any]:
    """plan.json of a run folder as plain values."""
    plan: dict[str, Any] = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    return plan


def provenance() -> dict[str, Any]:
    """Versions and commit that made a run."""
    versions = {"python": platform.python_version(), "alignkit": alignkit.__version__}
    for package in _PACKAGES:
        versions[package] = importlib.metadata.version(package)
    return {"versions": versions, "commit": _commit()}


def _commit() -> str:
    """Commit of the alignkit checkout; `unknown` for an installed release."""
    checkout = Path(alignkit.__file__).parent.parent
    if not (checkout / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def write_text(path: Path, text: str) -> None:
    """Replace a file's content at once."""
    scratch = path.with_name(f".{path.name}.writing")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
