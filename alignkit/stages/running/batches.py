"""Which documents an optimizer step reads, split into micro-batches for each process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alignkit.data.dataset import TokenDataset
from alignkit.data.documents import Document
from alignkit.data.packing import LOOKAHEAD, common_starts, split_documents, step_items
from alignkit.recipe.planning.plan import Plan


@dataclass(frozen=True)
class MicroBatch:
    """Documents of one forward and backward pass.

    Args:
        documents: at least one.
        share: 1, or 0 for a pass that only keeps step with the other processes.
    """

    documents: list[Document]
    share: float

    @property
    def num_tokens(self) -> int:
        """Tokens of the documents."""
        return sum(document.num_tokens for document in self.documents)

    @property
    def num_read(self) -> int:
        """Tokens the model reads: a start that documents share counts once."""
        starts = common_starts(self.documents)
        return self.num_tokens - sum(n * (len(members) - 1) for members, n in starts)


@dataclass(frozen=True)
class StepBatches:
    """One optimizer step.

    Args:
        items: dataset items of the step, over all processes.
        weight: what the summed loss is divided by, over all processes.
        micro_batches: of this process; every process has the same number, because sharded
            models need it.
    """

    items: list[int]
    weight: float
    micro_batches: list[MicroBatch]


@dataclass(frozen=True)
class Batches:
    """The steps of a run as one process sees them.

    Args:
        dataset: rows to train on.
        weights: weight of each dataset item.
        plan: batch size and token budget.
        seed: of the order.
        rank: of this process.
        world: number of processes.
    """

    dataset: TokenDataset
    weights: Sequence[int]
    plan: Plan
    seed: int
    rank: int
    world: int

    def step(self, step: int) -> StepBatches:
        """Documents of one step.

        Args:
            step: from 0.
        """
        items = step_items(step, len(self.dataset), self.plan.batch_size, self.seed).tolist()
        weight = float(sum(int(self.weights[item]) for item in items))
        shards = [items[rank :: self.world] for rank in range(self.world)]
        groups = [self._groups(shard) for shard in shards]
        mine = [
            MicroBatch([self.dataset[shards[self.rank][i]] for i in group], 1.0)
            for group in groups[self.rank]
        ]
        missing = max(len(group) for group in groups) - len(mine)
        filler = MicroBatch([self.dataset[items[0]]], 0.0)
        return StepBatches(items, weight, [filler] * missing + mine)

    def largest(self) -> MicroBatch:
        """The micro-batch with the most tokens for the model to read, in the steps to come."""
        best: tuple[int, int, int] | None = None
        for step in range(min(self.plan.steps, self.plan.steps_per_epoch, LOOKAHEAD)):
            for number, batch in enumerate(self.step(step).micro_batches):
                if best is None or batch.num_read > best[0]:
                    best = (batch.num_read, step, number)
        assert best is not None
        return self.step(best[1]).micro_batches[best[2]]

    def places(self, items: Sequence[int]) -> list[str]:
        """`file:line` of dataset items."""
        return [self.dataset.places[int(self.dataset.order[item])] for item in items]

    def _groups(self, items: list[int]) -> list[list[int]]:
        lengths = self.dataset.lengths
        return split_documents([int(lengths[i]) for i in items], self.plan.microbatch_tokens)
