"""The reward models that a PPO recipe names: where they are, and whether they share its base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from alignkit.errors import ModelError
from alignkit.models.adapters.files import has_head, is_plain_lora
from alignkit.models.adapters.finding import base_of, base_of_adapter, tokenizer_of
from alignkit.models.base.fitness import is_classifier
from alignkit.models.base.identity import weights_fingerprint
from alignkit.models.base.loading import BaseModel, load_tokenizer
from alignkit.models.base.places import resolve
from alignkit.models.rewards.head import RewardStatistics, read_head, read_statistics
from alignkit.recipe.rewards import ModelReward


@dataclass(frozen=True)
class RewardModel:
    """A reward model on disk.

    Args:
        spec: of the recipe.
        folder: with the head: the adapter's, or the classifier's.
        shared: whether it is an adapter over the policy's own base.
        statistics: measured by its run; None if it stored none.
    """

    spec: ModelReward
    folder: Path
    shared: bool
    statistics: RewardStatistics | None

    @property
    def factor(self) -> float:
        """What a raw reward is multiplied by, after the mean is subtracted."""
        normalize = self.spec.normalize and self.statistics is not None
        return 1.0 / (self.statistics.std if normalize and self.statistics else 1.0)

    @property
    def mean(self) -> float:
        """What is subtracted from a raw reward."""
        normalize = self.spec.normalize and self.statistics is not None
        return self.statistics.mean if normalize and self.statistics else 0.0

    def head(self) -> nn.Linear:
        """The scalar head."""
        return read_head(self.folder)


def find_reward_model(
    spec: ModelReward, base: BaseModel, tokenizer: PreTrainedTokenizerBase, *, can_share: bool
) -> RewardModel:
    """The reward model that a recipe names.

    Args:
        spec: names a run of the reward stage, its adapter or its merged model.
        base: of the policy.
        tokenizer: of the policy.
        can_share: whether the policy is an adapter, so that its base can hold another.

    Raises:
        ModelError: it is not a reward model, was trained over another base, has other tokens, or
            lacks the statistics that `normalize` needs.
    """
    name = spec.model
    if not Path(name).expanduser().exists():
        raise ModelError(
            f"reward.model does not exist: {name!r}",
            hint="name a run of the reward stage; `alignkit reward RECIPE` trains one",
        )
    place = resolve(name)
    if place.adapter is not None and has_head(place.adapter):
        shared = _over_adapter(spec, place.adapter, base, tokenizer, can_share)
        if shared is not None:
            return _checked(shared)
    whole = place.whole()
    if not is_classifier(whole):
        raise ModelError(
            f"reward.model {name} is not a reward model: it has no scalar head",
            hint="name a run of the reward stage, its adapter/ or its merged/",
        )
    check_tokens(name, load_tokenizer(whole), tokenizer)
    folder = Path(whole.location)
    return _checked(RewardModel(spec, folder, False, read_statistics(folder)))


def require_reward_model(name: str) -> BaseModel:
    """The model with the tokenizer of a reward model that is loaded on its own.

    Args:
        name: run of the reward stage, its adapter or its merged model.

    Raises:
        ModelError: there is no such model, or it has no scalar head.
    """
    if not Path(name).expanduser().exists():
        raise ModelError(
            f"there is no reward model {name!r}",
            hint="name a run of the reward stage; `alignkit reward RECIPE` trains one",
        )
    place = resolve(name)
    adapter, base = place.adapter, base_of(place)
    if not is_classifier(base) and not (adapter is not None and has_head(adapter)):
        raise ModelError(
            f"{name} is not a reward model: it has no scalar head",
            hint="name a run of the reward stage, its adapter/ or its merged/",
        )
    return base if adapter is None else tokenizer_of(adapter, base)


def _over_adapter(
    spec: ModelReward,
    adapter: Path,
    base: BaseModel,
    tokenizer: PreTrainedTokenizerBase,
    can_share: bool,
) -> RewardModel | None:
    """The model as an adapter over the policy's base; None if it must be loaded on its own."""
    own = base_of_adapter(adapter, None)
    # A base that is not merged yet has no weights to compare: the run compares them later.
    same = base.unmerged is not None or weights_fingerprint(own) == weights_fingerprint(base)
    same = same and own.changes == base.changes
    if same and can_share and is_plain_lora(adapter) and not spec.separate:  # PEFT mixes no kinds
        if (adapter / "tokenizer_config.json").is_file():
            check_tokens(spec.model, load_tokenizer(BaseModel(str(adapter))), tokenizer)
        return RewardModel(spec, adapter, True, read_statistics(adapter))
    if not same and not spec.separate:
        raise ModelError(
            f"the reward model {spec.model} was trained over another base ({own.name}) than the "
            f"policy's ({base.name}), so it cannot share its weights",
            hint="train it over the policy's base, as in `alignkit reward RECIPE "
            f"model.base={base.name}`, or set reward.separate=true to load a second model",
        )
    return None


def check_tokens(name: str, theirs: Any, ours: Any) -> None:
    """The same text must become the same ids; further tokens, such as padding, do no harm.

    Args:
        name: of the reward model.
        theirs: its tokenizer.
        ours: of the policy.

    Raises:
        ModelError: a token has another id, or is unknown to the reward model.
    """
    known = theirs.get_vocab()
    odd = next((token for token, i in ours.get_vocab().items() if known.get(token) != i), None)
    if odd is not None:
        raise ModelError(
            f"the reward model {name} reads other tokens than the policy writes: {odd!r} is "
            f"{ours.get_vocab()[odd]} to the policy and {known.get(odd, 'unknown')} to it",
            hint="use a reward model with the policy's tokenizer",
        )


def _checked(model: RewardModel) -> RewardModel:
    if model.spec.normalize and model.statistics is None:
        raise ModelError(
            f"the reward model {model.spec.model} stores no mean and standard deviation to "
            "normalize by",
            hint="set reward.normalize=false to use its rewards as they are",
        )
    return model
