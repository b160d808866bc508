"""Merging on request: a run folder or any PEFT LoRA folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.data.tokenize import answer_ends
from alignkit.errors import ModelError
from alignkit.files import output_path
from alignkit.models.adapters.files import has_head
from alignkit.models.adapters.finding import base_of_adapter, tokenizer_of
from alignkit.models.base.adapter_kinds import require_mergeable
from alignkit.models.base.fitness import require_token_rows
from alignkit.models.base.identity import weights_fingerprint
from alignkit.models.base.loading import (
    DTYPES,
    BaseModel,
    load_config,
    load_tokenizer,
    stored_dtype,
)
from alignkit.models.base.places import resolve
from alignkit.models.merging.dense import ONTO, Onto
from alignkit.models.merging.merge import merge_adapter
from alignkit.models.merging.report import MergeReport
from alignkit.models.merging.updates import METHODS, AdapterPart, Blend, Method
from alignkit.models.rewards.classifier import ClassifierReport, merge_reward
from alignkit.models.weights.writing import is_plain_model, require_free
from alignkit.recipe.reading.stored import NAME, stored_recipe
from alignkit.report.run_files import read_about
from alignkit.stages.inputs.checking import file_rows
from alignkit.stages.running.card import write_card


@dataclass(frozen=True)
class MergeOptions:
    """What the command line sets for a merge.

    Args:
        base: the base to merge into; None takes what the adapter records.
        output: folder to write; None is `merged/` next to the adapter.
        dtype: of the written weights; None keeps the base's.
        data: rows to compare on; None takes shipped ones.
        overwrite: replace an existing output.
        any_base: accept a base with weights other than those the adapter was trained over.
        onto: for a base that was quantized in training; see `merge_adapter`.
        weights: one for each of several adapters; None is 1 for each.
        method: how several adapters become one change.
        density: share of each adapter's change that TIES and DARE keep.
        trust_remote_code: run code that comes with `base`.
    """

    base: str | None = None
    output: Path | None = None
    dtype: str | None = None
    data: str | None = None
    overwrite: bool = False
    any_base: bool = False
    onto: Onto = "auto"
    weights: Sequence[float] | None = None
    method: Method = "linear"
    density: float = 0.5
    trust_remote_code: bool = False


def merge_run(
    sources: Sequence[str], options: MergeOptions | None = None
) -> MergeReport | ClassifierReport:
    """Merge the adapter of a run, or any PEFT adapter; a reward model's with its head.

    Args:
        sources: run folders or adapter folders; several become one model.
        options: of the command line.

    Returns:
        The measured differences.

    Raises:
        ModelError: no adapter, no base, an unknown option, or a merge that is not faithful.
    """
    options = options or MergeOptions()
    adapters = [_adapter(source) for source in sources]
    first = adapters[0]
    blend = _blend(adapters, options)
    choices = (("dtype", tuple(DTYPES)), ("onto", ONTO), ("method", METHODS))
    for key, allowed in choices:
        value = getattr(options, key)
        if value is not None and value not in allowed:
            raise ModelError(f"--{key} cannot be {value!r}", hint=f"one of {', '.join(allowed)}")
    is_run = all((first.parent / name).is_file() for name in (NAME, "run.json"))
    run = first.parent if is_run else None
    output = _output(run or first, adapters, options)
    twice = [path for path in adapters if adapters.count(path) > 1]
    if twice:
        raise ModelError(
            f"{twice[0]} is named twice: its change would count double",
            hint="name it once; --weights says how much of it is merged",
        )
    model = _base(adapters, options)
    if Path(model.location).resolve().is_relative_to(output.resolve()):
        raise ModelError(f"{output} holds the base itself", hint="name another --output")
    tokenizer = load_tokenizer(tokenizer_of(first, model))
    rows, stops = file_rows(options.data, tokenizer)
    for row in rows:
        require_token_rows(load_config(model), row, options.data or "a shipped row")
    shared: dict[str, Any] = {
        "rows": rows,
        "dtype": DTYPES[options.dtype] if options.dtype else stored_dtype(model),
        "tokenizer": tokenizer,
        "stop_tokens": stops if has_head(first) else answer_ends(tokenizer, stops),
        "overwrite": options.overwrite,
        "onto": options.onto,
    }
    report: MergeReport | ClassifierReport
    if has_head(first):
        report = merge_reward(model, first, output, **shared)
    else:
        report = merge_adapter(model, blend, output, **shared)
    alone = run is not None and len(adapters) == 1
    about = _run_facts(run) if run is not None and alone else {}
    write_card(output, model, report=report, classifier=has_head(first), **about)
    return report


def _adapter(source: str) -> Path:
    adapter = resolve(source).adapter
    if adapter is None:
        raise ModelError(
            f"{source} holds no adapter: there is no adapter_config.json",
            hint="name a run folder, its adapter/, or a folder written by PEFT",
        )
    require_mergeable(adapter)
    return adapter


def _blend(adapters: Sequence[Path], options: MergeOptions) -> Blend:
    """The adapters with their weights."""
    weights = options.weights or [1.0] * len(adapters)
    if len(weights) != len(adapters):
        raise ModelError(
            f"--weights has {len(weights)} numbers for {len(adapters)} adapters",
            hint="one for each, in their order: --weights 0.7,0.3",
        )
    odd = [weight for weight in weights if not math.isfinite(weight)]
    if odd:
        raise ModelError(f"--weights holds {odd[0]}, which is not a number to multiply with")
    if not 0.0 < options.density <= 1.0:
        raise ModelError(
            f"--density must be above 0 and at most 1, got {options.density:g}",
            hint="0.5 keeps half of each adapter's change",
        )
    heads = [adapter for adapter in adapters if has_head(adapter)]
    if heads and (len(adapters) > 1 or options.weights):
        raise ModelError(
            f"{heads[0]} is a reward model, whose head cannot be weighted or combined",
            hint="merge it alone",
        )
    parts = tuple(AdapterPart(*pair) for pair in zip(adapters, weights, strict=True))
    return Blend(parts, options.method, options.density)


def _base(adapters: Sequence[Path], options: MergeOptions) -> BaseModel:
    """The one base of all adapters."""
    first, *others = [
        base_of_adapter(
            adapter,
            options.base,
            any_base=options.any_base,
            trust_remote_code=options.trust_remote_code,
        )
        for adapter in adapters
    ]
    for adapter, other in zip(adapters[1:], others, strict=True):
        if other.changes != first.changes:
            raise ModelError(
                f"{adapter} and {adapters[0]} were trained with different model.rope_scaling or "
                "model.add_tokens",
                hint="adapters are combined over one base; train them alike",
            )
        if other != first and weights_fingerprint(other) != weights_fingerprint(first):
            raise ModelError(
                f"{adapter} belongs to {other.name}, and {adapters[0]} to {first.name}",
                hint="adapters are combined over one base; --base names it",
            )
    return first


def _output(home: Path, adapters: Sequence[Path], options: MergeOptions) -> Path:
    """The folder to write; never one that holds something else."""
    if options.output is None and len(adapters) > 1:
        raise ModelError(
            "several adapters have no folder of their own", hint="name --output for the result"
        )
    output = output_path(options.output or home / "merged")
    for adapter in adapters:
        _check_output(output, adapter, options.overwrite)
    return output


def _run_facts(run: Path) -> dict[str, Any]:
    """What the card of a run's merged model repeats."""
    summary = read_about(run).get("summary")
    held_out = summary if isinstance(summary, dict) else {}
    measured = {key: held_out.get(key) for key in ("before", "after")}
    known = {key: value for key, value in measured.items() if isinstance(value, dict)}
    return {"recipe": stored_recipe(run / NAME), **known}


def _check_output(output: Path, adapter: Path, overwrite: bool) -> None:
    """Refuse to replace anything but a merged model."""
    require_free(output, overwrite=overwrite)
    if output.exists() and not is_plain_model(output):
        raise ModelError(
            f"{output} is not a merged model, so it is not overwritten",
            hint="name another --output",
        )
    if adapter.resolve().is_relative_to(output.resolve()):
        raise ModelError(f"{output} holds the adapter itself", hint="name another --output")
