"""The run folder: who may write into it, and what it records about its run."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from os.path import exists
from pathlib import Path
from typing import Any

import torch

import alignkit
from alignkit.errors import AlignkitError, FileError, ModelError, RunError
from alignkit.files import (
    list_folder,
    make_folder,
    remove,
    require_folder_name,
    sweep,
    take_lock,
    write_text,
)
from alignkit.models.adapters.finding import base_of
from alignkit.models.base.places import resolve
from alignkit.recipe.planning.plan import Plan
from alignkit.recipe.reading.stored import NAME, remember_recipe, render_recipe
from alignkit.recipe.rewards import ModelReward
from alignkit.recipe.stages.base import Recipe
from alignkit.report.page import NAME as PAGE
from alignkit.report.page import write_report
from alignkit.runtime.processes import ProcessGroup
from alignkit.stages.running.record import make_record, read_record, require_same_recipe
from alignkit.terminal import print_line

NO_PAGE = "ALIGNKIT_NO_REPORT"
"""Variable that keeps a run from writing its page."""

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy")


def check_output(
    recipe: Recipe, *, resume: bool, overwrite: bool, reads: Sequence[Path] = ()
) -> Path:
    """The recipe's run folder, if this run may use it. Writes nothing.

    Args:
        recipe: names the folder.
        resume: continue what is there.
        overwrite: replace what is there.
        reads: further files of this run: the recipe's own.

    Raises:
        FileError: nothing can be read there.
        RunError: the folder holds something else, another recipe's run, or what the run reads.
    """
    folder = Path(recipe.output)
    require_folder_name(folder)
    if resume and overwrite:
        raise RunError(
            "--resume continues a run and --overwrite deletes it", hint="give one of the two"
        )
    if overwrite:
        _check_inputs_outside(recipe, folder, reads)
    used = folder.is_dir() and any(child.name != ".lock" for child in list_folder(folder))
    record = read_record(folder) if used else None
    if used and record is None:
        raise RunError(
            f"{folder} is not empty and is not a run folder",
            hint="choose another folder: output=runs/another-name",
        )
    if resume and record is not None:
        require_same_recipe(recipe, record, folder)
    elif used and not overwrite:
        raise RunError(
            f"{folder} already holds a run",
            hint="add --resume to continue it, --overwrite to replace it, or choose another "
            "folder: output=runs/another-name",
        )
    return folder


def _check_inputs_outside(recipe: Recipe, folder: Path, reads: Sequence[Path]) -> None:
    """Refuse to delete what the run reads; the paths of existing files in a recipe are absolute."""
    named = [text for text in _texts(recipe.as_dict() | {"output": ""}) if text.startswith("/")]
    files = [file for text in named if (file := text if exists(text) else text.rpartition(":")[0])]
    for path in (*files, *map(str, reads), *_bases(recipe)):
        if exists(path) and Path(path).resolve().is_relative_to(folder.resolve()):
            raise RunError(
                f"{folder} holds {path}, which this run reads: --overwrite would delete it",
                hint="choose another folder: output=runs/another-name",
            )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _bases(recipe: Recipe) -> Iterator[str]:
    """Where the weights are that an unmerged adapter in the recipe is based on."""
    rewards = [source.model for source in recipe.reward_sources if isinstance(source, ModelReward)]
    for name in (recipe.model.base, *rewards):
        with contextlib.suppress(ModelError):  # said when the model is looked for
            yield base_of(resolve(name)).location


class RunFolder:
    """A run folder that this process owns until `close`. What it holds stays until `describe`.

    Args:
        path: of the folder; created.

    Raises:
        RunError: another process owns it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.created = [folder for folder in (path, *path.parents) if not folder.exists()]
        make_folder(path)
        lock = take_lock(path / ".lock")
        if lock is None:
            raise RunError(
                f"{path} is in use by another process", hint="wait for it, or choose another output"
            )
        self.lock = lock
        for written in (path, self.checkpoints):
            sweep(written)
        self.about: dict[str, Any] = {}
        self.record: dict[str, Any] = {}

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
            about: fingerprints and counts; the versions are added here.
            overwrite: empty the folder first.
        """
        for child in self.path.iterdir() if overwrite else ():
            if child.name not in (".lock", "run.json"):  # run.json marks it as a run folder
                remove(child)
        new = not (self.path / "run.json").exists()
        self.record = make_record(recipe, plan, about)
        self.about = {"status": "running", "started": _now(), **provenance(), **about}
        try:
            self._write_about()
            resolved = render_recipe(recipe)
            remember_recipe(resolved)
            write_text(self.path / NAME, resolved)
            self.replace_plan(plan)
        except (OSError, FileError):
            if new:  # a full disk: nothing of a run that has not begun stays
                self.about = {}
                for name in ("run.json", NAME, "plan.json"):
                    (self.path / name).unlink(missing_ok=True)
            raise

    def replace_plan(self, plan: Plan) -> None:
        """Write plan.json anew: a resumed run goes on with these passes.

        Args:
            plan: as it is executed from now on.
        """
        write_text(self.path / "plan.json", json.dumps(plan.to_json(), indent=2) + "\n")

    def finish(self, status: str, **values: Any) -> None:
        """Record how the run ended, if it was described.

        Args:
            status: `finished`, `interrupted` or `failed`.
            values: further entries of run.json.

        Raises:
            RunError: the folder has gone.
        """
        if not self.path.is_dir():
            raise RunError(f"{self.path} was removed while the run used it", hint="start it again")
        if self.about:
            self.about = {**self.about, **values, "status": status, "ended": _now()}
            self._write_about()
            self._write_page()

    def _write_page(self) -> None:
        """report.html, which is about the run and no part of it: nothing there may fail it."""
        if os.environ.get(NO_PAGE) == "1":
            return
        try:
            write_report(self.path)
        except Exception as error:
            print_line(f"{PAGE} could not be written: {error}", "warning")

    def _write_about(self) -> None:
        write_text(self.path / "run.json", json.dumps(self.about, indent=2, default=str) + "\n")

    def close(self) -> None:
        """Let other processes use the folder; remove it if it was created and is still empty."""
        if (
            not self.about
            and self.path.is_dir()
            and [child.name for child in self.path.iterdir()] == [".lock"]
        ):
            (self.path / ".lock").unlink()
            with contextlib.suppress(OSError):  # one of them is in use by now
                for folder in self.created:
                    folder.rmdir()
        self.lock.close()


def own_folder(path: Path, leads: bool, processes: ProcessGroup) -> RunFolder | None:
    """The run folder, for the first process; if it cannot have it, no process goes on.

    Args:
        path: of the folder.
        leads: whether this is the first process.
        processes: all of them.

    Raises:
        RunError: another run owns it.
    """
    folder: RunFolder | None = None
    refused: AlignkitError | None = None
    try:
        folder = RunFolder(path) if leads else None
    except AlignkitError as error:
        refused = error
    if processes.reduce(torch.tensor([float(refused is not None)])).item():
        raise refused or RunError(
            f"the first process cannot use {path}", hint="see the error that it printed"
        )
    return folder


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
