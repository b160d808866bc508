"""GGUF files: written tensor by tensor, and read back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alignkit.errors import ModelError
from alignkit.models.export.gguf_names import PlannedTensor
from alignkit.models.export.gguf_settings import Settings
from alignkit.models.export.gguf_tokens import Vocabulary

try:
    import gguf
except ImportError:  # an optional package
    gguf = None  # type: ignore[assignment]

TYPES = ("f16", "q8_0", "bf16", "f32")
"""What `--type` takes."""

ROPE_FACTORS = "rope_freqs.weight"

_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_ID_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot"}


def require_gguf() -> None:
    """Refuse to go on without the gguf package.

    Raises:
        ModelError: it is not installed.
    """
    if gguf is None:
        raise ModelError("the gguf package is not installed", hint="pip install 'alignkit[gguf]'")


@dataclass(frozen=True)
class Names:
    """What the file says about itself.

    Args:
        architecture: the format's name for it.
        title: display name of the model.
        licence: of the weights; None if it is not known.
    """

    architecture: str
    title: str
    licence: str | None


def stored_type(shape: tuple[int, ...], wanted: str) -> str:
    """The type of one tensor: vectors stay f32, rows that do not fill whole blocks become f16."""
    if len(shape) < 2:
        return "f32"
    if wanted == "q8_0" and shape[-1] % 32:
        return "f16"
    return wanted


def write_file(
    path: Path,
    names: Names,
    settings: Settings,
    vocabulary: Vocabulary,
    plan: list[PlannedTensor],
    tensors: Iterable[tuple[PlannedTensor, torch.Tensor]],
    wanted: str,
) -> None:
    """Write a file; one tensor is in memory at a time.

    Args:
        path: to write.
        names: what the file says about itself.
        settings: sizes, attention, rotary embedding.
        vocabulary: the tokenizer.
        plan: the tensors to come.
        tensors: each with its float32 values, in the order of the plan.
        wanted: one of `TYPES`.

    Raises:
        ModelError: a weight is too large for f16.
    """
    writer = gguf.GGUFWriter(str(path), names.architecture)
    try:
        _add_about(writer, names, wanted)
        _add_settings(writer, settings)
        _add_vocabulary(writer, vocabulary)
        if settings.rope_factors is not None:
            _announce(writer, ROPE_FACTORS, tuple(settings.rope_factors.shape), "f32")
        for tensor in plan:
            _announce(writer, tensor.target, tensor.shape, stored_type(tensor.shape, wanted))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if settings.rope_factors is not None:
            writer.write_tensor_data(settings.rope_factors.float().numpy())
        for tensor, weight in tensors:
            kind = stored_type(tensor.shape, wanted)
            _require_range(tensor, weight, kind)
            values = gguf.quantize(weight.contiguous().numpy(), _quant(kind))
            writer.write_tensor_data(np.ascontiguousarray(values))
    finally:
        writer.close()


def _quant(kind: str) -> Any:
    return gguf.GGMLQuantizationType[kind.upper()]


def _announce(writer: Any, name: str, shape: tuple[int, ...], kind: str) -> None:
    # The writer takes the shape in bytes for any type that it does not derive itself.
    in_bytes = gguf.quant_shape_to_byte_shape(shape, _quant(kind))
    size = int(np.prod(in_bytes))
    writer.add_tensor_info(name, in_bytes, np.dtype(np.uint8), size, raw_dtype=_quant(kind))


def _require_range(tensor: PlannedTensor, weight: torch.Tensor, kind: str) -> None:
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    # A block's scale is its largest value over 127, kept as f16.
    limit = {"f16": 65504.0, "q8_0": 65504.0 * 127}.get(kind)
    if limit is not None and largest > limit:
        raise ModelError(
            f"{tensor.source} holds {largest:.3g}, more than {kind} can hold",
            hint="export with --type bf16 or --type f32",
        )


def _add_about(writer: Any, names: Names, wanted: str) -> None:
    writer.add_type("model")
    writer.add_name(names.title)
    if names.licence:
        writer.add_license(names.licence)
    writer.add_file_type(int(gguf.LlamaFileType[_FILE_TYPES[wanted]]))
    if wanted == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_settings(writer: Any, settings: Settings) -> None:
    for name, value in settings.values.items():
        key = f"{writer.arch}.{name}"
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.cut)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for name, number in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{_ID_KEYS[name]}_token_id", number)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(False)
    if vocabulary.kind == "llama":
        writer.add_add_space_prefix(vocabulary.add_space)
    pairs = vocabulary.templates.items()
    if pairs:
        writer.add_chat_template([{"name": name, "template": text} for name, text in pairs])


class WrittenFile:
    """A GGUF file as it is on disk.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(str(path))
        self.fields: dict[str, Any] = {
            name: field.contents() for name, field in reader.fields.items()
        }
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def names(self) -> set[str]:
        """Names of the tensors."""
        return set(self._tensors)

    def kind(self, name: str) -> str:
        """Type of a tensor, in lower case."""
        return str(self._tensors[name].tensor_type.name.lower())

    def read(self, name: str) -> torch.Tensor:
        """A tensor in float32."""
        tensor = self._tensors[name]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        shape = [int(size) for size in reversed(tensor.shape)]
        return torch.from_numpy(np.array(values, np.float32)).reshape(shape)

    def vocabulary(self) -> Vocabulary:
        """The tokenizer that the file describes."""
        get: Callable[[str], Any] = self.fields.get
        ids = {name: get(f"tokenizer.ggml.{key}_token_id") for name, key in _ID_KEYS.items()}
        return Vocabulary(
            kind=get("tokenizer.ggml.model"),
            cut=get("tokenizer.ggml.pre"),
            tokens=get("tokenizer.ggml.tokens"),
            types=get("tokenizer.ggml.token_type"),
            scores=get("tokenizer.ggml.scores") or [],
            merges=get("tokenizer.ggml.merges") or [],
            special={name: number for name, number in ids.items() if number is not None},
            add_bos=get("tokenizer.ggml.add_bos_token"),
            add_space=bool(get("tokenizer.ggml.add_space_prefix")),
            space_after_special=True,
            templates={"default": get("tokenizer.chat_template")},
        )
