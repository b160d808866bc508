"""How one stage of a pipeline is checked, recognised and run: one entry for each kind of stage."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.errors import AlignkitError, FileError, ModelError, RunError
from alignkit.files import read_json, require_folder_name, write_text
from alignkit.jobs.label import label_prompts
from alignkit.models.adapters.finding import base_of
from alignkit.models.base.places import resolve
from alignkit.recipe.adapters import FullSpec
from alignkit.recipe.reading.label import LABEL, LabelSpec
from alignkit.recipe.reading.pipeline import TRAINING, Step
from alignkit.recipe.stages.base import Recipe
from alignkit.runtime.checkpoint import stored_state
from alignkit.stages.inputs.fingerprints import label_inputs, training_inputs
from alignkit.stages.registry import run_stage
from alignkit.stages.rollouts.reward_models import require_reward_model
from alignkit.stages.running.run_folder import check_output
from alignkit.stages.running.session import RunOptions
from alignkit.terminal import print_line


@dataclass(frozen=True)
class StageOutput:
    """What is in the output folder of a stage.

    Args:
        mark: a hash that every run of the stage changes.
        status: `finished`, or anything else.
        resumable: whether the stage can continue from it.
        numbers: its results, if it finished.
    """

    mark: str
    status: str
    resumable: bool
    numbers: dict[str, Any]


@dataclass(frozen=True)
class Runner:
    """How stages of one kind are run; `settings` are what the kind's reader returns.

    Args:
        check: raises an AlignkitError for what is wrong with a step before anything has run.
        inputs: settings -> flat entries of everything that decides the result.
        look: settings -> what is in the output folder; None if nothing is.
        run: settings and options -> numbers, such as `steps`, `loss`, `before` and `after`.
    """

    check: Callable[[Step], None]
    inputs: Callable[[Any], dict[str, str]]
    look: Callable[[Any], StageOutput | None]
    run: Callable[[Any, RunOptions], dict[str, Any]]


def _check_training(step: Step) -> None:
    recipe: Recipe = step.settings
    check_output(recipe, resume=False, overwrite=True, reads=step.document.files)
    if ("model", "base") not in step.references:
        try:
            trust = recipe.model.trust_remote_code
            base_of(resolve(recipe.model.base, trust_remote_code=trust))
        except ModelError as error:
            where = step.document.place(("model", "base"))
            raise ModelError(f"{where}: model.base: {error.message}", hint=error.hint) from None


def _look_at_run(recipe: Recipe) -> StageOutput | None:
    folder = Path(recipe.output)
    try:
        content = (folder / "run.json").read_bytes()
    except OSError:
        return None
    try:
        about = read_json(folder / "run.json")
    except FileError:  # a power cut: its checkpoints, if there are any, say what it is
        about = {}
    full = isinstance(recipe.adapter, FullSpec)
    folders = [*([] if full else ["adapter"]), *(["merged"] if full or recipe.merge else [])]
    status = str(about.get("status", "unreadable"))
    if status == "finished" and not all((folder / name).is_dir() for name in folders):
        status = "incomplete"
    resumable = status != "unreadable" or bool(stored_state(folder / "checkpoints"))
    try:
        check_output(recipe, resume=True, overwrite=False)
    except AlignkitError:  # another recipe's run
        resumable = False
    summary = about.get("summary")
    numbers = _numbers(summary) if isinstance(summary, dict) else {}
    return StageOutput(hashlib.sha256(content).hexdigest(), status, resumable, numbers)


def _train(recipe: Recipe, options: RunOptions) -> dict[str, Any]:
    summary = run_stage(recipe, options)
    return {} if summary is None else _numbers(summary.to_json())


def _numbers(summary: dict[str, Any]) -> dict[str, Any]:
    kept = ("steps", "loss", "before", "after")
    return {key: summary[key] for key in kept if key in summary}


PAIRS, ABOUT = "pairs.jsonl", "label.json"
"""The files of a label stage: the pairs, and then their settings, summary and time."""


def _check_label(step: Step) -> None:
    spec: LabelSpec = step.settings
    folder = Path(spec.output)
    require_folder_name(folder)
    if (folder / "run.json").is_file():
        what = "is the folder of a run"
        raise RunError(f"{folder} {what}", hint="choose another output for the stage")
    checks: dict[str, Callable[[str], Any]] = {
        "model": lambda name: base_of(resolve(name)),
        "reward": require_reward_model,
    }
    for key, check in checks.items():
        if (key,) in step.references:
            continue
        try:
            check(getattr(spec, key))
        except ModelError as error:
            where = step.document.place((key,))
            raise ModelError(f"{where}: {key}: {error.message}", hint=error.hint) from None


def _look_at_pairs(spec: LabelSpec) -> StageOutput | None:
    digest, names, about = hashlib.sha256(), [], b""
    for name in (PAIRS, ABOUT):
        path = Path(spec.output) / name
        if path.is_file():
            about = path.read_bytes()
            digest.update(about)
            names.append(name)
    if not names:
        return None
    if names != [PAIRS, ABOUT]:
        return StageOutput(digest.hexdigest(), "incomplete", False, {})
    try:
        numbers = _label_numbers(json.loads(about)["summary"])
    except (ValueError, KeyError, TypeError):  # a power cut: it is labelled anew
        return StageOutput(digest.hexdigest(), "unreadable", False, {})
    return StageOutput(digest.hexdigest(), "finished", False, numbers)


def _label(spec: LabelSpec, options: RunOptions) -> dict[str, Any]:
    folder = Path(spec.output)
    about = folder / ABOUT
    about.unlink(missing_ok=True)  # the pairs count only once this file is there
    (folder / PAIRS).unlink(missing_ok=True)

    def say(text: str) -> None:
        if not options.quiet:
            print_line(text)

    summary = label_prompts(spec, folder / PAIRS, say)
    for line in summary.lines():
        say(line)
    content = {
        "settings": json.loads(spec.model_dump_json()),
        "summary": summary.to_json(),
        "finished": time.time(),  # also tells two runs with the same pairs apart
    }
    write_text(about, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return _label_numbers(summary.to_json())


def _label_numbers(summary: dict[str, Any]) -> dict[str, Any]:
    kept = ("pairs", "prompts", "cut_off", "rewards/mean", "rewards/best", "rewards/worst")
    return {key: summary[key] for key in kept}


RUNNERS: dict[str, Runner] = {
    TRAINING: Runner(_check_training, training_inputs, _look_at_run, _train),
    LABEL: Runner(_check_label, label_inputs, _look_at_pairs, _label),
}
"""Kind of stage, as in `alignkit.recipe.reading.pipeline.READERS` -> how it is run."""
