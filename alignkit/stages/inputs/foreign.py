"""What a recipe makes this machine execute, fetch or talk to, for a person to see beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from alignkit.models.adapters.files import read_adapter_config
from alignkit.models.base.places import resolve
from alignkit.recipe.assets import show_file
from alignkit.recipe.objectives import CustomSpec
from alignkit.recipe.rewards import (
    FunctionReward,
    JudgeReward,
    ModelReward,
    RewardSource,
    UrlReward,
)
from alignkit.recipe.rules import CodeReward
from alignkit.recipe.stages.base import Recipe


def foreign_parts(recipe: Recipe) -> list[str]:
    """Everything of other people's that a run would execute, fetch or talk to, a line each.

    Args:
        recipe: with its defaults. Nothing of it is executed or opened here but the configurations
            of adapters, which name their bases.
    """
    return list(dict.fromkeys(_parts(recipe)))


def _parts(recipe: Recipe) -> Iterator[str]:
    spec = recipe.model
    if spec.trust_remote_code:
        yield f"executes the Python code that comes with {spec.base} (model.trust_remote_code)"
    if isinstance(recipe.objective, CustomSpec):
        yield f"executes {show_file(Path(recipe.objective.file))} (objective.file)"
    yield from _model(spec.base, "model.base")
    for reward in recipe.reward_sources:
        yield from _reward(reward, "reward")
    if recipe.task_source is not None:
        yield from _reward(recipe.task_source, "task")
    for key, sources in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        for source in sources:
            if source.path is None:
                yield f"fetches {source.hub} from the hub, unless it is in its cache (data.{key})"
    for tracker in recipe.training.trackers:
        if tracker != "tensorboard":  # which writes files
            yield f"sends metrics to {tracker} (training.trackers)"


def _reward(source: RewardSource, key: str) -> Iterator[str]:
    if isinstance(source, FunctionReward):
        file, _, name = source.function.rpartition(":")
        yield f"executes {show_file(Path(file))}, for {name} ({key}.function)"
    if isinstance(source, UrlReward):
        place = _server(source.url)
        yield f"sends prompts, responses and all columns of the rows to {place} ({key}.url)"
    if isinstance(source, JudgeReward):
        yield f"sends prompts and responses to {_server(source.judge)} ({key}.judge)"
    if isinstance(source, CodeReward):
        where = "confined" if source.confined else "NOT confined (confined: false)"
        yield f"executes the programs that the model writes, {where} ({key}.rule)"
    if isinstance(source, ModelReward):
        yield from _model(source.model, "reward.model")


def _server(address: str) -> str:
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc}"


def _model(name: str, key: str) -> Iterator[str]:
    place = resolve(name)
    if place.kind == "hub":
        yield f"fetches {name} from the hub, unless it is in its cache ({key})"
    elif place.unmerged is not None:
        base = str(read_adapter_config(place.unmerged).base_model_name_or_path or "")
        yield f"opens {base}, the base that the adapter in {name} names ({key})"
        if base and resolve(base).kind == "hub":
            yield f"fetches {base} from the hub, unless it is in its cache ({key})"
