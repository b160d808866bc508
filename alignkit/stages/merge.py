"""Merging on request: a run folder or any PEFT LoRA folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignkit.data.dataset import load_dataset
from alignkit.errors import ModelError
from alignkit.models.adapter_files import has_head
from alignkit.models.classifier import ClassifierReport, merge_reward
from alignkit.models.loading import DTYPES, BaseModel, load_tokenizer, stored_dtype
from alignkit.models.merging import MergeReport, merge_adapter
from alignkit.models.opening import adapter_in, base_of_adapter
from alignkit.models.writing import is_plain_model
from alignkit.packed import IntArray
from alignkit.recipe.assets import alignkit_home
from alignkit.recipe.load import load_recipe
from alignkit.recipe.rows import SourceSpec
from alignkit.stages.card import write_card
from alignkit.stages.checking import CHECK_SETTINGS, check_rows, file_rows
from alignkit.stages.prepare import ROW_KINDS, load_rows
from alignkit.stages.run_folder import read_about


def merge_run(
    source: str,
    *,
    base: str | None,
    output: Path | None,
    dtype: str | None,
    data: str | None,
    overwrite: bool,
    any_base: bool = False,
) -> MergeReport | ClassifierReport:
    """Merge the adapter of a run, or any PEFT LoRA adapter; a reward model's with its head.

    Args:
        source: run folder or adapter folder.
        base: the base to merge into; None takes what the adapter records.
        output: folder to write; None is `merged/` beside the adapter.
        dtype: of the written weights; None keeps the base's.
        data: rows to compare logits on; None takes the run's own, else shipped ones.
        overwrite: replace an existing output.
        any_base: accept other weights than those that the adapter was trained over.

    Returns:
        The measured differences.

    Raises:
        ModelError: no adapter, no base, an unknown dtype, or a merge that is not faithful.
    """
    adapter = adapter_in(source)
    if adapter is None:
        raise ModelError(
            f"{source} holds no adapter: there is no adapter_config.json",
            hint="name a run folder, its adapter/, or a folder written by PEFT",
        )
    if dtype is not None and dtype not in DTYPES:
        raise ModelError(f"--dtype cannot be {dtype!r}", hint=f"one of {', '.join(DTYPES)}")
    made = all((adapter.parent / name).is_file() for name in ("recipe.yaml", "run.json"))
    run = adapter.parent if made else None
    if output is None:
        output = (run or adapter) / "merged"
    output = output.expanduser()
    _check_output(output, adapter, overwrite)
    model = base_of_adapter(adapter, base, any_base=any_base)
    if Path(model.location).resolve().is_relative_to(output.resolve()):
        raise ModelError(f"{output} holds the base itself", hint="name another --output")
    rows, tokenizer, stops = _rows(run, data, model)
    merge = merge_reward if has_head(adapter) else merge_adapter
    report = merge(
        model,
        adapter,
        output,
        rows=rows,
        dtype=DTYPES[dtype] if dtype else stored_dtype(model),
        tokenizer=tokenizer,
        stop_tokens=stops,
        overwrite=overwrite,
    )
    about = _run_facts(run) if run is not None else {}
    write_card(output, model, report=report, classifier=has_head(adapter), **about)
    return report


def _run_facts(run: Path) -> dict[str, Any]:
    """What the card of a run's merged model repeats."""
    summary = read_about(run).get("summary", {})
    return {
        "recipe": load_recipe(str(run / "recipe.yaml")).recipe,
        "before": summary.get("before"),
        "after": summary.get("after"),
    }


def _check_output(output: Path, adapter: Path, overwrite: bool) -> None:
    """Refuse to replace anything but a merged model."""
    if output.exists() and not overwrite:
        raise ModelError(
            f"{output} already exists", hint="add --overwrite, or name another --output"
        )
    if output.exists() and not is_plain_model(output):
        raise ModelError(
            f"{output} is no merged model, so it is not overwritten",
            hint="name another --output",
        )
    if adapter.resolve().is_relative_to(output.resolve()):
        raise ModelError(f"{output} holds the adapter itself", hint="name another --output")


def _rows(
    run: Path | None, data: str | None, model: BaseModel
) -> tuple[Sequence[IntArray], Any, list[int]]:
    """Real rows for the check, the tokenizer to save, and the tokens that end an answer."""
    if run is not None:
        # The run says template and stop tokens, whatever base and rows are named instead.
        override = [f"model.base={json.dumps(model.name)}"]
        recipe = load_recipe(str(run / "recipe.yaml"), override).recipe
        found = load_rows(recipe)
        dataset = found.held_out or found.train
        if data is not None:
            wanted = dataclasses.replace(CHECK_SETTINGS, rows=ROW_KINDS[recipe.stage])
            cache = alignkit_home() / "cache" / "tokens"
            dataset = load_dataset([SourceSpec(path=data)], found.tokenizer, wanted, 0, cache)
        return check_rows(dataset), found.tokenizer, found.train.report.stop_tokens
    tokenizer = load_tokenizer(model)
    return file_rows(data, tokenizer), tokenizer, []
