"""Where a run's adapter starts: fresh, from another run, from the base, from a text or the rows."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list

from alignkit.data.documents import Branch, Document
from alignkit.data.packing import pack_documents, step_items
from alignkit.errors import ModelError
from alignkit.evaluation.columns import MAX_TOKENS
from alignkit.models.adapters.continued import started_adapter
from alignkit.models.adapters.eva import (
    WIDER,
    EvaStart,
    find_start,
    followed_directions,
    with_ranks,
)
from alignkit.models.adapters.prefix import STATES, require_kept_keys, start_words, text_states
from alignkit.models.adapters.targets import adapted_layers, layer_ranks
from alignkit.models.base.loading import DTYPES
from alignkit.models.heap import release_memory
from alignkit.models.merging.dense import stored_weights
from alignkit.models.scoring.selfcheck import build_scorer
from alignkit.packed import PackedBatch, Role
from alignkit.recipe.adapters import AnySpec, EvaSpec, LoraSpec, PrefixSpec, eva_of
from alignkit.recipe.planning.plan import Plan
from alignkit.runtime.checkpoint import find_checkpoint, stored_shapes
from alignkit.stages.inputs.rows import AnyRows

SHOWN = 4
"""The most layers that a line names."""

InitialValues = Callable[[str], torch.Tensor]
"""Name of a weight -> values that it, or its LoRA factors, start from."""


def find_adapter_start(
    session: Any, model: Any, rows: AnyRows, plan: Plan
) -> tuple[AnySpec, InitialValues | None]:
    """The adapter to train, ready to be attached to the model.

    Args:
        session: of the run.
        model: the bare base.
        rows: the run's.
        plan: which of them it reads.

    Returns:
        The adapter with its shape, and what it starts from. A resumed run has its factors in the
        checkpoint: only their shapes are read here.

    Raises:
        ModelError: the adapter does not fit, or there are too few rows to start from.
    """
    spec = started_adapter(session.recipe.adapter, rows.base)
    if isinstance(spec, PrefixSpec):
        require_kept_keys(model)
    words = start_words(spec, rows.base, session.say)
    if words:
        return spec, {STATES: text_states(model, words)}.__getitem__
    if not isinstance(spec, LoraSpec):
        return spec, None
    if spec.init == "loftq":
        return spec, stored_weights(rows.base).__getitem__
    if spec.init != "eva":
        return spec, None
    ranks = _stored_ranks(session)
    if ranks is not None:
        session.say("eva: the start and its ranks are in the checkpoint")
        return with_ranks(model, spec.model_copy(update={"init": "default"}), ranks), None
    start = _find(session, model, rows, plan, spec)
    factors = {f"{name}.weight": a for name, a in start.factors.items()}
    return with_ranks(model, spec, start.ranks), factors.__getitem__


def _stored_ranks(session: Any) -> dict[str, int] | None:
    """Name of each layer -> rank in the checkpoint to resume from, if there is one."""
    if not session.options.resume:
        return None
    checkpoint, _ = find_checkpoint(session.output / "checkpoints")
    if checkpoint is None:
        return None
    end = ".lora_A.default.weight"
    return {
        name.removesuffix(end).partition("base_model.model.")[2]: shape[0]
        for name, shape in stored_shapes(checkpoint).items()
        if name.endswith(end)
    }


def _find(session: Any, model: Any, rows: AnyRows, plan: Plan, spec: LoraSpec) -> EvaStart:
    """The start computed from the rows, the same on every process."""
    how, started = eva_of(spec), time.monotonic()
    layers = adapted_layers(model, spec)
    own = layer_ranks(layers, spec)
    session.say(f"eva: reading rows, until all layers settle or {how.max_tokens:,} tokens are read")
    settings = session.recipe.model
    wanted = WIDER * followed_directions(layers, spec)
    passes = passes_of(rows.train, plan, session.recipe.seed, how, wanted)
    scorer = build_scorer(model, DTYPES[settings.dtype], settings.attention, session.say)
    start = find_start(scorer, layers, spec, passes)
    del scorer
    release_memory()  # of the passes, before the run allocates its own
    if session.accelerator.num_processes > 1:
        # Each computed it from the same rows, but some kernels differ in the last bit.
        box = [start]
        broadcast_object_list(box, from_process=0)
        start = box[0]
    used_up = start.rows >= min(plan.steps * plan.batch_size, len(rows.train))
    for line, label in describe_start(start, own, time.monotonic() - started, used_up=used_up):
        session.say(line, label)
    moved = {name: rank for name, rank in start.ranks.items() if rank != own[name]}
    session.about["start"] = {**vars(start), "ranks": moved}
    del session.about["start"]["factors"]
    return start


def passes_of(dataset: Any, plan: Plan, seed: int, how: EvaSpec, wanted: int) -> list[PackedBatch]:
    """Rows of the run in its order, packed for passes without gradients.

    Args:
        dataset: training rows, or prompts.
        plan: the steps that read them.
        seed: of their order.
        how: which states count; no further row is read after `max_tokens`.
        wanted: least number of states in each pass.

    Raises:
        ModelError: all rows together have fewer.
    """
    passes: list[list[Document]] = [[]]
    read = tokens = states = 0
    steps = range(min(plan.steps, plan.steps_per_epoch))
    items = (step_items(step, len(dataset), plan.batch_size, seed) for step in steps)
    for item in itertools.chain.from_iterable(items):
        if read >= how.max_tokens:
            break
        document = _readable(dataset[int(item)])
        if tokens + document.num_tokens > MAX_TOKENS and states >= wanted:
            passes.append([])
            tokens = states = 0
        passes[-1].append(document)
        tokens, read = tokens + document.num_tokens, read + document.num_tokens
        states += _states(document, how)
    if states < wanted and len(passes) > 1:
        left = passes.pop()
        passes[-1] += left
    elif states < wanted:
        _refuse_few(states, wanted, how, limited=read >= how.max_tokens)
    return [pack_documents(documents) for documents in passes]


def _readable(document: Document) -> Document:
    """The document with its trained completions; in a prompt alone every token counts."""
    if document.branches:
        return document.only(Role.CHOSEN, Role.REJECTED)
    trained = np.arange(len(document.prompt)) > 0
    whole = Branch(document.prompt, trained)
    return dataclasses.replace(document, prompt=document.prompt[:0], branches=(whole,))


def _states(document: Document, how: EvaSpec) -> int:
    prompt = len(document.prompt)
    return sum(
        int(branch.trained.sum()) if how.use_label_mask else prompt + len(branch.ids)
        for branch in document.branches
    )


def _refuse_few(states: int, wanted: int, how: EvaSpec, *, limited: bool) -> None:
    what = "states that predict a trained token" if how.use_label_mask else "tokens"
    ways = ["lower adapter.rank", "raise adapter.eva.max_tokens" if limited else "give more rows"]
    ways += ["lower adapter.eva.rho"] if how.rho > 1 else []
    ways += ["set adapter.eva.use_label_mask=false"] if how.use_label_mask else []
    raise ModelError(
        f"adapter.init = eva needs {wanted} {what}, but the rows that are read have {states}",
        hint=", or ".join(ways),
    )


def describe_start(
    start: EvaStart, own: dict[str, int], seconds: float, *, used_up: bool
) -> Iterator[tuple[str, str]]:
    """The start in lines with their labels.

    Args:
        start: as it was computed.
        own: name of each layer -> rank in the recipe.
        seconds: that it took.
        used_up: whether all rows of the run were read.
    """
    yield (
        f"eva: {start.rows:,} rows, {start.read:,} tokens read, {start.used:,} states used, "
        f"{seconds:.1f} s",
        "",
    )
    moved = [name for name, rank in start.ranks.items() if rank != own[name]]
    if moved:
        ranks = sorted(start.ranks.values())
        yield (
            f"eva: ranks are now {ranks[0]} to {ranks[-1]}, different from the recipe's in "
            f"{len(moved)} of {len(own)} layers",
            "",
        )
    left_out = [name for name, rank in start.ranks.items() if not rank]
    if left_out:
        yield f"eva: no rank is left for {_some(left_out)}: not trained", "note"
    if start.unsettled:
        yield (
            f"eva: the directions of {_some(start.unsettled)} had not settled before the last pass;"
            + (" there are no further rows" if used_up else " raise adapter.eva.max_tokens"),
            "note" if used_up else "warning",
        )


def _some(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    shown = ", ".join(names[:SHOWN])
    count = f"{len(names)} layer{'s' if len(names) > 1 else ''}"
    return f"{count} ({shown}{f' and {more} more' if more > 0 else ''})"
