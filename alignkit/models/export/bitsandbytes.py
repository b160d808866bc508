"""Model folder -> the same model in 8 or 4 bits, as bitsandbytes keeps it, verified."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from alignkit.errors import ModelError
from alignkit.models.base.fitness import require_language_model
from alignkit.models.base.loading import (
    BaseModel,
    load_config,
    load_model,
    load_tokenizer,
    read_model,
    stored_dtype,
)
from alignkit.models.kernels.quantized import multiply_dense
from alignkit.models.weights.comparing import Closeness, closeness, read_logits, take_samples
from alignkit.models.weights.writing import (
    is_plain_model,
    replace_model,
    require_free,
    write_and_read,
)
from alignkit.packed import IntArray

KINDS = {8: "int8", 4: "nf4"}
"""Bits -> what bitsandbytes calls it."""

FAR = 0.1
"""Nats per token above which the report warns; no loss from quantizing is an error."""


@dataclass(frozen=True)
class QuantizedReport:
    """What was written and how far it is from the source.

    Args:
        output: the folder.
        kind: `int8`, or `nf4` with double quantization.
        layers: linear layers that are quantized; the vocabulary head stays as it is.
        megabytes: size of the weights, in units of 1,000,000 bytes.
        source_megabytes: the same for the source.
        logits: compared with the source's, in float32 arithmetic.
    """

    output: str
    kind: str
    layers: int
    megabytes: float
    source_megabytes: float
    logits: Closeness

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """The report in sentences."""
        lines = [
            f"wrote {self.output} ({self.kind}, {self.megabytes:,.1f} MB instead of "
            f"{self.source_megabytes:,.1f})",
            f"{self.layers} layers in {self.kind}; every tensor read back bit for bit",
            f"against the source {self.logits.line()}",
        ]
        if self.logits.mean_kl > FAR:
            lines.append(
                f"KL above {FAR} is far: expect answers that differ from the source's; small "
                "models lose most, and --bits 8 loses less than 4"
            )
        return lines


def export_quantized(
    base: BaseModel,
    output: Path,
    *,
    bits: int,
    rows: Sequence[IntArray],
    device: str = "cpu",
    overwrite: bool = False,
) -> QuantizedReport:
    """Write a quantized model folder and verify it.

    Args:
        base: a language model with safetensors.
        output: folder to write; it appears only once it is verified.
        bits: 8 or 4.
        rows: token ids of real rows.
        device: where it is quantized and compared.
        overwrite: replace an existing model folder.

    Returns:
        What was written and measured.

    Raises:
        ModelError: the output exists, the model cannot be quantized, or the files do not hold what
            was written.
    """
    _require_fit(base, output, bits, overwrite)
    dtype = stored_dtype(base)
    tokenizer = load_tokenizer(base)
    samples = take_samples(rows, load_config(base).max_position_embeddings)
    settings = _settings(bits, dtype)
    with replace_model(output) as written:
        model = _load(base, device, dtype, quantization_config=settings)
        layers = count_quantized(model)
        if not layers:
            raise ModelError(
                f"{base.name} has no linear layer that bitsandbytes quantizes",
                hint="serve the model as it is",
            )
        read_back = write_and_read(
            model, tokenizer, written, lambda folder: _load(BaseModel(str(folder)), device, dtype)
        )
        del model  # two models in memory at most
        logits = read_logits(read_back, samples)
        del read_back
        exact = read_logits(load_model(base, torch.float32, device), samples)
        megabytes = _megabytes(written)
    return QuantizedReport(
        output=str(output),
        kind=KINDS[bits],
        layers=layers,
        megabytes=megabytes,
        source_megabytes=_megabytes(Path(base.location)),
        logits=closeness(exact, logits),
    )


def _require_fit(base: BaseModel, output: Path, bits: int, overwrite: bool) -> None:
    if bits not in KINDS:
        raise ModelError(f"--bits cannot be {bits}", hint="8 or 4")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "the bitsandbytes package is not installed",
            hint="pip install 'alignkit[quantization]'",
        )
    require_free(output, overwrite=overwrite)
    if output.exists() and not is_plain_model(output):
        raise ModelError(
            f"{output} is not a model folder, so it is not overwritten",
            hint="name another --output",
        )
    source = Path(base.location)
    if source.is_dir() and source.resolve().is_relative_to(output.resolve()):
        raise ModelError(f"{output} holds the model itself", hint="name another --output")
    if base.gguf:
        raise ModelError(
            f"{base.name} is a GGUF file, which bitsandbytes cannot quantize",
            hint="name the folder with safetensors that it was made from",
        )
    require_language_model(base)
    if getattr(load_config(base), "quantization_config", None):
        raise ModelError(
            f"the weights of {base.name} are quantized already",
            hint="name the model that they were made from",
        )


def _settings(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _load(base: BaseModel, device: str, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    where = {"device_map": {"": device}, "use_safetensors": True}
    model = read_model(AutoModelForCausalLM, base, dtype=dtype, **where, **base.options, **options)
    multiply_dense(model, dtype)  # only the weights are measured, on any machine
    return model.eval()


def count_quantized(model: PreTrainedModel) -> int:
    """How many linear layers bitsandbytes has quantized."""
    kinds = ("Linear8bitLt", "Linear4bit")
    return sum(type(module).__name__ in kinds for module in model.modules())


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
