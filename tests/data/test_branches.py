"""Where two answers leave their prompt, and what becomes of pairs that are too long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from documents import answers, as_rows
from tiny import END_OF_TURN, TOKENIZERS, tiny_tokenizer

from alignkit.data.branches import fit, share_prompt
from alignkit.data.documents import Branch, Document
from alignkit.data.examples import Example
from alignkit.data.formats import Completion, Conversation, Text
from alignkit.data.report import DataReport
from alignkit.data.tokenize import TokenizeSettings, tokenize_examples
from alignkit.data.turns import Message
from alignkit.errors import DataError
from alignkit.packed import Role

BOS = 1


SIDES = (Role.CHOSEN, Role.REJECTED)


def pair(chosen: Text, rejected: Text) -> Example:
    return Example((chosen, rejected), SIDES, chosen.place)


def labelled(text: Text, role: Role = Role.CHOSEN) -> Example:
    return Example((text,), (role,), text.place)


def row(ids: Sequence[int], trained: Sequence[int]) -> Branch:
    return Branch(np.array(ids, np.int32), np.array(trained, bool))


def shape(document: Document) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
    """Prompt, and ids and mask of each branch."""
    branches = [(b.ids.tolist(), b.trained.astype(int).tolist()) for b in document.branches]
    return document.prompt.tolist(), branches


# the branch point ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        (  # both answers begin where the prompts end
            ([1, 2, 3, 10, 11], [0, 0, 0, 1, 1]),
            ([1, 2, 3, 20], [0, 0, 0, 1]),
            ([1, 2, 3], [([10, 11], [1, 1]), ([20], [1])]),
        ),
        (  # answers that begin alike: each is whole all the same
            ([1, 2, 10, 11], [0, 0, 1, 1]),
            ([1, 2, 10, 12], [0, 0, 1, 1]),
            ([1, 2], [([10, 11], [1, 1]), ([10, 12], [1, 1])]),
        ),
        (  # one answer is the beginning of the other
            ([1, 2, 10, 11], [0, 0, 1, 1]),
            ([1, 2, 10], [0, 0, 1]),
            ([1, 2], [([10, 11], [1, 1]), ([10], [1])]),
        ),
        (  # the prompts differ before an answer begins: what differs is read and not trained
            ([1, 2, 3, 10], [0, 0, 0, 1]),
            ([1, 5, 3, 4, 20], [0, 0, 0, 0, 1]),
            ([1], [([2, 3, 10], [0, 0, 1]), ([5, 3, 4, 20], [0, 0, 0, 1])]),
        ),
        (  # a token across the border counts as answer in one of them only
            ([1, 2, 3, 10], [0, 0, 1, 1]),
            ([1, 2, 3, 20], [0, 0, 0, 1]),
            ([1, 2], [([3, 10], [1, 1]), ([3, 20], [0, 1])]),
        ),
        (  # nothing in common: no prompt, and nothing predicts a first token
            ([7, 10], [0, 1]),
            ([8, 20], [0, 1]),
            ([], [([7, 10], [0, 1]), ([8, 20], [0, 1])]),
        ),
        (  # nothing after the last trained token is kept
            ([1, 10, 11, 3, 3], [0, 1, 1, 0, 0]),
            ([1, 20, 3], [0, 1, 0]),
            ([1], [([10, 11], [1, 1]), ([20], [1])]),
        ),
        (  # several answers with context between them
            ([1, 10, 5, 11, 3], [0, 1, 0, 1, 0]),
            ([1, 20, 3], [0, 1, 0]),
            ([1], [([10, 5, 11], [1, 0, 1]), ([20], [1])]),
        ),
    ],
)
def test_branch_point_by_hand(chosen: Any, rejected: Any, expected: Any) -> None:
    found = share_prompt([row(*chosen), row(*rejected)], SIDES, 7, 0.5)
    assert shape(found) == expected
    assert [branch.role for branch in found.branches] == [Role.CHOSEN, Role.REJECTED]
    assert (found.row, found.margin) == (7, 0.5)
    mirrored = share_prompt([row(*rejected), row(*chosen)], SIDES, 0, 0.0)
    assert shape(mirrored) == (expected[0], expected[1][::-1])


@pytest.mark.parametrize("role", SIDES)
def test_a_labelled_answer_by_hand(role: Role) -> None:
    found = share_prompt([row([1, 2, 10, 11, 3], [0, 0, 1, 1, 0])], [role], 0, 0.0)
    assert shape(found) == ([1, 2], [([10, 11], [1, 1])])
    assert [branch.role for branch in found.branches] == [role]


@pytest.mark.parametrize("seed", range(30))
def test_the_branch_point_is_the_earliest_of_three_naively(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(2):
        ids, mask = rng.integers(0, 2, 12), rng.random(12) < 0.3
        mask[0], mask[rng.integers(1, 12)] = False, True
        rows.append(row(ids.tolist(), mask.tolist()))
    found = share_prompt(rows, SIDES, 0, 0.0)
    start = 0
    while (
        start < 12
        and rows[0].ids[start] == rows[1].ids[start]
        and not rows[0].trained[start]
        and not rows[1].trained[start]
    ):
        start += 1
    assert len(found.prompt) == start
    for side, branch in zip(rows, found.branches, strict=True):
        end = 12 - int(side.trained[::-1].argmax())
        assert [*found.prompt, *branch.ids] == side.ids[:end].tolist()
        assert [False] * start + branch.trained.tolist() == side.trained[:end].tolist()


# with tokenizers -----------------------------------------------------------------------------


def chat(*turns: str, system: str = "", place: str = "r:1") -> Conversation:
    """Turns by user and assistant in alternation; only the last one is trained."""
    roles = ["user", "assistant"] * len(turns)
    messages = [Message(r, t, trained=False) for r, t in zip(roles, turns, strict=False)]
    messages[-1] = Message("assistant", turns[-1])
    head = [Message("system", system)] if system else []
    return Conversation((*head, *messages), (), place)


def alone(tokenizer: Any, text: Text) -> Branch:
    """The row as supervised fine-tuning reads it."""
    documents, _ = tokenize_examples(answers([text]), tokenizer, TokenizeSettings(10_000, "error"))
    (found,) = as_rows(documents)
    return found


def tokenize(
    tokenizer: Any, *examples: Any, limit: int = 10_000, too_long: Any = "error"
) -> tuple[list[Document], DataReport]:
    kind: Any = "pairs" if len(examples[0].texts) > 1 else "labelled"
    settings = TokenizeSettings(limit, too_long, rows=kind)
    return tokenize_examples(list(examples), tokenizer, settings)


def assert_same_sequence(document: Document, number: int, whole: Branch) -> None:
    """Prompt and branch are the row up to its last trained token."""
    branch = document.branches[number]
    end = int(np.flatnonzero(whole.trained)[-1]) + 1
    assert [*document.prompt, *branch.ids] == whole.ids[:end].tolist()
    mask = [False] * len(document.prompt) + branch.trained.tolist()
    assert mask == whole.trained[:end].tolist()
    assert branch.trained[-1]


CHATS = {
    "single": (chat("Hi?", "Hello there."), chat("Hi?", "No.")),
    "same beginning": (chat("Hi?", "Hello there."), chat("Hi?", "Hello you.")),
    "one goes on": (chat("Hi?", "Hello"), chat("Hi?", "Hello there.")),
    "multi": (chat("Hi?", "Hello.", "And?", "So."), chat("Hi?", "Hello.", "And?", "No, never.")),
    "system": (
        chat("Hi?", "Hello.", system="Be kind."),
        chat("Hi?", "12345 🙂", system="Be kind."),
    ),
    "unknown letters": (chat("Grüße 🙂?", "ä\n\n\tß 🙂"), chat("Grüße 🙂?", "ß 🙃")),
    "white space": (chat("Hi?", "\n  Hello.\n"), chat("Hi?", " No.\n\n")),
}
TEXTS = {
    "plain": pair(
        Completion("The colour is", " green.", "r:1"), Completion("The colour is", " red.", "r:1")
    ),
    # Without a space between them, prompt and answer merge into one token, or do not.
    "merges": pair(Completion("See t", "he", "r:1"), Completion("See t", "!", "r:1")),
    "both merge": pair(Completion("See t", "he", "r:1"), Completion("See t", "o", "r:1")),
    "no prompt": pair(Completion("", "One.", "r:1"), Completion("", "Two.", "r:1")),
}  # fmt: skip
PAIRS = {name: pair(*sides) for name, sides in CHATS.items()} | TEXTS


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("family", TOKENIZERS)
def test_both_sequences_are_what_each_side_is_alone(family: str, name: str) -> None:
    tokenizer, example = tiny_tokenizer(family), PAIRS[name]
    (document,), report = tokenize(tokenizer, example)
    sides = [alone(tokenizer, side) for side in example.texts]
    for number, whole in enumerate(sides):
        assert_same_sequence(document, number, whole)
    # The branch point, once more from its definition.
    first = [int(side.trained.argmax()) for side in sides]
    common = next(
        n for n, (a, b) in enumerate(zip(*(s.ids.tolist() for s in sides), strict=False)) if a != b
    )
    assert len(document.prompt) == min(*first, common)
    assert not np.array_equal(document.branches[0].ids, document.branches[1].ids)
    lengths = [len(branch.ids) for branch in document.branches]
    assert report.lengths == [len(document.prompt) + max(lengths)]
    assert report.tokens == len(document.prompt) + sum(lengths)
    assert report.trained_tokens == sum(int(side.trained.sum()) for side in sides)
    assert (report.rows, report.kept, report.dropped) == (1, 1, {})


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("family", TOKENIZERS)
def test_answers_of_chats_are_trained_from_their_first_token_to_the_end_of_the_turn(
    family: str, name: str
) -> None:
    tokenizer = tiny_tokenizer(family)
    (document,), report = tokenize(tokenizer, PAIRS[name])
    stop = tokenizer.convert_tokens_to_ids(END_OF_TURN[family])
    for branch in document.branches:
        assert branch.trained.all()
        assert branch.ids[-1] == stop
    assert report.stop_tokens == [stop]
    assert report.notes == {}


@pytest.mark.parametrize("family", TOKENIZERS)
def test_a_border_that_merges_on_one_side_only(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    (document,), _ = tokenize(tokenizer, PAIRS["merges"])
    see, rest = tokenizer("See")["input_ids"], tokenizer.decode(document.branches[0].ids)
    assert document.prompt.tolist() == see  # " t" is no part of it: "See the" has no such token
    assert rest.strip() == f"the{tokenizer.eos_token}"
    assert document.branches[0].trained.tolist() == [True, True]
    # The other side keeps " t" as context.
    trained = document.branches[1].ids[document.branches[1].trained]
    assert tokenizer.decode(trained) == f"!{tokenizer.eos_token}"
    assert not document.branches[1].trained[0]


@pytest.mark.parametrize("role", SIDES)
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("family", TOKENIZERS)
def test_a_labelled_sequence_is_what_the_row_is_alone(family: str, name: str, role: Role) -> None:
    tokenizer = tiny_tokenizer(family)
    text = PAIRS[name].texts[role]
    (document,), _ = tokenize(tokenizer, labelled(text, role))
    whole = alone(tokenizer, text)
    assert_same_sequence(document, 0, whole)
    assert len(document.prompt) == int(whole.trained.argmax())
    (branch,) = document.branches
    assert branch.trained[0]
    assert branch.role is role


def test_a_side_that_trains_nothing_drops_the_pair() -> None:
    # Qwen adds no BOS, and nothing predicts a first token.
    tokenizer = tiny_tokenizer("qwen")
    empty = Completion("", "<|im_end|>", "r:7")
    one_empty = pair(Completion("", "One.", "r:7"), empty)
    good = PAIRS["plain"]
    for examples in ([one_empty, good], [labelled(empty), labelled(good.texts[0])]):
        documents, report = tokenize(tokenizer, *examples)
        assert len(documents) == 1
        assert report.dropped == {"nothing to train on": 1}
        assert report.examples["nothing to train on"] == ["r:7"]


# too long, by hand ---------------------------------------------------------------------------


def document(prompt: Sequence[int], *answers: Sequence[int]) -> Document:
    """Every token of an answer is trained."""
    branches = [
        Branch(np.array(ids, np.int32), np.ones(len(ids), bool), role)
        for ids, role in zip(answers, (Role.CHOSEN, Role.REJECTED), strict=False)
    ]
    return Document(np.array(prompt, np.int32), tuple(branches), 3, 2.0)


def fitted(
    found: Document, limit: int, too_long: str, bos: int | None = BOS
) -> tuple[Document | None, DataReport]:
    report = DataReport()
    return fit(found, "r:3", limit, too_long, bos, report), report


PAIR = document([BOS, 2, 3, 4, 5], [10, 11, 12, 13], [20, 21])
"""Its longest sequence has 9 tokens."""


@pytest.mark.parametrize("too_long", ["drop", "truncate_left", "truncate_right", "error"])
@pytest.mark.parametrize("limit", [9, 10])
def test_a_pair_of_exactly_max_length_is_kept_whole(too_long: str, limit: int) -> None:
    found, report = fitted(PAIR, limit, too_long)
    assert found is PAIR
    assert report == DataReport(lengths=[9], measured=["r:3"])


def test_drop() -> None:
    found, report = fitted(PAIR, 8, "drop")
    assert found is None
    reason = "longer than max_length = 8 tokens"
    assert report == DataReport(
        lengths=[9], measured=["r:3"], dropped={reason: 1}, examples={reason: ["r:3"]}
    )


def test_error() -> None:
    with pytest.raises(DataError) as caught:
        fitted(PAIR, 8, "error")
    assert str(caught.value) == (
        "r:3: prompt and answer have 9 tokens, more than data.max_length = 8\n"
        "hint: raise data.max_length, shorten the row, or choose another data.too_long"
    )


@pytest.mark.parametrize(
    ("limit", "bos", "prompt"),
    [
        (8, BOS, [BOS, 3, 4, 5]),
        (6, BOS, [BOS, 5]),
        (5, BOS, [BOS]),  # BOS alone predicts the answer's first token
        (8, None, [2, 3, 4, 5]),
        (8, 99, [2, 3, 4, 5]),  # a tokenizer whose BOS the row does not begin with
        (5, None, [5]),
    ],
)
def test_truncate_left_cuts_the_prompt_after_bos(
    limit: int, bos: int | None, prompt: list[int]
) -> None:
    found, report = fitted(PAIR, limit, "truncate_left", bos)
    assert found is not None
    assert shape(found) == (prompt, shape(PAIR)[1])
    assert (found.row, found.margin) == (3, 2.0)
    assert report == DataReport(lengths=[9], measured=["r:3"], cut=["r:3"])


@pytest.mark.parametrize(("limit", "bos"), [(4, BOS), (3, BOS), (4, None), (1, None)])
def test_truncate_left_drops_an_answer_that_fills_the_length(limit: int, bos: int | None) -> None:
    found, report = fitted(PAIR, limit, "truncate_left", bos)
    assert found is None
    assert report.dropped == {f"an answer alone fills max_length = {limit} tokens": 1}
    assert (report.truncated, report.lengths) == (0, [9])


def test_truncate_left_without_a_prompt_has_nothing_to_cut() -> None:
    found, report = fitted(document([], [10, 11, 12], [20]), 2, "truncate_left")
    assert found is None
    assert report.dropped == {"an answer alone fills max_length = 2 tokens": 1}


@pytest.mark.parametrize(
    ("limit", "chosen", "rejected"),
    [
        (8, [10, 11, 12], [20, 21]),  # the shorter answer keeps its end
        (7, [10, 11], [20, 21]),
        (6, [10], [20]),
    ],
)
def test_truncate_right_cuts_the_answers(
    limit: int, chosen: list[int], rejected: list[int]
) -> None:
    found, report = fitted(PAIR, limit, "truncate_right")
    assert found is not None
    prompt, branches = shape(found)
    assert prompt == PAIR.prompt.tolist()
    assert branches == [(chosen, [1] * len(chosen)), (rejected, [1] * len(rejected))]
    assert [branch.role for branch in found.branches] == [Role.CHOSEN, Role.REJECTED]
    assert report == DataReport(lengths=[9], measured=["r:3"], cut=["r:3"], lost=["r:3"])


@pytest.mark.parametrize("limit", [5, 4, 1])
def test_truncate_right_drops_a_prompt_that_fills_the_length(limit: int) -> None:
    found, report = fitted(PAIR, limit, "truncate_right")
    assert found is None
    assert report.dropped == {f"the prompt alone fills max_length = {limit} tokens": 1}
    assert (report.truncated, report.lost_ends) == (0, 0)


def test_truncate_right_drops_a_side_of_which_only_context_is_left() -> None:
    late = Branch(np.array([6, 7, 20], np.int32), np.array([0, 0, 1], bool), Role.REJECTED)
    found = Document(PAIR.prompt, (PAIR.branches[0], late), 3)
    assert fitted(found, 7, "truncate_right")[1].dropped == {
        "the prompt alone fills max_length = 7 tokens": 1
    }
    kept, _ = fitted(found, 8, "truncate_right")
    assert kept is not None
    assert shape(kept)[1] == [([10, 11, 12], [1, 1, 1]), ([6, 7, 20], [0, 0, 1])]


def test_truncate_right_drops_answers_that_it_makes_equal() -> None:
    alike = document([BOS, 2], [10, 11, 12, 13], [10, 11, 20])
    found, report = fitted(alike, 4, "truncate_right")
    assert found is None
    assert report.dropped == {"the two answers are equal up to max_length = 4 tokens": 1}
    assert (report.truncated, report.lost_ends) == (0, 0)
    kept, _ = fitted(alike, 5, "truncate_right")
    assert kept is not None
    assert [ids for ids, _ in shape(kept)[1]] == [[10, 11, 12], [10, 11, 20]]


@pytest.mark.parametrize("too_long", ["truncate_left", "truncate_right"])
def test_labelled_rows_are_cut_like_pairs(too_long: str) -> None:
    one = document([BOS, 2, 3], [10, 11, 12])
    found, report = fitted(one, 5, too_long)
    assert found is not None
    assert shape(found) == (
        ([BOS, 3], [([10, 11, 12], [1, 1, 1])])
        if too_long == "truncate_left"
        else ([BOS, 2, 3], [([10, 11], [1, 1])])
    )
    assert (report.truncated, report.lost_ends) == (1, int(too_long == "truncate_right"))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("too_long", ["truncate_left", "truncate_right"])
def test_nothing_is_longer_than_max_length_and_something_is_trained(
    too_long: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(50):
        size, lengths = int(rng.integers(1, 9)), rng.integers(1, 9, 2)
        whole = document(
            [BOS, *range(2, size + 1)], range(10, 10 + lengths[0]), range(20, 20 + lengths[1])
        )
        limit = int(rng.integers(1, 17))
        found, report = fitted(whole, limit, too_long)
        if found is None:
            assert sum(report.dropped.values()) == 1
            continue
        assert report.truncated == int(size + max(lengths) > limit)
        assert len(found.prompt) > 0
        assert found.prompt[0] == BOS
        for branch in found.branches:
            assert branch.trained.any()
            assert len(found.prompt) + len(branch.ids) <= limit


# too long, with a tokenizer ------------------------------------------------------------------

LONG = "one two three four five six seven eight nine ten."


@pytest.mark.parametrize("too_long", ["drop", "truncate_left", "truncate_right"])
@pytest.mark.parametrize("kind", ["pairs", "labelled"])
def test_counts_of_a_few_rows(kind: str, too_long: str) -> None:
    tokenizer = tiny_tokenizer("gemma")
    sides = chat(LONG, "Count on, please.", place="r:3"), chat(LONG, "No.", place="r:3")
    long = pair(*sides)
    short = pair(chat("Hi?", "No.", place="r:4"), chat("Hi?", "Yes.", place="r:4"))
    examples: list[Any] = [long, short, long]
    if kind == "labelled":
        examples = [labelled(example.texts[0]) for example in examples]
    whole, full = tokenize(tokenizer, *examples)
    limit = full.lengths[0] - 3
    found, report = tokenize(tokenizer, *examples, limit=limit, too_long=too_long)
    assert report.lengths == full.lengths
    assert report.rows == 3
    prompt = whole[0].prompt.tolist()
    if too_long == "drop":
        assert [examples[item.row] for item in found] == [examples[1]]
        assert report.lines() == [
            "1 of 3 rows used",
            f"2 rows dropped: longer than max_length = {limit} tokens (r:3, r:3)",
        ]
    elif too_long == "truncate_left":
        assert found[0].prompt.tolist() == [tokenizer.bos_token_id, *prompt[4:]]
        assert shape(found[0])[1] == shape(whole[0])[1]
        assert report.lines() == [
            "3 of 3 rows used",
            "2 rows truncated; 0 of them lost the end of an answer and do not teach the model to "
            "stop",
        ]
    else:
        assert found[0].prompt.tolist() == prompt
        assert found[0].branches[0].ids.tolist() == whole[0].branches[0].ids[:-3].tolist()
        assert report.lines() == [
            "3 of 3 rows used",
            "2 rows truncated; 2 of them lost the end of an answer and do not teach the model to "
            "stop",
        ]
    assert report.tokens == sum(
        len(item.prompt) + sum(len(branch.ids) for branch in item.branches) for item in found
    )
    assert report.trained_tokens == sum(
        int(branch.trained.sum()) for item in found for branch in item.branches
    )
