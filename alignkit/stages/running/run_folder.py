"""The run folder: who may write into it, and what it says about how it was made."""

from __future__ import annotations

import contextlib
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

import alignkit
from alignkit.errors import RecipeError, RunError
from alignkit.files import list_folder, write_text
from alignkit.models.base.identity import same_weights
from alignkit.recipe.planning.plan import Plan
from alignkit.recipe.reading.stored import NAME, remember_recipe, render_recipe, stored_recipe
from alignkit.recipe.stages.base import Recipe
from alignkit.runtime.progress import print_line

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
    used = folder.is_dir() and any(child.name != ".lock" for child in list_folder(folder))
    is_run = (folder / "run.json").is_file()
    if used and not is_run:
        raise RunError(
            f"{folder} is not empty and is not a run folder",
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
    if not (folder / NAME).is_file():
        return  # killed before it was written
    try:
        # with the defaults of keys that the version which wrote it did not know
        stored = stored_recipe(folder / NAME).as_dict()
    except RecipeError:
        # Rows, weights and micro-batches are checked below; a checkpoint is worth more than this.
        print_line(f"{folder / NAME} is damaged: the recipe of this run is not compared", "warning")
        return
    stored["model"]["trust_remote_code"] = recipe.model.trust_remote_code
    changed = _differences(stored, recipe.as_dict(), "")
    if changed:
        raise RunError(
            f"{folder} was started with another recipe: {'; '.join(changed[:3])}",
            hint="put these keys back to resume, or start anew with --overwrite",
        )


def check_same_inputs(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Refuse to go on with other weights or rows than those the run was started with.

    Args:
        now: what run.json is going to say.
        before: what it says.

    Raises:
        RunError: a fingerprint differs.
    """
    pairs = [("base", now["base"], before.get("base"))]
    pairs += [
        (f"data.{name}", now["data"][name], before.get("data", {}).get(name))
        for name in now["data"]
    ]
    stored = before.get("rewards", {})
    # A function may be fixed after it has failed; a model must stay what it was.
    models = {name: new for name, new in now["rewards"].items() if "model" in name}
    pairs += [
        (name, {"fingerprint": new}, {"fingerprint": stored[name]} if name in stored else None)
        for name, new in models.items()
    ]
    pairs.append(("adapter.from", now["adapter"], before.get("adapter")))
    pairs.append(("objective.file", now["objective"], before.get("objective")))
    for name, new, old in pairs:
        counts = [key for key in ("kept", "tokens", "trained_tokens") if old and key in old]
        if old is not None and any(new[key] != old[key] for key in counts):
            raise RunError(
                f"{name}: this version of alignkit reads the same rows as other tokens",
                hint="resume with the version that run.json names, or start anew with --overwrite",
            )
        if old is not None and not same_weights(new["fingerprint"], old["fingerprint"]):
            raise RunError(
                f"{name} has changed since the run was started",
                hint="put it back to resume, or start anew with --overwrite",
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
    """A run folder that this process owns until `close`. What it holds stays until `describe`.

    Args:
        path: of the folder; created.

    Raises:
        RunError: another process owns it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.made = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        lock = path / ".lock"
        try:
            self.lock = lock.open("a+")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last owner may have removed the file since: another process may lock a new one.
            owned = os.path.samestat(os.fstat(self.lock.fileno()), lock.stat())
        except (BlockingIOError, FileNotFoundError):
            owned = False
        if not owned:
            raise RunError(
                f"{path} is in use by another process", hint="wait for it, or choose another output"
            )
        self.about: dict[str, Any] = {}

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def describe(
        self, recipe: Recipe, plan: Plan, about: dict[str, Any], *, overwrite: bool
    ) -> None:
        """Write recipe.yaml, plan.json and run.json.

        Args:
            recipe: resolved.
            plan: what is going to be executed.
            about: fingerprints and counts beside the versions that are added here.
            overwrite: empty the folder first.
        """
        for child in self.path.iterdir() if overwrite else ():
            if child.name not in (".lock", "run.json"):  # run.json marks it as a run folder
                shutil.rmtree(child) if child.is_dir() else child.unlink()
        self.about = {"status": "running", "started": _now(), **provenance(), **about}
        self._write_about()
        resolved = render_recipe(recipe)
        remember_recipe(resolved)
        write_text(self.path / NAME, resolved)
        write_text(self.path / "plan.json", json.dumps(plan.to_json(), indent=2) + "\n")

    def finish(self, status: str, **values: Any) -> None:
        """Record how the run ended; nothing of one that was not described.

        Args:
            status: `finished`, `interrupted` or `failed`.
            values: further entries of run.json.
        """
        if self.about:
            self.about = {**self.about, **values, "status": status, "ended": _now()}
            self._write_about()

    def _write_about(self) -> None:
        write_text(self.path / "run.json", json.dumps(self.about, indent=2, default=str) + "\n")

    def close(self) -> None:
        """Let other processes use the folder; one that was empty and still is goes again."""
        if not self.about and [child.name for child in self.path.iterdir()] == [".lock"]:
            (self.path / ".lock").unlink()
            with contextlib.suppress(OSError):  # one of them is used by now
                for folder in self.made:
                    folder.rmdir()
        self.lock.close()


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


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
