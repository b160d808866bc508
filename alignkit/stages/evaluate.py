"""Evaluation on request: any models on the same rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from alignkit.data.dataset import TokenDataset, load_dataset
from alignkit.data.tokenize import TokenizeSettings
from alignkit.errors import ModelError
from alignkit.evaluation.heldout import evaluate_heldout
from alignkit.models.loading import DTYPES
from alignkit.models.opening import OpenModel, open_model
from alignkit.models.selfcheck import build_scorer
from alignkit.recipe.assets import alignkit_home
from alignkit.recipe.load import load_recipe
from alignkit.recipe.schema import DataSpec, SourceSpec
from alignkit.runtime.devices import find_device, tune_allocator
from alignkit.stages.prepare import load_rows
from alignkit.stages.session import describe_rows

_BUDGET = 2048


def evaluate_models(
    names: list[str],
    *,
    data: str | None,
    max_length: int | None,
    take: int | None,
    dtype: str,
    base: str | None,
    say: Callable[[str], None],
) -> dict[str, dict[str, float]]:
    """Held-out values of each model.

    Args:
        names: run folders, models or adapters.
        data: file of rows; None takes the held-out rows of the first run folder.
        max_length: longest row of `data` in tokens, None is 1024; longer ones are dropped and
            counted.
        take: only the first so many rows of `data`.
        dtype: compute precision.
        base: base of adapters that name another.
        say: told what is measured.

    Returns:
        Name -> loss, perplexity, accuracy and tokens.

    Raises:
        ModelError: no rows to evaluate on, or an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ModelError(f"--dtype cannot be {dtype!r}", hint=f"one of {', '.join(DTYPES)}")
    if data is None and (take is not None or max_length is not None):
        raise ModelError(
            "--take and --max-length go with --data: the run's own rows follow its recipe",
            hint="name the file with --data",
        )
    tune_allocator()
    spec = _data_spec(names, data, max_length, take)
    found = {}
    for name in names:
        opened = open_model(name, dtype=DTYPES[dtype], device=find_device(), base=base)
        rows = _held_out(opened, spec)
        for line in describe_rows(name, rows.report):
            say(line)
        scorer = build_scorer(opened.model, DTYPES[dtype], "auto", say)
        found[name] = evaluate_heldout(scorer, rows, _BUDGET)
    return found


def _data_spec(
    names: list[str], data: str | None, max_length: int | None, take: int | None
) -> DataSpec | Path:
    """What to evaluate on: a data section, or the run folder whose recipe says it."""
    if data is not None:
        source = SourceSpec(path=data, take=take)
        return DataSpec(train=(source,), max_length=max_length or 1024)
    for name in names:
        run = Path(name).expanduser()
        for folder in (run, run.parent):
            if (folder / "recipe.yaml").is_file():
                return folder
    raise ModelError(
        "there are no rows to evaluate on",
        hint="name a file with --data, or a run folder whose recipe holds out rows",
    )


def _held_out(opened: OpenModel, spec: DataSpec | Path) -> TokenDataset:
    """The rows as this model's tokenizer reads them."""
    if isinstance(spec, Path):
        rows = load_rows(load_recipe(str(spec / "recipe.yaml")).recipe)
        if rows.held_out is None:
            raise ModelError(
                f"the recipe of {spec} holds out no rows", hint="name a file with --data"
            )
        if opened.tokenizer.get_vocab() != rows.tokenizer.get_vocab():
            raise ModelError(
                f"{opened.name} reads text with another tokenizer than the run in {spec}",
                hint="name a file with --data; then every model tokenizes it its own way",
            )
        return rows.held_out
    settings = TokenizeSettings(spec.max_length, spec.too_long, spec.train_on)
    cache = alignkit_home() / "cache" / "tokens"
    return load_dataset(spec.train, opened.tokenizer, settings, 0, cache)
