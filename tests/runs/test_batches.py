"""Which micro-batch the dry run takes."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from alignkit.data.documents import Branch, Document
from alignkit.data.packing import pack_documents
from alignkit.stages.running.batches import Batches, MicroBatch, StepBatches


def rows(prompts: list[list[int]], answer: int) -> MicroBatch:
    branch = Branch(np.ones(answer, np.int32), np.ones(answer, bool))
    documents = [Document(np.array(p, np.int32), (branch,), n) for n, p in enumerate(prompts)]
    return MicroBatch(documents, 1.0)


def test_the_largest_is_the_one_with_the_most_tokens_read() -> None:
    alike = rows([[*range(40)]] * 5, 3)
    apart = rows([[n, *range(40)] for n in range(3)], 3)
    assert (alike.num_tokens, alike.num_read) == (5 * 43, 40 + 5 * 3)
    assert (apart.num_tokens, apart.num_read) == (3 * 44, 3 * 44)
    for batch in (alike, apart):
        assert batch.num_read == pack_documents(batch.documents).num_tokens

    class Two(Batches):
        def step(self, step: int) -> StepBatches:
            return StepBatches([], 1.0, [alike, apart])

    plan = cast(Any, type("Plan", (), {"steps": 1, "steps_per_epoch": 1}))
    assert Two(cast(Any, None), [], plan, 0, 0, 1).largest() is apart
