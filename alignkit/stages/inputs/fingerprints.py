"""What a stage of a pipeline is made of, so that a pipeline knows whether it has to run again.

Files count by their contents: moved or renamed ones change nothing. Rows of the hub count by their
name and split only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import alignkit
from alignkit.data.templates import template_text
from alignkit.models.adapters.continued import adapter_folder
from alignkit.models.adapters.finding import base_of
from alignkit.models.base.identity import weights_fingerprint
from alignkit.models.base.places import resolve
from alignkit.recipe.assets import find_path
from alignkit.recipe.objectives import CustomSpec
from alignkit.recipe.reading.label import LabelSpec
from alignkit.recipe.rewards import SOURCE_FILES, ModelReward, RewardSource, file_of
from alignkit.recipe.section import Section
from alignkit.recipe.stages.base import Recipe

_BLOCK = 1 << 20


def training_inputs(recipe: Recipe) -> dict[str, str]:
    """Everything that decides what a training stage makes.

    Args:
        recipe: with its defaults; every file that it names exists.

    Returns:
        Flat entries, one of which differs if the result may: each key of the recipe but `output`,
        with its value as JSON, and hashes of the rows, the base, the chat template, the reward
        models and the reward functions, and alignkit's major and minor version.

    Raises:
        ModelError: a model that it names does not exist.
    """
    values = recipe.as_dict()
    del values["output"]
    inputs = {}
    for key, sources in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        for index, source in enumerate(sources):
            path = find_path(source.path) if source.path else None
            if path is not None:
                inputs[f"rows of data.{key}[{index}]"] = _hash_file(path)
                values["data"][key][index]["path"] = None
    spec = recipe.model
    inputs["base"] = model_identity(spec.base, trust_remote_code=spec.trust_remote_code)
    values["model"]["base"] = None
    before = adapter_folder(recipe.adapter)
    if before is not None:
        inputs["adapter"] = adapter_identity(before)
        values["adapter"]["from"] = None
    if spec.chat_template:
        text = template_text(spec.chat_template)
        inputs["chat template"] = hashlib.sha256(text.encode()).hexdigest()
        values["model"]["chat_template"] = None
    loss = objective_fingerprint(recipe.objective)
    if loss is not None:
        inputs["loss function"] = loss
        values["objective"]["file"] = None
    for index, reward in enumerate(recipe.reward_sources):
        values["reward"][index] |= _without_files(reward)
    if recipe.task_source is not None:
        values["task"] |= _without_files(recipe.task_source)
    return inputs | reward_inputs(recipe.reward_sources, recipe.task_source) | _settings(values)


def _without_files(source: RewardSource) -> dict[str, Any]:
    """Keys of a source that name models or files, with what of them is no name of a place."""
    if isinstance(source, ModelReward):
        return {"model": None}
    return {key: getattr(source, key)[len(file) :] for key, file, _ in _files(source)}


def _files(source: RewardSource) -> Iterator[tuple[str, str, Path]]:
    """Key, file as it is named, and path of each file of a source."""
    for key in SOURCE_FILES:
        value = getattr(source, key, None)
        file = file_of(key, value) if value else ""
        path = find_path(file) if file else None
        if path is not None:
            yield key, file, path


def objective_fingerprint(objective: Section) -> str | None:
    """Hash of the file of a user's loss; None for one of our own."""
    return _hash_file(Path(objective.file)) if isinstance(objective, CustomSpec) else None


def reward_inputs(
    rewards: Sequence[RewardSource], task: RewardSource | None = None
) -> dict[str, str]:
    """Hashes of the reward models and of the files that reward sources name.

    Args:
        rewards: of a recipe.
        task: of a recipe.

    Returns:
        `reward model 1`, `reward function 1` and so on -> hash.
    """
    inputs = {}
    sources = {f"{index + 1}": reward for index, reward in enumerate(rewards)}
    for number, source in [*sources.items(), *([("of the task", task)] if task else [])]:
        if isinstance(source, ModelReward):
            inputs[f"reward model {number}"] = model_identity(source.model)
            continue
        for key, _, path in _files(source):
            inputs[f"reward {key} {number}"] = _hash_file(path)
    return inputs


def label_inputs(spec: LabelSpec) -> dict[str, str]:
    """The same as `training_inputs`, for a stage that labels a model's responses.

    Args:
        spec: every file that it names exists.

    Raises:
        ModelError: a model that it names does not exist.
    """
    values = json.loads(spec.model_dump_json(exclude={"output"}))
    inputs = {}
    for index, source in enumerate(spec.prompts):
        path = find_path(source.path) if source.path else None
        if path is not None:
            inputs[f"rows of prompts[{index}]"] = _hash_file(path)
            values["prompts"][index]["path"] = None
    for key in ("model", "reward"):
        inputs[f"weights of {key}"] = model_identity(values[key])
        values[key] = None
    return inputs | _settings(values)


def _settings(values: dict[str, Any]) -> dict[str, str]:
    """Each value as JSON, and the version that reads them."""
    entries = {key: json.dumps(value, ensure_ascii=False) for key, value in _flat(values, "")}
    return entries | {"alignkit": ".".join(alignkit.__version__.split(".")[:2])}


def model_identity(name: str, *, trust_remote_code: bool = False) -> str:
    """A hash of a model's contents, the same wherever and whenever they were written.

    Large weight files are sampled. The adapter next to or under them, the tokenizer and a reward
    model's statistics are read whole, so nothing that a training run changes goes unnoticed.

    Args:
        name: hub id, folder, `.gguf` file, known name, run folder or adapter folder.
        trust_remote_code: run code that comes with the model.

    Raises:
        ModelError: there is no such model.
    """
    digest = hashlib.sha256()
    place = resolve(name, trust_remote_code=trust_remote_code)
    base = base_of(place)
    digest.update(weights_fingerprint(base).encode())
    digest.update(_small_files(Path(base.location)).encode())
    if place.adapter is not None:
        digest.update(adapter_identity(place.adapter).encode())
    return digest.hexdigest()


def adapter_identity(adapter: Path) -> str:
    """A hash of an adapter's contents, without its base.

    Args:
        adapter: PEFT adapter folder.
    """
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config.pop("base_model_name_or_path", None)  # a path, not contents
    lists = {key: sorted(map(str, v)) for key, v in config.items() if isinstance(v, list)}
    digest = hashlib.sha256(json.dumps(config | lists, sort_keys=True).encode())  # PEFT writes sets
    digest.update(_small_files(adapter).encode())
    return digest.hexdigest()


def _small_files(folder: Path) -> str:
    """Hash of the small files that training changes, read whole."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        whole = path.name.startswith(("tokenizer", "adapter_model"))
        if whole or path.name in ("chat_template.jinja", "reward.json"):
            digest.update(f"{path.name}:{_hash_file(path)}".encode())
    return digest.hexdigest()


def describe_changes(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """What differs between two runs of a stage, in words: changed files first, then keys."""
    changes = []
    for key in dict.fromkeys([*new, *old]):
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        hashed = all(value is None or len(value) == 64 for value in (before, after))
        if before is None or after is None:
            changes.append(f"{key} is {'new' if before is None else 'gone'}")
        elif hashed:
            changes.append(f"{key} changed")
        else:
            changes.append(f"{key} was {before}, is {after}")
    return changes


def _flat(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Nested values as `a.b[0].c` and a plain value."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{key}[{index}]")
    else:
        yield key, value


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
