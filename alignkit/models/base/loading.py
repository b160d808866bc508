"""Configurations, tokenizers and weights from the hub, a folder or a GGUF file."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file

from alignkit.errors import ModelError
from alignkit.models.base.changes import (
    UNCHANGED,
    BaseChanges,
    add_tokens,
    grow_model,
    new_ids,
    scale_positions,
)
from alignkit.models.base.files import forget_gguf, reading, require_whole, stored_shapes
from alignkit.models.base.tokenizers import always_cut_alike, require_template
from alignkit.models.heap import release_memory
from alignkit.models.kernels.quantized import multiply_dense

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "int8": {"load_in_8bit": True},
}
"""Name in a recipe -> settings of bitsandbytes for the storage; products are our own."""


@dataclass(frozen=True)
class BaseModel:
    """Where a base model is.

    Args:
        location: folder or hub id.
        gguf: name of the GGUF file inside the folder; None for safetensors.
        trust_remote_code: run code that comes with the model.
        changes: applied whenever it is read.
        unmerged: adapter that is merged into it before it has weights; until then this names
            the configuration and the tokenizer that the merge will write.
        stored: the configuration in its files, once it has been read.
    """

    location: str
    gguf: str | None = None
    trust_remote_code: bool = False
    changes: BaseChanges = UNCHANGED
    unmerged: Path | None = None
    stored: list[Any] = field(default_factory=list, compare=False, repr=False)

    @property
    def name(self) -> str:
        """What `resolve` takes to find this model again."""
        return str(Path(self.location) / self.gguf) if self.gguf else self.location

    @property
    def options(self) -> dict[str, Any]:
        """Arguments that every `from_pretrained` takes."""
        options: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.gguf:
            # A bare name would be looked for in the working folder first.
            options["gguf_file"] = str((Path(self.location) / self.gguf).absolute())
        return options


def load_tokenizer(base: BaseModel, template: str | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Args:
        base: see `resolve`.
        template: Jinja source that replaces the model's chat template; None keeps it.

    Returns:
        A transformers tokenizer that pads on the right and cuts a text always alike.
    """
    with reading(base.name, "the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(base.location, **base.options)
        always_cut_alike(tokenizer, base.name)
        ids = tokenizer("Hello", add_special_tokens=False)["input_ids"]
        if template is None:
            require_template(tokenizer.chat_template)
    # Without its files transformers silently makes an empty one for some families.
    if not set(ids) - {tokenizer.unk_token_id}:
        raise ModelError(
            f"the tokenizer of {base.location!r} is empty: it can read no text",
            hint="put the tokenizer's files, such as tokenizer.json, into the folder",
        )
    add_tokens(tokenizer, base.changes.tokens)
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.padding_side = "right"
    return tokenizer


def token_rows(base: BaseModel) -> tuple[list[int], list[list[int]]]:
    """Ids of the tokens that are added to a base, and what each was split into before."""
    tokens = base.changes.tokens
    if not tokens:
        return [], []
    tokenizer = load_tokenizer(replace(base, changes=UNCHANGED))
    pieces = add_tokens(tokenizer, tokens)
    return new_ids(tokenizer, tokens), pieces


def load_config(base: BaseModel) -> PreTrainedConfig:
    """The model's configuration, a copy for the caller; the files are read once."""
    config = copy.deepcopy(_stored_config(base))
    if base.changes.rope is not None:
        scale_positions(config, base.changes.rope)
    text, changes = config.get_text_config(), base.changes
    if changes.resizes:
        text.vocab_size = changes.rows or max(text.vocab_size, max(token_rows(base)[0]) + 1)
    return config


def _stored_config(base: BaseModel) -> Any:
    """The configuration in the model's files, once nothing in it makes transformers fetch more.

    Raises:
        ModelError: it cannot be read, is that of an adapter, or names code of the hub.
    """
    if base.stored:
        return base.stored[0]
    with reading(base.name, "the configuration"):
        if not Path(base.location).is_dir() and find_adapter_config_file(base.location):
            raise ModelError(
                f"{base.location} is an adapter on the hub",
                hint=f"run `hf download {base.location} --local-dir FOLDER` and name the folder",
            )
        values, _ = PreTrainedConfig.get_config_dict(base.location, **base.options)
        for key, value in _implementations(values):
            raise ModelError(
                f"config.json of {base.location!r} asks for code from the hub: {key} = {value!r}",
                hint=f"remove {key} from its config.json",
            )
        for key in _SIZES & values.keys():
            if type(value := values[key]) is int and value < 1:
                raise ValueError(f"{key} must be at least 1, got {value}")
        config = AutoConfig.from_pretrained(base.location, **base.options)
        named = getattr(config, "architectures", None) or []
        if not isinstance(named, list) or not all(isinstance(one, str) for one in named):
            raise ValueError(f"architectures must be a list of names, got {named!r}")
        base.stored.append(config)
    return base.stored[0]


_SIZES = {"hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"}
_SIZES |= {"intermediate_size", "vocab_size", "max_position_embeddings"}


def _implementations(values: Any) -> Iterator[tuple[str, str]]:
    """Keys, at any depth, whose values transformers would take for the name of a hub repository."""
    for key, value in values.items() if isinstance(values, dict) else ():
        named = value.values() if isinstance(value, dict) else [value]
        if str(key).endswith(("attn_implementation", "experts_implementation")):
            yield from ((key, name) for name in named if "/" in str(name))
        else:
            yield from _implementations(value)


def load_model(
    base: BaseModel,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    quantization: str = "none",
) -> PreTrainedModel:
    """The model's weights.

    Args:
        base: see `resolve`.
        dtype: storage of the weights, and compute precision of quantized ones.
        device: where they go.
        quantization: `none`, or `nf4` or `int8` for linear layers in 4 or 8 bits; embeddings and
            vocabulary head stay as they are.

    Returns:
        A transformers causal language model in evaluation mode; not marked as quantized unless it
        is.

    Raises:
        ModelError: the files cannot be read, or a GGUF file is to be quantized.
    """
    model = _load_unchanged(base, dtype, device, quantization)
    if base.changes.resizes:
        grow_model(model, *token_rows(base), base.changes.rows)
    return model


def read_model(kind: Any, base: BaseModel, **options: Any) -> PreTrainedModel:
    """All weights of a model, or none.

    Args:
        kind: a class of transformers with `from_pretrained`.
        base: where they are.
        **options: for `from_pretrained`.

    Raises:
        ModelError: the files cannot be read, or do not hold the model that they describe.
    """
    if base.gguf is None:
        require_plausible(base)
    model: PreTrainedModel
    with reading(base.name, "the weights"):
        model, found = kind.from_pretrained(
            base.location, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    require_whole(base.name, model, found)
    return model


def require_plausible(base: BaseModel) -> dict[str, tuple[int, ...]]:
    """Refuse a configuration with more layers than its files hold weights: building it may never
    end.

    Returns:
        Name -> shape of the stored weights; empty for a hub id and a folder without weights.
    """
    shapes = stored_shapes(Path(base.location))
    layers = getattr(load_config(base).get_text_config(), "num_hidden_layers", None) or 0
    if shapes and layers > len(shapes):
        raise ModelError(
            f"{base.name}: config.json says num_hidden_layers = {layers}, and its files hold only "
            f"{len(shapes)} weights",
            hint="copy the folder again, with the config.json that belongs to its weights",
        )
    return shapes


def _load_unchanged(
    base: BaseModel, dtype: torch.dtype, device: torch.device | str, quantization: str
) -> PreTrainedModel:
    """Weights as they are stored, positions as they are scaled."""
    if not base.gguf:
        _stored_config(base)  # before anything that it names is fetched
    options, on_cpu = dict(base.options), torch.device(device).type == "cpu"
    if base.changes.rope is not None:
        if base.gguf:
            raise ModelError(
                f"{base.name} is a GGUF file, whose positions model.rope_scaling cannot scale",
                hint="name a folder with safetensors",
            )
        options["config"] = load_config(replace(base, changes=BaseChanges(base.changes.rope)))
    if quantization != "none":
        return _load_quantized(base, dtype, device, quantization, options)
    if base.gguf:
        options["quantization_config"] = GgufConfig(dequantize=True)
    else:
        options["use_safetensors"] = True
        if not on_cpu:  # tensor by tensor: never whole on the host
            options["device_map"] = {"": str(device)}
    model = read_model(AutoModelForCausalLM, base, dtype=dtype, **options)
    if base.gguf:
        forget_gguf(model)
    return model.to(device).eval()


def _load_quantized(
    base: BaseModel,
    dtype: torch.dtype,
    device: torch.device | str,
    quantization: str,
    options: dict[str, Any],
) -> PreTrainedModel:
    if base.gguf:
        raise ModelError(
            f"{base.name} is a GGUF file, which model.quantization = {quantization} cannot read",
            hint="name a folder with safetensors, or set model.quantization=none",
        )
    config = BitsAndBytesConfig(**_QUANTIZATIONS[quantization])
    model = read_model(
        AutoModelForCausalLM,
        base,
        dtype=dtype,
        quantization_config=config,
        device_map={"": str(device)},
        use_safetensors=True,
        **options,
    )
    multiply_dense(model, dtype)
    for weight in model.parameters():
        if weight.is_floating_point() and weight.device.type == "cpu":
            weight.data = weight.data.clone()  # a view keeps all that was read of its file
    release_memory()
    return model.eval()


def stored_dtype(base: BaseModel) -> torch.dtype:
    """The dtype the base's weights are stored in; float32 if the configuration does not say."""
    dtype = getattr(load_config(base), "dtype", None)
    if isinstance(dtype, str):
        dtype = DTYPES.get(dtype)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
