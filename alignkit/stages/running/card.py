"""The model card: origin, settings, measured results, licence.

For a merged or quantized model, or for an adapter that cannot be merged. It names files and folders
without the path to them: a card is made to be shared. What comes from other people's files (a
name, a licence, a key) is text in it, never a link, a heading or HTML.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import yaml

import alignkit
from alignkit.files import write_text
from alignkit.models.base.adapter_kinds import peft_kind
from alignkit.models.base.licence import licence_of
from alignkit.models.base.loading import BaseModel, load_config
from alignkit.models.base.transformers4 import reader_line
from alignkit.recipe.rows import SourceSpec
from alignkit.recipe.stages.base import Recipe
from alignkit.terminal import cut, plain

_USE = (
    "An adapter that cannot be merged: no weight can hold it. PEFT loads it over {base}, the model "
    "it was trained on."
)

SETTINGS = ("seed", "adapter", "objective", "reference", "rollout", "value", "guard", "training")
"""Sections of a recipe that a card repeats; the others name places."""


class Report(Protocol):
    """What a merge measured."""

    def lines(self) -> list[str]:
        """In sentences."""
        ...


def write_card(
    folder: Path,
    base: BaseModel,
    *,
    recipe: Recipe | None = None,
    before: dict[str, float] | None = None,
    after: dict[str, float] | None = None,
    report: Report | None = None,
    quantized: Report | None = None,
    classifier: bool = False,
) -> None:
    """Write `README.md` into a model folder.

    Args:
        folder: of the model, or of an adapter.
        base: the model that was trained or quantized.
        recipe: of the run; None for an adapter from elsewhere.
        before: held-out values before training.
        after: the same at the end.
        report: of the merge; None if all weights were trained.
        quantized: report of the export, if only the precision has changed.
        classifier: a reward model.
    """
    licence, adapter = licence_of(base), peft_kind(folder) != ""
    head: dict[str, Any] = {
        "base_model": _short(base.name),
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-classification" if classifier else "text-generation",
        "tags": ["alignkit", *([recipe.stage] if recipe else [])],
        **({"license": licence} if licence else {}),
    }
    place = folder.resolve()
    name = place.parent.name if place.name in ("merged", "adapter") else place.name
    mother = escape(_short(base.name))
    parts = [f"---\n{yaml.safe_dump(head, sort_keys=False)}---", f"# {escape(name)}"]
    how = f"by the `{recipe.stage}` stage of" if recipe else "by merging an adapter with"
    if quantized is not None:
        how = "by quantizing it with"
    kind = "A reward model made" if classifier else "Made"
    parts.append(f"{kind} from {mother} {how} alignkit {alignkit.__version__}.")
    if after:
        parts += ["## Held-out results", _table(before or {}, after)]
    if recipe is not None:
        sources = [*recipe.data.train, *recipe.data.eval]
        parts += ["## Data", _list(map(_source, sources))]
        values = recipe.as_dict()
        shown = {key: values[key] for key in SETTINGS if values.get(key) is not None}
        parts += ["## Settings", _fenced(yaml.safe_dump(shown, sort_keys=False))]
    if adapter:
        parts += ["## Use", _USE.format(base=mother)]
    else:
        parts += ["## Use", reader_line(load_config(base).get_text_config().model_type)]
    if report is not None:
        # The first line says where it was written.
        parts += ["## Merge", _list(report.lines()[1:])]
    if quantized is not None:
        parts += ["## Quantization", _list(quantized.lines()[1:])]
    parts += [
        "## Licence",
        f"That of the base: {escape(licence)}."
        if licence
        else "The base's files do not name its licence: look it up before sharing this model.",
    ]
    write_text(folder / "README.md", "\n\n".join(parts) + "\n")


_MARKS = re.compile(r"([\\`*\[\]<>|#~])|(?<!\w)_|_(?!\w)|^[-+=]|(?<=:)/(?=/)|(?<=www)\.|@", re.I)
"""What Markdown could take for more than text; addresses become links by themselves."""


def escape(text: str) -> str:
    """Foreign text for one line of Markdown, where it is shown as it is.

    Args:
        text: any; control characters become signs, white space one space, and what exceeds a
            line's length is left out.
    """
    line = plain(cut(" ".join(text.split())))
    return _MARKS.sub(lambda match: f"\\{match[0]}", line).replace("&", "&amp;")


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {escape(line)}" for line in lines)


def _fenced(text: str) -> str:
    """A block of YAML in a fence that nothing in it can close."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}yaml\n{text}{fence}"


def _short(name: str) -> str:
    """A hub id as it is; of a local path the last part that identifies the model."""
    path = Path(name)
    if not path.exists():
        return name
    path = path.resolve()
    return path.parent.name if path.name == "merged" else path.name


def _source(source: SourceSpec) -> str:
    place = Path(source.path).name if source.path else source.label
    return f"{place}, first {source.take:,} rows" if source.take else place


def _table(before: dict[str, float], after: dict[str, float]) -> str:
    rows = ["| | before | after |", "|---|---|---|"]
    for key, value in after.items():
        rows.append(f"| {escape(key)} | {_number(before.get(key))} | {_number(value)} |")
    return "\n".join(rows)


def _number(value: Any) -> str:
    """Empty for what was not measured or is not finite: metrics store that as null."""
    return f"{value:.4g}" if isinstance(value, int | float) else ""
