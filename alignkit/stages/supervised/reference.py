"""Reference log-probs: adapter off, a frozen copy, or scored once and kept on disk.

The reference is always the base that training starts from: with an adapter, the model with adapters
off; in every other case it is scored, or copied, before the first step and before a checkpoint is
loaded. A fresh LoRA adapter changes nothing, so its policy starts at the reference; a prefix does
not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import nn

from alignkit.data.dataset import TokenDataset
from alignkit.data.documents import Document
from alignkit.data.packing import pack_documents, step_items
from alignkit.errors import FileError
from alignkit.evaluation.columns import MAX_TOKENS, score_documents
from alignkit.files import replace_file
from alignkit.models.adapters.attach import adapters_off
from alignkit.models.base.identity import weights_version
from alignkit.models.base.loading import DTYPES, load_model
from alignkit.models.kernels.copies import on_device
from alignkit.models.kernels.precision import sum_dtype
from alignkit.models.scoring.scorer import evaluating, sum_by_sequence
from alignkit.models.scoring.selfcheck import build_scorer
from alignkit.packed import PackedBatch
from alignkit.recipe.adapters import has_adapter
from alignkit.recipe.assets import alignkit_home
from alignkit.recipe.planning.plan import Plan
from alignkit.runtime.processes import process_group
from alignkit.stages.inputs.rows import Rows
from alignkit.stages.running.session import Session

Reference = Callable[[nn.Module, PackedBatch], torch.Tensor]
"""Scorer and batch -> `[S]` log-probs of the sequences under the reference model."""

FORMAT = 1
"""Raised whenever the values of the same key would differ."""


def adapter_off(scorer: nn.Module, batch: PackedBatch) -> torch.Tensor:
    """The policy itself with its adapters turned off."""
    with adapters_off(scorer), evaluating(scorer):
        scores: Any = scorer(batch)
        return sum_by_sequence(scores.logprobs, batch)


def known(scorer: nn.Module, batch: PackedBatch) -> torch.Tensor:
    """Log-probs that the rows carry."""
    device = next(scorer.parameters()).device
    values = torch.from_numpy(batch.sequence_references).to(sum_dtype(device))
    return on_device(values.numpy(), device)


def frozen_copy(session: Session, rows: Rows) -> Reference:
    """A second model with the weights that the first one starts from."""
    spec = session.recipe.model
    dtype = DTYPES[spec.dtype]
    device = session.accelerator.device
    model = load_model(rows.base, session.weights_dtype, device, spec.quantization)
    model.requires_grad_(False)
    frozen = build_scorer(model, dtype, spec.attention, session.say).eval()

    def reference(scorer: nn.Module, batch: PackedBatch) -> torch.Tensor:
        with torch.no_grad():
            return sum_by_sequence(frozen(batch).logprobs, batch)

    return reference


def build_reference(
    session: Session, scorer: nn.Module, rows: Rows, plan: Plan
) -> tuple[Reference, Rows]:
    """The reference that the plan names.

    Args:
        session: of the run.
        scorer: the policy before its first step.
        rows: to train and evaluate on.
        plan: names the kind.

    Returns:
        The reference, and the rows, which carry their log-probs if these are kept on disk.
    """
    if plan.reference == "adapter_off":
        return adapter_off, rows
    if plan.reference == "frozen_copy":
        return frozen_copy(session, rows), rows
    items = used_items(plan, len(rows.train), session.recipe.seed)
    train = _with_references(session, scorer, rows, rows.train, items)
    held_out = rows.held_out
    if held_out is not None:
        every = np.arange(len(held_out))
        held_out = _with_references(session, scorer, rows, held_out, every)
    return known, replace(rows, train=train, held_out=held_out)


def used_items(plan: Plan, num_items: int, seed: int) -> npt.NDArray[np.int64]:
    """Dataset items that the run will read, sorted."""
    steps = range(min(plan.steps, plan.steps_per_epoch))
    return np.unique(
        np.concatenate([step_items(s, num_items, plan.batch_size, seed) for s in steps])
    )


def _with_references(
    session: Session,
    scorer: nn.Module,
    rows: Rows,
    dataset: TokenDataset,
    items: npt.NDArray[np.int64],
) -> TokenDataset:
    """The dataset with the log-probs of these items' rows."""
    needed = np.unique(dataset.order[items])
    key = _key(session, scorer, rows, dataset, needed)
    path = alignkit_home() / "cache" / "references" / f"{key}.npz"
    values = _read(path, len(dataset.document(0).branches), needed)
    processes = process_group(session.accelerator)
    missing = processes.reduce(torch.tensor([float(values is None)], dtype=torch.float64))
    if values is None or missing.item() > 0:  # all processes score, or none does
        session.say(f"scoring {len(needed):,} rows with the reference model, once")
        started = time.monotonic()
        documents = [dataset.document(row) for row in needed.tolist()]
        adapted = has_adapter(session.recipe.adapter)
        with adapters_off(scorer) if adapted else contextlib.nullcontext():
            values = score_sequences(scorer, documents, processes)
        session.say(f"scored them in {time.monotonic() - started:.0f} s; kept for later runs")
        if session.leads:
            _write(path, needed, values)
    else:
        session.say(f"reference log-probs of {len(needed):,} rows were stored already")
    table = np.full((dataset.num_rows, values.shape[1]), np.nan)
    table[needed] = values
    return replace(dataset, references=table)


