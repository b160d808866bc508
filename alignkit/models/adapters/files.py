"""Adapters on disk: ordinary PEFT files, and nothing missing or left over when they are read."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, PrefixTuningConfig, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from alignkit.errors import ModelError
from alignkit.models.adapters.patterns import require_quick_patterns
from alignkit.models.adapters.prefix import require_fitting_prefix
from alignkit.models.adapters.tensors import read_weights, require_stored_ranks
from alignkit.models.base.adapter_kinds import KINDS, stored_config
from alignkit.models.base.changes import BaseChanges
from alignkit.models.base.files import reason
from alignkit.models.base.identity import weights_fingerprint
from alignkit.models.base.loading import BaseModel
from alignkit.models.kernels.lora import use_fast_lora
from alignkit.models.peft_parts import make_switchable
from alignkit.models.quiet import quiet_transformers
from alignkit.models.weights.writing import require_finite
from alignkit.recipe.rope import RopeSpec

WEIGHTS = "adapter_model.safetensors"
"""PEFT's name of the file with the tensors."""

TRAINED_OVER = "trained_over.json"
"""Name of the file that records which weights the adapter was trained over; PEFT ignores it."""

_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of PEFT's `init_lora_weights` that leave the base as it is."""

_SAME_BASE = "it must have been trained over the same base"

HEAD_KEY = "base_model.model.score.weight"
"""Where PEFT keeps the trained head of a sequence classifier."""

HEAD_KEYS = (HEAD_KEY, HEAD_KEY.replace("weight", "bias"))
"""The weight of that head, and its bias."""


PLAIN = ("none", "", "")
"""Precision of a base that was not quantized."""


@dataclass(frozen=True)
class TrainedOver:
    """The weights that an adapter was trained over.

    Args:
        name: of the base.
        fingerprint: of its files.
        quantization: `none`, or how they were kept in memory.
        dtype: precision in which they were multiplied; empty in files of older versions.
        rope: scaled positions, as in the recipe.
        tokens: that were added.
        init: where LoRA's factors started.
        device: kind of device that quantized them; empty in files of older versions.
    """

    name: str
    fingerprint: str
    quantization: str = "none"
    dtype: str = ""
    rope: dict[str, Any] | None = None
    tokens: tuple[str, ...] = ()
    init: str = "default"
    device: str = ""

    @property
    def changes(self) -> BaseChanges:
        """What was changed in the base before training."""
        rope = None if self.rope is None else RopeSpec(**self.rope)
        return BaseChanges(rope, tuple(self.tokens))

    @property
    def precision(self) -> tuple[str, str, str]:
        """Of a quantized base: its kind, its dtype, and where it was quantized."""
        if self.quantization == "none":
            return PLAIN
        return self.quantization, self.dtype, self.device or "cpu"


def save_adapter(
    model: PeftModel,
    folder: Path,
    base_name: str,
    head: nn.Linear | None = None,
    adapter: str = "default",
    trained_over: TrainedOver | None = None,
) -> None:
    """Write the adapter as PEFT does.

    Args:
        model: carries the adapter.
        folder: gets `adapter_model.safetensors` and `adapter_config.json`.
        base_name: recorded as the base the adapter belongs to.
        head: scalar head of a reward model; saved where PEFT keeps the `score` layer of a
            sequence classifier, so that plain PEFT loads both.
        adapter: its name in the model.
        trained_over: the base's weights, recorded in a separate file.

    Raises:
        ModelError: a weight is not finite; nothing is written.
    """
    # PEFT would add whole embeddings if the vocabulary has grown; the new rows are enough.
    weights = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    if head is not None:
        weights = {**weights, HEAD_KEY: head.weight}
        if head.bias is not None:
            weights[HEAD_KEYS[1]] = head.bias
    contiguous = {name: w.detach().cpu().contiguous() for name, w in sorted(weights.items())}
    require_finite(contiguous)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
    if trained_over is not None:
        about = dataclasses.asdict(trained_over)
        (folder / TRAINED_OVER).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    config = model.peft_config[adapter].to_dict()
    if "prefix_projection" in config:
        config["prefix_projection"] = False  # the network is not stored
    config["base_model_name_or_path"] = base_name
    config["inference_mode"] = True
    if head is not None:
        whole = [*(config.get("modules_to_save") or []), "score"]
        config["task_type"], config["modules_to_save"] = "SEQ_CLS", whole
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    text = json.dumps(plain, indent=2, sort_keys=True, default=str)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def read_adapter_config(folder: Path) -> Any:
    """PEFT's configuration of an adapter folder.

    Raises:
        ModelError: no adapter there, a kind that is not among `KINDS`, or one whose start changed
            the base.
    """
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds no adapter: there is no adapter_config.json",
            hint="name a run folder, its adapter/, or a folder written by PEFT",
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # a wrong type in the file may end in any error
        raise ModelError(
            f"{folder}/adapter_config.json cannot be read: {reason(error)}",
            hint="the file must be one that PEFT wrote",
        ) from error
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in KINDS:
        raise ModelError(
            f"{folder} is a {kind} adapter, which alignkit does not read",
            hint=f"use one of these kinds: {', '.join(KINDS)}",
        )
    for key in ("layer_replication", "alora_invocation_tokens"):
        if getattr(config, key, None):
            raise ModelError(
                f"the adapter in {folder} uses PEFT's {key}, which cannot be merged into weights",
                hint="use it through PEFT",
            )
    start = getattr(config, "init_lora_weights", True)
    if start not in _STARTS:
        raise ModelError(
            f"the adapter in {folder} started with {start!r}, which changes the base: its weights "
            "are an update of a base that is not stored",
            hint="let PEFT convert it while saving: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)",
        )
    if getattr(config, "prefix_projection", False):
        config.prefix_projection = False  # the file holds the network's output, not the network
    return config


