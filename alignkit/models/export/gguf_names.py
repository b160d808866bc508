"""Which tensors a GGUF file holds, under which names, and how each is laid out.

The format has its own names for tensors, reorders the rows of query and key weights if its rotary
embedding pairs neighbours, and stores Gemma's norms as the factor that multiplies: w + 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig

from alignkit.errors import ModelError
from alignkit.models.quiet import quiet_transformers

try:
    import gguf
except ImportError:  # an optional package, for reading and writing GGUF
    gguf = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Family:
    """What one architecture becomes in a GGUF file.

    Args:
        architecture: its name in the format.
        title: its display name.
        turned: rows of query and key weights are reordered, pairs side by side.
        plus_one: norms are stored as w + 1.
        activation: the only one that readers of the format compute for it.
    """

    architecture: str
    title: str
    turned: bool = False
    plus_one: bool = False
    activation: str = "silu"


_GELU = "gelu_pytorch_tanh"
FAMILIES = {
    "llama": Family("llama", "Llama", turned=True),
    "mistral": Family("llama", "Mistral", turned=True),
    "qwen2": Family("qwen2", "Qwen2"),
    "qwen3": Family("qwen3", "Qwen3"),
    "gemma": Family("gemma", "Gemma", plus_one=True, activation=_GELU),
    "gemma2": Family("gemma2", "Gemma 2", plus_one=True, activation=_GELU),
    "gemma3_text": Family("gemma3", "Gemma 3 (text)", plus_one=True, activation=_GELU),
}
"""Model type of a transformers configuration -> what it becomes."""


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write.

    Args:
        source: its name in the model folder.
        target: its name in the file.
        shape: as stored in the model folder, and in the file.
        heads: how many heads its rows belong to, if they are reordered; 0 if they stay.
        plus_one: 1 is added.
    """

    source: str
    target: str
    shape: tuple[int, ...]
    heads: int = 0
    plus_one: bool = False


def family_of(config: PreTrainedConfig) -> Family:
    """What the model becomes in the format.

    Raises:
        ModelError: the architecture is not supported.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(family.title for family in FAMILIES.values())
        raise ModelError(
            f"{config.model_type} models cannot be exported to GGUF here",
            hint=f"supported: {known}",
        )
    return family


class SourceWeights:
    """The safetensors files of a model folder, read one tensor at a time.

    Args:
        folder: of the model.

    Raises:
        ModelError: there are no such files, or they cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(places.values()))
        else:
            names = sorted(path.name for path in folder.glob("*.safetensors"))
        if not names:
            raise ModelError(
                f"{folder} has no *.safetensors", hint="name a model folder with safetensors files"
            )
        self.place: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name in names:
            with _opened(folder / name) as file:
                for key in file.keys():  # noqa: SIM118
                    self.place[key] = folder / name
                    self.shapes[key] = tuple(file.get_slice(key).get_shape())

    def read(self, name: str) -> torch.Tensor:
        """One tensor in float32, which holds every stored dtype exactly."""
        with _opened(self.place[name]) as file:
            weight: torch.Tensor = file.get_tensor(name)
            return weight.float()


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{path} cannot be read: {error}", hint="copy the file again: it may be cut off"
        ) from None


def plan_tensors(config: PreTrainedConfig, weights: SourceWeights) -> list[PlannedTensor]:
    """Every tensor of the file, in the order of the layers.

    Args:
        config: of the model; says which tensors it must have.
        weights: what is there.

    Raises:
        ModelError: a tensor is missing, has another shape, or has no place in the format.
    """
    family = family_of(config)
    expected = _expected_shapes(config)
    for name, shape in expected.items():
        if weights.shapes.get(name) != shape:
            stored = weights.shapes.get(name, "nothing")
            raise ModelError(
                f"the weights do not fit config.json: {name} must be {shape}, found {stored}",
                hint="copy the model folder again: it is incomplete or mixed up",
            )
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    unknown = sorted(weights.shapes.keys() - expected.keys() - tied)
    if unknown:
        raise ModelError(
            f"the model holds {len(unknown)} tensors that {family.title} has no place for, "
            f"such as {unknown[0]}",
            hint="export the model it was made from, or merge it first",
        )
    arch = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    return [_planned(name, shape, config, family, names) for name, shape in expected.items()]


def _expected_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"), quiet_transformers():
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    return shapes


def _planned(
    source: str, shape: tuple[int, ...], config: PreTrainedConfig, family: Family, names: Any
) -> PlannedTensor:
    target = names.get_name(source, try_suffixes=(".weight", ".bias"))
    if target is None:
        raise ModelError(
            f"GGUF has no name for {source} of {family.title}",
            hint="serve the safetensors folder instead, as with `vllm serve`",
        )
    heads = 0
    if family.turned and ".q_proj." in source:
        heads = config.num_attention_heads
    elif family.turned and ".k_proj." in source:
        heads = config.num_key_value_heads
    return PlannedTensor(
        source, target, shape, heads, family.plus_one and source.endswith("norm.weight")
    )


def laid_out(tensor: PlannedTensor, weight: torch.Tensor) -> torch.Tensor:
    """A weight as the file holds it, before it is rounded.

    Args:
        tensor: its plan.
        weight: float32, as the model folder holds it.
    """
    if tensor.heads:
        weight = turn_rows(weight, tensor.heads)
    return weight + 1 if tensor.plus_one else weight


def turn_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Within each head of D rows, row i and row i + D/2 become rows 2i and 2i + 1.

    transformers rotates the first half of a head against the second; the format's Llama rotates
    neighbours.

    Args:
        weight: `[heads * D, ...]`, or a bias `[heads * D]`.
        heads: of the queries or of the keys.
    """
    halves: torch.Tensor = weight.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2).contiguous()


def stored_tensors(
    plan: list[PlannedTensor], weights: SourceWeights
) -> Iterator[tuple[PlannedTensor, torch.Tensor]]:
    """The tensors of the plan, one after another, as the file holds them before rounding.

    Raises:
        ModelError: a weight is not finite.
    """
    for tensor in plan:
        weight = laid_out(tensor, weights.read(tensor.source))
        if not torch.isfinite(weight).all():
            raise ModelError(
                f"{tensor.source} holds values that are not finite",
                hint="use an earlier checkpoint if training diverged, or copy the file again",
            )
        yield tensor, weight
