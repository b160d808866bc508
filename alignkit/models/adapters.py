"""Adapters over one base: attach, report, save. The files are ordinary PEFT files."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from alignkit.errors import ModelError
from alignkit.models.loading import quiet_transformers, share_files
from alignkit.models.lora_linear import use_fast_lora
from alignkit.recipe.schema import FullSpec, LoraSpec

HEAD_KEY = "base_model.model.score.weight"
"""Where PEFT keeps the trained head of a sequence classifier."""


@dataclass(frozen=True)
class TrainableReport:
    """What is trained.

    Args:
        trainable: number of trained weights.
        total: number of all weights, shared ones once.
        modules: name of the last part of each adapted module -> how many of them.
    """

    trainable: int
    total: int
    modules: dict[str, int]


def linear_names(model: nn.Module) -> dict[str, int]:
    """Last name part of every linear layer except the output head -> how many there are."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    names: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            last = name.rsplit(".", 1)[-1]
            names[last] = names.get(last, 0) + 1
    return names


def check_targets(model: nn.Module, spec: LoraSpec) -> None:
    """Make sure every target names at least one layer that can carry an adapter.

    Raises:
        ModelError: a target matches nothing; the hint lists near names.
    """
    known = linear_names(model)
    every = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = spec.targets
    if isinstance(targets, str):
        if targets == "all-linear":
            return
        try:
            found = any(re.fullmatch(targets, name) for name in every)
        except re.error as error:
            raise ModelError(
                f"adapter.targets is no regular expression: {targets!r} ({error})",
                hint="use a list of module names, or all-linear",
            ) from None
        missing = [] if found else [targets]
    else:
        missing = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in every)]
    if missing:
        near = [m for t in missing for m in difflib.get_close_matches(t, known, n=2)]
        hint = f"did you mean {', '.join(dict.fromkeys(near))}? " if near else ""
        raise ModelError(
            f"adapter.targets matches no linear layer: {', '.join(map(repr, missing))}",
            hint=f"{hint}this model has {', '.join(known)}",
        )


def attach_adapter(model: Any, spec: LoraSpec | FullSpec, seed: int) -> Any:
    """Make the model trainable the way the recipe says.

    Args:
        model: a frozen or plain causal language model.
        spec: LoRA, or all weights.
        seed: of the adapter's random half; the other half starts at zero.

    Returns:
        A PEFT model whose adapter weights are float32, or the model itself with every weight
        trainable in float32.
    """
    if isinstance(spec, FullSpec):
        return model.float().requires_grad_(True)
    check_targets(model, spec)
    targets = spec.targets if isinstance(spec.targets, str) else list(spec.targets)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    model.requires_grad_(False)
    torch.manual_seed(seed)
    with quiet_transformers():
        adapted = get_peft_model(model, config)
    use_fast_lora(adapted)
    return adapted


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model without its adapters and without gradients, for the length of the block.

    Only a flag of each layer is turned, so which weights are trained does not change. No graph can
    be made inside: one whose backward pass runs under other adapters would be silently wrong.

    Args:
        model: carries adapters somewhere inside.

    Raises:
        ModelError: it has none, so that nothing could be turned off.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        raise ModelError("there is no adapter to turn off", hint="set reference.kind to cached")
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        with torch.no_grad():
            yield
    finally:
        for layer, was_off in zip(layers, before, strict=True):
            layer._disable_adapters = was_off


def trainable_report(model: nn.Module) -> TrainableReport:
    """How many weights are trained, and in which modules."""
    modules: dict[str, int] = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and len(module.lora_A):
            last = name.rsplit(".", 1)[-1]
            modules[last] = modules.get(last, 0) + 1
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return TrainableReport(trained, sum(p.numel() for p in parameters), modules)


def save_adapter(
    model: PeftModel,
    folder: Path,
    base_name: str,
    head: nn.Linear | None = None,
    adapter: str = "default",
) -> None:
    """Write the adapter as PEFT does.

    Args:
        model: carries the adapter.
        folder: gets `adapter_model.safetensors` and `adapter_config.json`.
        base_name: recorded as the base the adapter belongs to.
        head: scalar head of a reward model; saved where PEFT keeps the `score` layer of a
            sequence classifier, so that plain PEFT loads both.
        adapter: its name in the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(model, adapter_name=adapter)
    if head is not None:
        weights = {**weights, HEAD_KEY: head.weight}
        if head.bias is not None:
            weights[HEAD_KEY.replace("weight", "bias")] = head.bias
    contiguous = {name: w.detach().cpu().contiguous() for name, w in sorted(weights.items())}
    save_file(contiguous, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config[adapter].to_dict()
    config["base_model_name_or_path"] = base_name
    config["inference_mode"] = True
    if head is not None:
        config["task_type"], config["modules_to_save"] = "SEQ_CLS", ["score"]
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    text = json.dumps(plain, indent=2, sort_keys=True, default=str)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    share_files(folder)


def read_adapter_config(folder: Path) -> Any:
    """PEFT's configuration of an adapter folder.

    Raises:
        ModelError: no adapter there, or a kind that is no LoRA.
    """
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds no adapter: there is no adapter_config.json",
            hint="name a run folder, its adapter/, or a folder written by PEFT",
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError, OSError) as error:
        first_line = str(error).split("\n")[0]
        raise ModelError(
            f"{folder}/adapter_config.json cannot be read: {first_line}",
            hint="the file must be one that PEFT wrote",
        ) from error
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise ModelError(
            f"{folder} is a {config.peft_type} adapter, not a LoRA one",
            hint="only LoRA adapters can be merged so far",
        )
    return config


def load_adapter(model: Any, folder: Path) -> Any:
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
        config.task_type, config.modules_to_save = "CAUSAL_LM", None
    try:
        with quiet_transformers():
            loaded = PeftModel.from_pretrained(model, str(folder), config=config)
    except Exception as error:
        lines = [line.strip() for line in str(error).split("\n") if line.strip()]
        raise ModelError(
            f"the adapter in {folder} does not fit the base: {' '.join(lines[:2])[:300]}",
            hint="name the base it was trained on with --base",
        ) from error
    use_fast_lora(loaded)
    return loaded.eval()


def has_head(folder: Path) -> bool:
    """Whether an adapter folder is that of a reward model."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return False
    values = json.loads(path.read_text(encoding="utf-8"))
    return values.get("task_type") == "SEQ_CLS"
