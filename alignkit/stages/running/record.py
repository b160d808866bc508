"""What a run says of itself, so that only the same run is resumed in its folder.

Each checkpoint holds it under a checksum. The small files of the folder (recipe.yaml, run.json,
plan.json) say the same for people and other commands: if one is damaged, the checkpoint counts, and
the resumed run writes the file again.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit.errors import FileError, RecipeError, RunError
from alignkit.files import read_json
from alignkit.models.adapters.continued import adapter_folder
from alignkit.models.base.identity import same_weights, weights_fingerprint
from alignkit.recipe.planning.plan import Plan
from alignkit.recipe.reading.problems import show_value
from alignkit.recipe.reading.stored import NAME, checked_recipe, stored_recipe
from alignkit.recipe.stages.base import Recipe
from alignkit.runtime.checkpoint import stored_state
from alignkit.stages.inputs.fingerprints import adapter_identity, objective_fingerprint
from alignkit.stages.inputs.rows import AnyRows, PromptRows

KEPT_PLAN = ("microbatch_tokens", "gradient_checkpointing")
"""What a resumed run takes from its first plan."""

_KEPT_ABOUT = ("base", "adapter", "data", "rewards", "objective", "start")


_COUNTS = ("kept", "tokens", "trained_tokens")
"""Of a data set; they are the same whenever the same rows become the same tokens."""


@dataclass(frozen=True)
class Record:
    """What a run was started with.

    Args:
        recipe: None if it cannot be read.
        about: the fingerprints; empty if they cannot be read.
        plan: `KEPT_PLAN`; empty if it cannot be read.
        damaged: small files that hold nothing readable, or something else than the checkpoint.
        safe: whether a checkpoint holds the record.
    """

    recipe: Recipe | None = None
    about: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    damaged: tuple[str, ...] = ()
    safe: bool = False

    def warnings(self) -> Iterator[str]:
        """A sentence for each damaged file."""
        for name in self.damaged:
            if self.safe:
                yield f"{name} is damaged: the newest checkpoint says what this run is"
            else:
                yield f"{name} is damaged, and no checkpoint holds a copy: it is not compared"


def make_record(recipe: Recipe, plan: Plan, about: dict[str, Any]) -> dict[str, Any]:
    """The record of a run as plain values, for its checkpoints."""
    kept = {key: about[key] for key in _KEPT_ABOUT if key in about}
    return {
        "recipe": recipe.as_dict(),
        "about": json.loads(json.dumps(kept, default=str)),
        "plan": {key: plan.to_json()[key] for key in KEPT_PLAN},
    }


def describe_inputs(recipe: Recipe, rows: AnyRows) -> dict[str, Any]:
    """The fingerprints of all that a run reads, and the counts of its rows.

    Args:
        recipe: with its defaults.
        rows: of the run.
    """
    data: dict[str, Any] = {}
    for name, dataset in (("train", rows.train), ("eval", rows.held_out)):
        if dataset is not None:
            content = {"fingerprint": dataset.fingerprint, "content": dataset.content}
            data[name] = content | dataset.report.to_json()
    rewards = rows.rewards if isinstance(rows, PromptRows) else {}
    before = adapter_folder(recipe.adapter)
    return {
        "base": {"location": rows.base.location, "fingerprint": weights_fingerprint(rows.base)},
        "adapter": {"fingerprint": None if before is None else adapter_identity(before)},
        "data": data,
        "rewards": rewards,
        "objective": {"fingerprint": objective_fingerprint(recipe.objective)},
    }


def read_record(folder: Path) -> Record | None:
    """What the run in a folder was started with; None if the folder holds no run.

    Args:
        folder: may be missing.
    """
    kept = stored_state(folder / "checkpoints").get("run")
    if kept is None and not (folder / "run.json").is_file():
        return None
    recipe, about, plan = _small_files(folder)
    read: dict[str, Any] = {NAME: recipe, "run.json": about, "plan.json": plan}
    if kept is None:  # written by an earlier version, or killed before the first checkpoint
        damaged = tuple(name for name in read if read[name] is None and (folder / name).exists())
        return Record(recipe, about or {}, plan or {}, damaged)
    safe = checked_recipe(kept["recipe"])
    same = {
        NAME: recipe is not None and not differences(recipe, safe),
        "run.json": about is not None and all(about.get(k) == v for k, v in kept["about"].items()),
        "plan.json": plan == kept["plan"],
    }
    damaged = tuple(name for name in same if not same[name])
    return Record(safe, kept["about"], kept["plan"], damaged, safe=True)


def _small_files(
    folder: Path,
) -> tuple[Recipe | None, dict[str, Any] | None, dict[str, Any] | None]:
    """recipe.yaml, run.json and plan.json; None for what cannot be read."""
    recipe = about = plan = None
    with contextlib.suppress(RecipeError):
        recipe = stored_recipe(folder / NAME)
    with contextlib.suppress(FileError):
        about = read_json(folder / "run.json")
    with contextlib.suppress(FileError):
        values = read_json(folder / "plan.json")
        budget, recompute = (values.get(key) for key in KEPT_PLAN)
        if type(budget) is int and budget > 0 and type(recompute) is bool:
            plan = dict(zip(KEPT_PLAN, (budget, recompute), strict=True))
    return recipe, about, plan


def require_same_recipe(recipe: Recipe, record: Record, folder: Path) -> None:
    """Refuse to resume a run with another recipe.

    Args:
        recipe: with its defaults.
        record: of the run.
        folder: of the run, for messages.

    Raises:
        RunError: a key differs; a file in another folder is no difference.
    """
    changed = [] if record.recipe is None else differences(record.recipe, recipe)
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise RunError(
            f"{folder} was started with another recipe: {'; '.join(changed[:3])}{more}",
            hint="put these keys back to resume, or start anew with --overwrite",
        )


def differences(before: Recipe, now: Recipe) -> list[str]:
    """Keys with other values, in words.

    The output and trust in a model's code are no part of what a run computes. Of a file only the
    name counts: its content is compared by its fingerprint, wherever it is. A dtype that is left
    open is that of the run.
    """
    old, new = before.as_dict(), now.as_dict()
    if new["model"]["dtype"] == "auto":
        new["model"]["dtype"] = old["model"]["dtype"]
    for values in (old, new):
        del values["output"], values["model"]["trust_remote_code"]
    return list(_differences(old, new, ""))


def _differences(old: Any, new: Any, path: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}".strip("."))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (one, two) in enumerate(zip(old, new, strict=True)):
            yield from _differences(one, two, f"{path}[{index}]")
    elif isinstance(old, list) and isinstance(new, list):
        yield f"{path} had {len(old)} entries, has {len(new)}"
    elif _file_name(old) != _file_name(new):
        yield f"{path} was {show_value(old)}, is {show_value(new)}"


def _file_name(value: Any) -> Any:
    """Of an absolute path the last part, of other values all."""
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def require_same_inputs(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Refuse to go on with other weights or rows than those the run was started with.

    Args:
        now: what run.json is going to hold.
        before: what the run's record holds.

    Raises:
        RunError: a fingerprint differs.
    """
    # A function may be fixed after it has failed; a model must stay what it was.
    models = [("rewards", name) for name in now["rewards"] if "model" in name]
    data = [("data", name) for name in now["data"]]
    for keys in (("base",), *data, *models, ("adapter",), ("objective",)):
        new, old = _entry(now, keys), _entry(before, keys)
        kind = "content" if "content" in new and "content" in old else "fingerprint"
        name = {"adapter": "adapter.from", "objective": "objective.file"}.get(keys[0])
        name = name or (keys[-1] if keys[0] == "rewards" else ".".join(keys))
        other = kind in old and not same_weights(new[kind], old[kind])
        same_source = "fingerprint" in old and same_weights(new["fingerprint"], old["fingerprint"])
        counted = any(new[key] != old[key] for key in _COUNTS if key in new and key in old)
        if same_source and (other or counted):
            raise RunError(
                f"{name}: this version of alignkit reads the same rows as other tokens",
                hint="resume with the version that run.json names, or start anew with --overwrite",
            )
        if other:
            raise RunError(
                f"{name} has changed since the run was started",
                hint="put it back to resume, or start anew with --overwrite",
            )


def _entry(about: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """The fingerprints of one input; a damaged or missing one has none."""
    here: Any = about
    for key in keys:
        here = here.get(key) if isinstance(here, dict) else None
    if keys[0] == "rewards" and isinstance(here, str):
        return {"fingerprint": here}
    return here if isinstance(here, dict) else {}
