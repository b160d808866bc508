"""EVA: LoRA's A starts at the main directions of what its layer reads (arXiv 2410.07170).

The rows of a layer's A are the leading right singular vectors of its inputs less their mean, over
the rows of the run; B is 0, so nothing changes at first. PEFT's incremental decomposition finds
them pass by pass: of a layer only its directions so far are kept, never its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from alignkit.errors import ModelError
from alignkit.models.adapters.ranks import shared_ranks
from alignkit.models.adapters.stacks import Adaptable
from alignkit.models.peft_parts import IncrementalPCA
from alignkit.models.scoring.scorer import Scorer, evaluating
from alignkit.models.scoring.selfcheck import probe_batch
from alignkit.packed import PackedBatch
from alignkit.recipe.adapters import EvaSpec

_WIDER = 2
"""The fast decomposition follows so many times the directions that are wanted."""

_SEED = 42
"""Of the fast decomposition; PEFT's, so that the same rows give the same start there."""

_NOTHING = 1e-5
"""Share of the largest singular value below which a direction is rounding."""


@dataclass(frozen=True)
class EvaStart:
    """Where LoRA's A starts, and what that was found from.

    Args:
        factors: name of each layer that has a rank -> A, `[r, I]` float32, rows of length 1.
        ranks: name of each layer -> its rank, 0 for one that is left alone.
        rows: documents that were read.
        read: tokens that were read.
        used: states that were looked at.
        unsettled: name of each layer whose directions still turned -> smallest cosine of one with
            what it was before the last pass, 0 if that was the first.
        narrow: layers whose inputs vary in fewer directions than their rank.
    """

    factors: dict[str, torch.Tensor]
    ranks: dict[str, int]
    rows: int
    read: int
    used: int
    unsettled: dict[str, float]
    narrow: tuple[str, ...]


class _Input:
    """What one or several layers read, and its main directions so far.

    Args:
        readers: names of the layers.
        size: directions that are followed.
    """

    def __init__(self, readers: list[str], size: int) -> None:
        self.readers, self.size = readers, size
        self.waiting: list[torch.Tensor] = []
        self.pca = IncrementalPCA(size, lowrank=True, lowrank_q=_WIDER * size, lowrank_seed=_SEED)
        self.cosines = torch.full((size,), -1.0)  # of none yet

    def settled(self, rank: int, tau: float) -> bool:
        """Whether the first directions, as many as the rank, turned no more in the last pass."""
        return bool((self.cosines[:rank] >= tau).all())

    def learn(self) -> None:
        """Take in the states that are waiting."""
        states = torch.cat(self.waiting)
        self.waiting = []
        before = getattr(self.pca, "components_", None)
        # It cannot follow more directions than there are.
        self.pca.lowrank = _WIDER * self.size <= min(states.shape)
        self.pca.partial_fit(states)
        if before is not None:
            # Which way a direction points is arbitrary, and may flip.
            found = nn.functional.cosine_similarity(self.pca.components_, before)
            self.cosines = found.abs().cpu()

    def varies(self, rank: int) -> bool:
        """Whether the inputs vary along as many directions as the rank, rounding apart."""
        values = self.pca.singular_values_[:rank]
        return not rank or bool(values[-1] > _NOTHING * values[0])


def find_start(
    scorer: Scorer,
    layers: Mapping[str, Adaptable],
    largest: Mapping[str, int],
    budget: int,
    batches: Iterable[PackedBatch],
    spec: EvaSpec,
) -> EvaStart:
    """Main directions of the layers' inputs, and the ranks that follow from them.

    Args:
        scorer: around the bare base, no adapter attached.
        layers: by their names in the base.
        largest: name of each layer -> rank that it may have.
        budget: sum of all ranks, at most that of the largest.
        batches: rows of the run, in its order; read until all layers have settled.
        spec: when they have, and which states count.

    Returns:
        The start; what it was found from is decided by the rows, their order and the cuts between
        the batches.

    Raises:
        ModelError: a layer does not read whole rows, the rows have too few states for a rank, or a
            layer's inputs do not vary or are not finite.
    """
    inputs = active = _find_inputs(scorer, layers, largest)
    owner = {name: one for one in inputs for name in one.readers}
    need = dict(largest)
    most = max(largest.values())
    rows = read = used = waiting = 0

    def learn() -> None:
        nonlocal need, used, waiting
        for one in inputs:
            if one.waiting:
                one.learn()
        used, waiting = used + waiting, 0
        shares = {name: one.pca.explained_variance_ratio_ for name, one in owner.items()}
        _require_variance(shares, owner)
        need = shared_ranks(shares, largest, budget)

    def settled(one: _Input) -> bool:
        return one.settled(max(need[name] for name in one.readers), spec.tau)

    with evaluating(scorer):
        for batch in batches:
            if not waiting:
                # What settled may turn again when ranks have moved to it; then it is read on.
                active = [one for one in inputs if not settled(one)]
            if not active:
                break
            places = scorer.places(batch, targets=spec.use_label_mask)
            watched = {layers[one.readers[0]].module: _keep(one, places) for one in active}
            _forward(scorer, batch, watched)
            rows, read = rows + len(batch.rows), read + batch.num_tokens
            waiting += len(places)
            if waiting >= _WIDER * most:
                learn()
    if waiting >= most:
        learn()
    if not used:
        _refuse_few(waiting, most, spec, limited=read >= spec.max_tokens)
    return _start(inputs, need, spec, (rows, read, used))


