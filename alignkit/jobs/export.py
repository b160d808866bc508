"""Exports on request: a GGUF file with its Modelfile, or a quantized folder with its card."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.data.texts import NO_BOS
from alignkit.data.tokenize import answer_ends, probe_template
from alignkit.errors import ModelError
from alignkit.files import output_path, write_text
from alignkit.models.base.fitness import require_language_model
from alignkit.models.base.loading import BaseModel, load_tokenizer
from alignkit.models.base.places import resolve
from alignkit.models.export.bitsandbytes import KINDS, QuantizedReport, export_quantized
from alignkit.models.export.gguf import GgufReport, export_gguf, exportable_config, stop_ids
from alignkit.models.export.ollama import recognise, write_modelfile
from alignkit.models.weights.writing import require_free
from alignkit.runtime.devices import find_device
from alignkit.stages.inputs.checking import file_rows
from alignkit.stages.running.card import write_card


@dataclass(frozen=True)
class Exported:
    """What an export left on disk.

    Args:
        report: what was written and measured.
        modelfile: for Ollama; None for a folder.
        commands: that serve it, each a line for the shell.
        notes: sentences about them.
    """

    report: GgufReport | QuantizedReport
    modelfile: str | None
    commands: list[str]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        values = dataclasses.asdict(self)
        return {**values.pop("report"), **values, "notes": [*self._measured_notes(), *self.notes]}

    def _measured_notes(self) -> list[str]:
        return self.report.notes if isinstance(self.report, GgufReport) else []

    def lines(self) -> list[str]:
        """In sentences, without the commands."""
        return [*self.report.lines(), *self.notes]


def gguf_of(source: str, *, output: Path | None, kind: str, overwrite: bool) -> Exported:
    """Export a model to GGUF.

    Args:
        source: known name, hub id, folder or run folder with merged/.
        output: the file; None is `NAME-TYPE.gguf` in the working folder.
        kind: one of `gguf_files.TYPES`.
        overwrite: replace existing files.

    Returns:
        The measured differences, the Modelfile and how to serve it.

    Raises:
        ModelError: see `export_gguf`; or the Modelfile exists.
    """
    base = resolve(source).whole()
    exportable_config(base, kind)
    name = short_name(base)
    output = output_path(output or Path(f"{name}-{kind}.gguf"))
    if output.suffix != ".gguf":
        raise ModelError(
            f"--output must end in .gguf, got {str(output)!r}",
            hint=f"for example {output.with_suffix('.gguf')}",
        )
    modelfile = output.with_suffix(".Modelfile")
    require_free(modelfile, overwrite=overwrite)
    tokenizer = load_tokenizer(base)
    rows, _ = file_rows(None, tokenizer)
    ends = answer_ends(tokenizer)
    report = export_gguf(
        base, output, kind=kind, rows=rows, title=name, ends=ends, overwrite=overwrite
    )
    template = recognise(tokenizer)
    stops = [tokenizer.convert_ids_to_tokens(number) for number in stop_ids(base, tokenizer, ends)]
    write_text(modelfile, write_modelfile(output.name, template, stops))
    notes = [f"wrote {modelfile}"]
    if NO_BOS in probe_template(tokenizer).notes:
        notes.append(NO_BOS)
    if template is None:
        notes.append(
            "alignkit does not know the chat template: the Modelfile has no TEMPLATE, so Ollama "
            "guesses one or sends plain text"
        )
    elif template.system:
        notes.append(
            f"the chat template's own system text is in the Modelfile: {template.system!r}"
        )
    title = shlex.quote(name.lower())
    commands = [
        f"ollama create {title} -f {shlex.quote(str(modelfile))}",
        f"ollama run {title}",
    ]
    return Exported(report, str(modelfile), commands, notes)


def quantized_of(source: str, *, output: Path | None, bits: int, overwrite: bool) -> Exported:
    """Export a model to a folder in 8 or 4 bits.

    Args:
        source: known name, hub id, folder or run folder with merged/.
        output: the folder; None is `NAME-int8` or `NAME-nf4` in the working folder.
        bits: 8 or 4.
        overwrite: replace an existing model folder.

    Returns:
        The measured differences and how to serve it.

    Raises:
        ModelError: see `export_quantized`.
    """
    base = resolve(source).whole()
    if bits not in KINDS:
        raise ModelError(f"--bits cannot be {bits}", hint="8 or 4")
    require_language_model(base)
    name = short_name(base)
    output = output_path(output or Path(f"{name}-{KINDS[bits]}"))
    rows, _ = file_rows(None, load_tokenizer(base))
    report = export_quantized(
        base, output, bits=bits, rows=rows, device=find_device(), overwrite=overwrite
    )
    write_card(output, base, quantized=report)
    # The folder's config.json says how it is quantized: vLLM asks for no flag.
    commands = [f"vllm serve {shlex.quote(str(output))}"]
    return Exported(report, None, commands, ["vLLM runs bitsandbytes layers on CUDA only"])


def short_name(base: BaseModel) -> str:
    """A name for files: the last part of the path that identifies the model."""
    place = Path(base.location)
    if place.is_dir():
        place = place.resolve()
    return place.parent.name if place.name == "merged" else place.name