def score_sequences(
    scorer: nn.Module, documents: Sequence[Document], processes: Any
) -> npt.NDArray[np.float64]:
    """`[n, branches]` log-probs of every branch, scored without gradients.

    Args:
        scorer: its training mode is restored afterwards.
        documents: `n` rows with the same number of branches.
        processes: this one, and sums over all of them.
    """
    branches = range(len(documents[0].branches))

    def score(scorer: nn.Module, documents: Sequence[Document]) -> dict[str, torch.Tensor]:
        batch = pack_documents(documents)
        scores: Any = scorer(batch)
        sums = sum_by_sequence(scores.logprobs, batch).view(len(documents), -1)
        return {str(branch): sums[:, branch] for branch in branches}

    columns = score_documents(score, scorer, documents, MAX_TOKENS, processes)
    return np.stack([columns[str(branch)] for branch in branches], axis=1)


def _key(
    session: Session,
    scorer: nn.Module,
    rows: Rows,
    dataset: TokenDataset,
    needed: npt.NDArray[np.int64],
) -> str:
    """Hash of what is scored: these tokens under that model, in this precision."""
    spec = session.recipe.model
    digest = hashlib.sha256()
    for array in (dataset.ids, dataset.trained, dataset.bounds, dataset.roles, needed):
        digest.update(np.ascontiguousarray(array).tobytes())
    if dataset.partners is not None:
        digest.update(dataset.partners.tobytes())
    about = {
        "format": FORMAT,
        "model": weights_version(rows.base),
        "scorer": type(getattr(scorer, "module", scorer)).__name__,
        "versions": [torch.__version__, transformers.__version__],
        "dtype": spec.dtype,
        "weights": str(session.weights_dtype),
        "quantization": spec.quantization,
        "attention": getattr(scorer, "module", scorer).attention,
        "device": session.accelerator.device.type,
        "processes": session.accelerator.num_processes,
    }
    digest.update(json.dumps(about, sort_keys=True).encode())
    return digest.hexdigest()


def _read(
    path: Path, branches: int, needed: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64] | None:
    if not path.is_file():
        return None
    try:
        with np.load(path) as stored:
            rows, values = stored["rows"], stored["values"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # incomplete: score again
    whole = np.array_equal(rows, needed) and values.shape == (len(needed), branches)
    return values if whole and np.isfinite(values).all() else None


def _write(path: Path, needed: npt.NDArray[np.int64], values: npt.NDArray[np.float64]) -> None:
    """Store the values; if the cache cannot be written, go on."""
    with contextlib.suppress(OSError, FileError), replace_file(path) as written:
        np.savez(written, rows=needed, values=values)