def _start(
    inputs: list[_Input], ranks: dict[str, int], spec: EvaSpec, counts: tuple[int, int, int]
) -> EvaStart:
    factors, unsettled, narrow = {}, {}, []
    for one in inputs:
        for name in one.readers:
            rank = ranks[name]
            if rank:
                factors[name] = one.pca.components_[:rank].float().cpu().contiguous()
            if not one.settled(rank, spec.tau):
                unsettled[name] = max(0.0, float(one.cosines[:rank].min()))
            if not one.varies(rank):
                narrow.append(name)
    rows, read, used = counts
    return EvaStart(factors, ranks, rows, read, used, unsettled, tuple(narrow))


Watch = Callable[[torch.Tensor], None]
"""Is given what a layer reads."""


def _keep(one: _Input, places: torch.Tensor) -> Watch:
    def watch(x: torch.Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1])
        # The decomposition adds up in float64, which MPS has not.
        home = "cpu" if x.device.type == "mps" else x.device
        one.waiting.append(flat.index_select(0, places.to(x.device)).to(home).float())

    return watch


def _forward(scorer: Scorer, batch: PackedBatch, watched: dict[nn.Linear, Watch]) -> None:
    handles = [
        layer.register_forward_pre_hook(lambda module, args, watch=watch: watch(args[0]))
        for layer, watch in watched.items()
    ]
    try:
        scorer(batch)
    finally:
        for handle in handles:
            handle.remove()


def _find_inputs(
    scorer: Scorer, layers: Mapping[str, Adaptable], largest: Mapping[str, int]
) -> list[_Input]:
    """Which layers read the same tensor, found on a few tokens.

    Layers that do are called one after another, so it is enough to compare with the last.
    """
    groups: list[list[str]] = []
    lengths: dict[str, int] = {}
    last: list[Any] = [None]

    def watch(name: str) -> Watch:
        def found(x: torch.Tensor) -> None:
            lengths[name] = lengths.get(name, 0) + x.reshape(-1, x.shape[-1]).shape[0]
            if x is last[0]:
                groups[-1].append(name)
            else:
                groups.append([name])
            last[0] = x

        return found

    batch = probe_batch(int(scorer.causal.config.get_text_config().vocab_size))
    with evaluating(scorer):
        _forward(scorer, batch, {layer.module: watch(name) for name, layer in layers.items()})
    usual = max(lengths.values(), default=0)
    odd = [name for name in layers if lengths.get(name) != usual]
    if odd:
        raise ModelError(
            f"adapter.init = eva looks at what layers read, and {odd[0]} "
            + ("reads single tokens of a row" if odd[0] in lengths else "is not called as a layer"),
            hint="leave it out of adapter.targets, or take another adapter.init",
        )
    return [_Input(names, max(largest[name] for name in names)) for names in groups]


def _require_variance(shares: Mapping[str, torch.Tensor], owner: Mapping[str, _Input]) -> None:
    for name, share in shares.items():
        variance: Any = owner[name].pca.var_
        if not bool(torch.isfinite(share).all() and torch.isfinite(variance).all()):
            raise ModelError(
                f"adapter.init = eva finds no directions in what {name} reads: it does not vary, "
                "or is not finite",
                hint="look at the rows with `alignkit inspect`, or leave adapter.init away",
            )


def _refuse_few(found: int, most: int, spec: EvaSpec, *, limited: bool) -> None:
    what = "states that predict a trained token" if spec.use_label_mask else "tokens"
    ways = ["lower adapter.rank", "raise adapter.eva.max_tokens" if limited else "give more rows"]
    ways += ["lower adapter.eva.rho"] if spec.rho > 1 else []
    ways += ["set adapter.eva.use_label_mask=false"] if spec.use_label_mask else []
    raise ModelError(
        f"adapter.init = eva wants {most} directions of a layer's inputs, and the rows that are "
        f"read have {found} {what}",
        hint=", or ".join(ways),
    )