def load_adapter(model: PreTrainedModel, folder: Path) -> Any:
    """Base with an adapter from disk, for inference.

    Args:
        model: the base the adapter was trained on.
        folder: PEFT adapter folder. The head of a reward model is not loaded: see `read_head`.

    Returns:
        A PEFT model in evaluation mode.

    Raises:
        ModelError: the adapter does not fit the model.
    """
    config = read_adapter_config(folder)
    if has_head(folder):
        whole = [name for name in config.modules_to_save or [] if name != "score"]
        config.task_type, config.modules_to_save = "CAUSAL_LM", whole or None
    require_fitting_prefix(config, model, folder)
    require_quick_patterns(config, model.state_dict, folder)
    require_stored_ranks(config, folder)
    if isinstance(config, PrefixTuningConfig):
        config.task_type = "CAUSAL_LM"  # without a task, PEFT's forward leaves the prefix out
    stored = read_weights(folder)
    with fitting(folder, hint="name the base it was trained on with --base"):
        loaded = PeftModel.from_pretrained(model, str(folder), config=config, torch_device="cpu")
    _require_whole(folder, set(stored) - set(HEAD_KEYS), loaded)
    use_fast_lora(loaded)
    make_switchable(loaded)
    return loaded.eval()


def put_weights(model: PeftModel, folder: Path, adapter: str = "default") -> None:
    """Load stored weights into a fresh adapter; a head that is stored with them is not read.

    Args:
        model: carries an adapter of the stored one's shape.
        folder: PEFT adapter folder.
        adapter: its name in the model.

    Raises:
        ModelError: a tensor is missing, left over, damaged or of another shape.
    """
    stored = {name: w for name, w in read_weights(folder).items() if name not in HEAD_KEYS}
    with fitting(folder):
        set_peft_model_state_dict(model, stored, adapter_name=adapter)
    own = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    odd = sorted(own.keys() ^ stored.keys())
    if odd:
        raise ModelError(
            f"the adapter in {folder} does not fit the base: {odd[0]} has no counterpart",
            hint=_SAME_BASE,
        )


@contextlib.contextmanager
def fitting(folder: Path, hint: str = _SAME_BASE) -> Iterator[None]:
    """Turn what PEFT raises while it puts an adapter on a model into one error with a hint."""
    try:
        with quiet_transformers():
            yield
    except Exception as error:
        lines = [line.strip() for line in str(error).split("\n") if line.strip()]
        raise ModelError(
            f"the adapter in {folder} does not fit the base: {' '.join(lines[:2])[:300]}", hint=hint
        ) from error


def _require_whole(folder: Path, stored: set[str], loaded: PeftModel) -> None:
    """Refuse missing or extra tensors: PEFT fills in fresh weights, and skips what has no place."""
    expected = set(get_peft_model_state_dict(loaded, save_embedding_layers=False))
    missing, odd = sorted(expected - stored), sorted(stored - expected - set(loaded.state_dict()))
    if missing:
        raise ModelError(
            f"the adapter in {folder} is incomplete: {len(missing)} of {len(expected)} tensors are "
            f"missing, such as {missing[0]}",
            hint="copy the folder again, or name the base it was trained on with --base",
        )
    if odd:
        raise ModelError(
            f"the adapter in {folder} does not fit the base: {len(odd)} of its {len(stored)} "
            f"tensors have no place there, such as {odd[0]}",
            hint="name the base it was trained on with --base",
        )


def require_base(adapter: Path, base: BaseModel) -> None:
    """Refuse a base that an adapter was not trained over, if its folder records which it was.

    Raises:
        ModelError: the base has other weights.
    """
    over = trained_over(adapter)
    there = Path(base.location).is_dir() and base.unmerged is None
    if over is None or "@" in over.fingerprint or not there:
        return  # written by PEFT, known only by a hub commit, or still to be merged
    if over.fingerprint != weights_fingerprint(base):
        raise ModelError(
            f"the adapter in {adapter} was trained over other weights than those of {base.name}",
            hint="name the base it was trained on with --base; `alignkit merge-lora --any-base` "
            "puts it on this one anyway",
        )


def trained_over(adapter: Path) -> TrainedOver | None:
    """The weights that an adapter was trained over, if its folder records them."""
    path = adapter / TRAINED_OVER
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        over = TrainedOver(**{**values, "tokens": tuple(values.get("tokens", ()))})
        hash(over.changes)  # as far as they are values of a recipe
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{path} cannot be read: {reason(error)}",
            hint="copy the folder again, or remove this file",
        ) from error
    return over


def is_plain_lora(adapter: Path) -> bool:
    """Whether an adapter folder holds LoRA and nothing else but a reward model's head."""
    config = read_adapter_config(adapter)
    if config.peft_type != "LORA" or config.trainable_token_indices:
        return False
    return not set(config.modules_to_save or []) - {"score"}


def has_head(folder: Path) -> bool:
    """Whether an adapter folder is that of a reward model."""
    return stored_config(folder).get("task_type") == "SEQ_CLS"
