"""Model folder -> one GGUF file for llama.cpp, Ollama and similar programs, verified."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerBase

from alignkit.errors import ModelError
from alignkit.files import replace_file
from alignkit.models.base.fitness import require_language_model
from alignkit.models.base.generation import generation_settings
from alignkit.models.base.licence import licence_of
from alignkit.models.base.loading import BaseModel, load_config, load_tokenizer
from alignkit.models.export.gguf_check import (
    check_logits,
    check_settings,
    check_tensors,
    check_tokenizer,
)
from alignkit.models.export.gguf_files import (
    TYPES,
    Names,
    WrittenFile,
    require_gguf,
    stored_type,
    write_file,
)
from alignkit.models.export.gguf_names import SourceWeights, family_of, plan_tensors, stored_tensors
from alignkit.models.export.gguf_settings import settings_of
from alignkit.models.export.gguf_tokens import vocabulary_of
from alignkit.models.weights.comparing import Closeness, take_samples
from alignkit.models.weights.writing import replace_model, require_free
from alignkit.packed import IntArray


@dataclass(frozen=True)
class GgufReport:
    """What was written and how faithful it is.

    Args:
        output: the file.
        type: the one asked for.
        tensors: type -> how many tensors have it.
        megabytes: size of the file, in units of 1,000,000 bytes.
        architecture: the format's name for it.
        texts: how many texts both tokenizers split into the same tokens.
        logits: compared with the source's; None if transformers cannot read the file.
        notes: sentences the user must know.
    """

    output: str
    type: str
    tensors: dict[str, int]
    megabytes: float
    architecture: str
    texts: int
    logits: Closeness | None
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """The report in sentences."""
        counts = ", ".join(f"{count} {kind}" for kind, count in self.tensors.items())
        total = sum(self.tensors.values())
        lines = [
            f"wrote {self.output} ({self.type}, {self.megabytes:,.1f} MB)",
            f"all {total} tensors read back and compared with the source: {counts}",
            f"{self.texts} texts split into the same tokens by the file's tokenizer",
        ]
        if self.type == "q8_0" and "f16" in self.tensors:
            f16 = self.tensors["f16"]
            lines.append(f"{f16} tensors are f16: their row length is not a multiple of 32")
        if self.logits is None:
            lines.append(
                f"only tensors, settings and tokenizer were compared: transformers cannot load "
                f"{self.architecture} files"
            )
        else:
            lines.append(f"against the source {self.logits.line()}")
        return [*lines, *self.notes]


def export_gguf(
    base: BaseModel,
    output: Path,
    *,
    kind: str,
    rows: Sequence[IntArray],
    title: str,
    ends: Sequence[int] = (),
    overwrite: bool = False,
) -> GgufReport:
    """Write a GGUF file and verify it.

    Args:
        base: a language model with safetensors.
        output: the file; it appears only once it is verified.
        kind: one of `gguf_files.TYPES`.
        rows: token ids of real rows.
        title: display name of the model.
        ends: ids that end an answer, beside those that the model names.
        overwrite: replace an existing file.

    Returns:
        What was written and measured.

    Raises:
        ModelError: the model or its tokenizer has no place in the format, the output exists, or
            what was written is not the model.
    """
    require_free(output, overwrite=overwrite and not output.is_dir())
    config = exportable_config(base, kind)
    weights = SourceWeights(local_folder(base))
    plan = plan_tensors(config, weights)
    settings = settings_of(config)
    tokenizer = load_tokenizer(base)
    vocabulary = vocabulary_of(tokenizer, config.vocab_size, stop_ids(base, tokenizer, ends))
    architecture = family_of(config).architecture
    # transformers takes a Llama of just this name for another architecture, and fails.
    title = "Mistral" if title == "mistral" else title
    names = Names(architecture, title, licence_of(base))
    samples = take_samples(rows, int(settings.values["context_length"]))
    with replace_model(output, replace_file) as written:
        tensors = stored_tensors(plan, weights)
        write_file(written, names, settings, vocabulary, plan, tensors, kind)
        file = WrittenFile(written)
        check_tensors(file, plan, weights, kind)
        check_settings(file, architecture, settings)
        texts = check_tokenizer(file, vocabulary, tokenizer, rows)
        del file
        logits = check_logits(written, base, config, samples, kind)
        megabytes = written.stat().st_size / 1e6
    return GgufReport(
        output=str(output),
        type=kind,
        tensors=dict(Counter(stored_type(tensor.shape, kind) for tensor in plan)),
        megabytes=megabytes,
        architecture=architecture,
        texts=texts,
        logits=logits,
        notes=[*settings.notes, *vocabulary.notes],
    )


def exportable_config(base: BaseModel, kind: str) -> Any:
    """The configuration of a model that can be written as GGUF.

    Raises:
        ModelError: it cannot.
    """
    if kind not in TYPES:
        raise ModelError(f"--type cannot be {kind!r}", hint=f"choose one of {', '.join(TYPES)}")
    require_gguf()
    if base.gguf:
        raise ModelError(
            f"{base.name} is a GGUF file already",
            hint="name the folder with safetensors that it was made from",
        )
    require_language_model(base)
    config = load_config(base)
    if getattr(config, "quantization_config", None):
        raise ModelError(
            f"the weights of {base.name} are quantized already",
            hint="name the model that they were made from",
        )
    family_of(config)
    return config


def local_folder(base: BaseModel) -> Path:
    """The folder of a model; one from the hub is downloaded into its cache.

    Raises:
        ModelError: it cannot be downloaded.
    """
    folder = Path(base.location)
    if folder.is_dir():
        return folder
    try:
        wanted = ["*.safetensors", "*.json"]
        return Path(snapshot_download(base.location, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise ModelError(
            f"{base.location} could not be downloaded: {first_line}",
            hint="check the name and the connection",
        ) from error


def stop_ids(
    base: BaseModel, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int] = ()
) -> list[int]:
    """Ids that end a response: EOS, those of the generation settings, and those of `ends`."""
    ids = getattr(generation_settings(base)[0], "eos_token_id", None)
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    stops = [tokenizer.eos_token_id, *listed, *ends]
    return list(dict.fromkeys(int(number) for number in stops if number is not None))
