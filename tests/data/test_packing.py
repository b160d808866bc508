"""The order of items, micro-batches, and the layout of a packed row."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import pytest

from alignkit.data.documents import Branch, Document
from alignkit.data.packing import (
    MIN_COMMON,
    common_starts,
    largest_share,
    pack_documents,
    split_documents,
    step_items,
)
from alignkit.packed import Role, Segment


def flat(lists: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


# order ---------------------------------------------------------------------------------------


def epoch_of(epoch: int, num_items: int, batch_size: int, seed: int) -> list[list[int]]:
    steps = -(-num_items // batch_size)
    first = epoch * steps
    return [
        step_items(step, num_items, batch_size, seed).tolist()
        for step in range(first, first + steps)
    ]


@pytest.mark.parametrize(("num_items", "batch_size"), [(10, 5), (10, 4), (3, 8), (1, 1), (7, 1)])
def test_an_epoch_is_a_permutation(num_items: int, batch_size: int) -> None:
    for epoch in (0, 1, 5):
        batches = epoch_of(epoch, num_items, batch_size, seed=3)
        assert sorted(flat(batches)) == list(range(num_items))
        assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
        assert 1 <= len(batches[-1]) <= batch_size


def test_every_epoch_and_every_seed_has_its_own_order() -> None:
    orders = [flat(epoch_of(e, 50, 50, seed)) for e in range(3) for seed in range(3)]
    assert len({tuple(order) for order in orders}) == 9


def test_a_step_depends_on_nothing_that_came_before() -> None:
    assert step_items(7, 50, 8, seed=1).tolist() == epoch_of(1, 50, 8, seed=1)[0]
    assert step_items(7, 50, 8, 1).tolist() == step_items(7, 50, 8, 1).tolist()
    assert step_items(0, 50, 8, 1).dtype == np.int64


@pytest.mark.parametrize(("processes", "steps"), [(1, None), (2, None), (3, 2)])
def test_the_largest_share_of_a_step(processes: int, steps: int | None) -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 50)
    shares = [
        sum(int(lengths[item]) for item in items[rank::processes])
        for items in epoch_of(0, 50, 8, seed=1)[:steps]
        for rank in range(processes)
    ]
    assert largest_share(lengths, 8, 1, processes, steps) == max(shares)
    assert min(shares) < max(shares)


def test_the_batch_size_cuts_the_order_and_does_not_change_it() -> None:
    assert flat(epoch_of(2, 50, 8, 1)) == flat(epoch_of(2, 50, 20, 1))


# micro-batches -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_split_covers_each_document_once_within_the_budget(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 40, size=rng.integers(1, 60)).tolist()
    budget = int(rng.integers(5, 60))
    groups = split_documents(lengths, budget)
    assert sorted(flat(groups)) == list(range(len(lengths)))
    for group in groups:
        total = sum(lengths[index] for index in group)
        assert total <= budget or len(group) == 1
        sizes = [lengths[index] for index in group]
        assert sizes == sorted(sizes, reverse=True)
    # First-fit decreasing opens a group only if no open one has room: at most one group that
    # holds short documents only may be half empty.
    totals = [sum(lengths[index] for index in group) for group in groups]
    assert sum(2 * total <= budget for total in totals) <= 1


@pytest.mark.parametrize(
    ("lengths", "budget", "groups"),
    [
        ([5, 5, 5], 10, [[0, 1], [2]]),
        ([2, 9, 3, 6], 10, [[1], [3, 2], [0]]),
        ([1, 9, 3, 6], 10, [[1, 0], [3, 2]]),
        ([20, 1], 10, [[0], [1]]),  # too long for any budget: alone, and nothing joins it
        ([4], 4, [[0]]),
        ([3, 3, 3], 9, [[0, 1, 2]]),
    ],
)
def test_first_fit_decreasing_by_hand(
    lengths: list[int], budget: int, groups: list[list[int]]
) -> None:
    assert split_documents(lengths, budget) == groups


# layout --------------------------------------------------------------------------------------


def branch(ids: Sequence[int], trained: Sequence[int]) -> Branch:
    return Branch(np.array(ids, np.int32), np.array(trained, bool))


def document(prompt: Sequence[int], *branches: Branch, row: int = 0) -> Document:
    return Document(np.array(prompt, np.int32), branches, row)


def test_one_branch_by_hand() -> None:
    packed = pack_documents([document([], branch([10, 11, 12, 13], [0, 0, 1, 1]), row=5)])
    assert packed.input_ids.tolist() == [10, 11, 12, 13]
    assert packed.position_ids.tolist() == [0, 1, 2, 3]
    assert packed.segments == (Segment(0, 4),)
    # The state of token 1 predicts 12, that of token 2 predicts 13.
    assert packed.target_rows.tolist() == [1, 2]
    assert packed.target_ids.tolist() == [12, 13]
    assert packed.target_sequences.tolist() == [0, 0]
    assert packed.sequence_ends.tolist() == [3]
    assert packed.sequence_documents.tolist() == [0]
    assert packed.rows == (5,)
    assert (packed.num_tokens, len(packed.target_ids), packed.num_sequences) == (4, 2, 1)


def test_one_branch_with_a_prompt_is_one_causal_run() -> None:
    packed = pack_documents([document([1, 2], branch([3, 4], [1, 1]))])
    assert packed.segments == (Segment(0, 4),)
    assert packed.position_ids.tolist() == [0, 1, 2, 3]
    assert packed.target_rows.tolist() == [1, 2]
    assert packed.target_ids.tolist() == [3, 4]


def test_two_branches_by_hand() -> None:
    chosen, rejected = branch([20, 21], [1, 1]), branch([30, 31, 32], [1, 0, 1])
    packed = pack_documents([document([10, 11, 12], chosen, rejected, row=7)])
    assert packed.input_ids.tolist() == [10, 11, 12, 20, 21, 30, 31, 32]
    # Both branches continue from the end of the prompt.
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 4, 5]
    assert packed.segments == (Segment(0, 3), Segment(3, 2, 0, 3), Segment(5, 3, 0, 3))
    # The last prompt token (2) predicts the first token of both branches.
    assert packed.target_rows.tolist() == [2, 3, 2, 6]
    assert packed.target_ids.tolist() == [20, 21, 30, 32]
    assert packed.target_sequences.tolist() == [0, 0, 1, 1]
    assert packed.sequence_ends.tolist() == [4, 7]
    assert packed.sequence_documents.tolist() == [0, 0]
    assert packed.rows == (7,)


def test_two_branches_without_a_prompt_stand_alone() -> None:
    packed = pack_documents([document([], branch([1, 2], [0, 1]), branch([3, 4], [0, 1]))])
    assert packed.segments == (Segment(0, 2), Segment(2, 2))
    assert packed.position_ids.tolist() == [0, 1, 0, 1]
    assert packed.target_rows.tolist() == [0, 2]


def test_a_branch_without_targets_has_an_end_all_the_same() -> None:
    packed = pack_documents([document([1], branch([2], [0]), branch([3], [0]))])
    assert len(packed.target_ids) == 0
    assert packed.sequence_ends.tolist() == [1, 2]


START = tuple(range(50, 50 + MIN_COMMON))


def test_prompts_that_begin_alike_share_their_start() -> None:
    one = document([*START, 1, 2], branch([3, 4], [1, 1]))
    other = document(START, branch([5, 6], [1, 1]))
    alone = document([*range(MIN_COMMON)], branch([9], [1]))
    n = MIN_COMMON
    packed = pack_documents([one, alone, other])
    assert packed.input_ids.tolist() == [*START, 1, 2, 3, 4, *range(n), 9, 5, 6]
    steps = [*range(n), n, n + 1, n + 2, n + 3, *range(n + 1), n, n + 1]
    assert packed.position_ids.tolist() == steps
    assert packed.segments == (
        *(Segment(0, n), Segment(n, 4, 0, n)),
        *(Segment(n + 4, n + 1), Segment(2 * n + 5, 2, 0, n)),
    )
    # Where nothing stands between the start and the answer, the start's last token predicts it.
    assert packed.target_rows.tolist() == [n + 1, n + 2, 2 * n + 3, n - 1, 2 * n + 5]
    assert packed.target_ids.tolist() == [3, 4, 9, 5, 6]
    assert packed.sequence_ends.tolist() == [n + 3, 2 * n + 4, 2 * n + 6]
    assert packed.sequence_documents.tolist() == [0, 1, 2]


def test_what_is_worth_sharing() -> None:
    def starts(*prompts: Sequence[int], answer: int = 1) -> list[tuple[list[int], int]]:
        tokens = branch([0] * answer, [1] * answer)
        return common_starts([document(prompt, tokens) for prompt in prompts])

    assert starts(START) == []
    assert starts(START, START) == [([0, 1], MIN_COMMON)]
    assert starts((*START, 1, 2), (*START, 1, 3)) == [([0, 1], MIN_COMMON + 1)]
    assert starts(START[1:], START[1:]) == []  # too short
    assert starts(START, START[::-1], START, START[::-1]) == [
        ([0, 2], MIN_COMMON),
        ([1, 3], MIN_COMMON),
    ]
    # 16 of 128 tokens are saved, then 16 of 130.
    assert starts(START, START, answer=64 - MIN_COMMON) == [([0, 1], MIN_COMMON)]
    assert starts(START, START, answer=65 - MIN_COMMON) == []
    # A pair has its own prompt as prefix.
    pair = document(START, branch([1], [1]), branch([2], [1]))
    assert common_starts([pair, pair]) == []


def random_documents(rng: np.random.Generator) -> list[Document]:
    documents = []
    alike = rng.random() < 0.5
    for row in range(rng.integers(1, 6)):
        prompt = rng.integers(0, 99, size=rng.integers(0, 5))
        if alike and rng.random() < 0.8:
            prompt = np.concatenate([START, prompt])
        branches = []
        for _ in range(rng.integers(1, 4)):
            ids = rng.integers(0, 99, size=rng.integers(1, 6))
            trained = rng.random(len(ids)) < 0.6
            if len(prompt) == 0:
                trained[0] = False  # nothing predicts it
            branches.append(Branch(ids.astype(np.int32), trained))
        documents.append(Document(prompt.astype(np.int32), tuple(branches), row))
    return documents


@pytest.mark.parametrize("seed", range(30))
def test_packing_equals_the_sequences_written_out(seed: int) -> None:
    """Every sequence, read back through segments and targets, is its prompt and its branch."""
    documents = random_documents(np.random.default_rng(seed))
    packed = pack_documents(documents)

    # Segments cover the row in order, without gap or overlap; a prefix lies before its run.
    edges = [(segment.start, segment.start + segment.length) for segment in packed.segments]
    assert [begin for begin, _ in edges] == [0, *(end for _, end in edges[:-1])]
    assert edges[-1][1] == packed.num_tokens
    for segment in packed.segments:
        assert segment.length >= 1
        assert segment.prefix_start + segment.prefix_length <= segment.start + segment.length
        if segment.prefix_length:
            assert segment.prefix_start + segment.prefix_length <= segment.start

    # What a token sees, itself included, in order: its prefix and its own run up to itself.
    seen: list[list[int]] = []
    for segment in packed.segments:
        prefix = range(segment.prefix_start, segment.prefix_start + segment.prefix_length)
        for offset in range(segment.length):
            own = range(segment.start, segment.start + offset + 1)
            seen.append([*prefix, *own] if segment.prefix_length else list(own))
    for row, tokens in enumerate(seen):
        assert packed.position_ids[row] == len(tokens) - 1

    sequence = 0
    targets = list(
        zip(
            packed.target_sequences.tolist(),
            packed.target_rows.tolist(),
            packed.target_ids.tolist(),
            strict=True,
        )
    )
    for number, doc in enumerate(documents):
        for item in doc.branches:
            whole = [*doc.prompt.tolist(), *item.ids.tolist()]
            end = int(packed.sequence_ends[sequence])
            assert packed.input_ids[seen[end]].tolist() == whole
            assert packed.sequence_documents[sequence] == number
            # Naively: position p of the sequence is a target where the branch trains it, and it
            # is predicted by a token that has read everything before p and nothing else.
            wanted = [len(doc.prompt) + int(p) for p in np.flatnonzero(item.trained)]
            found = [(row, token) for owner, row, token in targets if owner == sequence]
            assert [token for _, token in found] == [whole[p] for p in wanted]
            assert [packed.input_ids[seen[row]].tolist() for row, _ in found] == [
                whole[:p] for p in wanted
            ]
            sequence += 1
    assert sequence == packed.num_sequences
    shared = sum(length * (len(members) - 1) for members, length in common_starts(documents))
    assert packed.num_tokens == sum(doc.num_tokens for doc in documents) - shared
    assert packed.rows == tuple(range(len(documents)))


def test_what_branches_are_to_their_objective_goes_along() -> None:
    one, other = branch([2, 3], [1, 1]), branch([4], [1])
    pair = (
        dataclasses.replace(one, role=Role.CHOSEN, reference=-1.5),
        dataclasses.replace(other, role=Role.REJECTED, reference=-2.25),
    )
    odd = dataclasses.replace(one, role=Role.MISMATCHED)
    packed = pack_documents(
        [dataclasses.replace(document([1], *pair), margin=0.5), document([1], odd)]
    )
    assert packed.sequence_roles.tolist() == [Role.CHOSEN, Role.REJECTED, Role.MISMATCHED]
    assert packed.sequence_references[:2].tolist() == [-1.5, -2.25]
    assert np.isnan(packed.sequence_references[2])
    assert packed.margins.tolist() == [0.5, 0.0]
    assert packed.sequence_references.dtype == packed.margins.dtype == np.float64


def test_only_keeps_branches_of_a_role() -> None:
    pair = (branch([2], [1]), dataclasses.replace(branch([3], [1]), role=Role.REJECTED))
    whole = document([1], *pair, row=4)
    assert whole.only(Role.CHOSEN, Role.REJECTED) == whole
    rejected = whole.only(Role.REJECTED)
    assert [found.ids.tolist() for found in rejected.branches] == [[3]]
    assert (rejected.row, rejected.num_tokens) == (4, 2)


def test_arrays_are_int64() -> None:
    packed = pack_documents([document([1], branch([2], [1]))])
    for name in (
        *("input_ids", "position_ids", "target_rows", "target_ids", "target_sequences"),
        *("sequence_ends", "sequence_documents", "sequence_roles"),
    ):
        assert getattr(packed, name).dtype == np.int64, name
