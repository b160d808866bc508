"""KTO's mismatched answers: whose they are, how they are cut, and how rows of both labels mix."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_tokenizer

from alignkit.data.dataset import TokenDataset, load_dataset
from alignkit.data.mismatch import draw_partners, with_mismatched
from alignkit.data.packing import pack_documents, step_items
from alignkit.data.split import split_dataset
from alignkit.data.tokenize import TokenizeSettings
from alignkit.packed import Role
from alignkit.recipe.rows import SourceSpec

ALONE = "no other prompt to take a mismatched answer from"
CUT = "its mismatched answer is cut to max_length"


PLAIN = "plain text: the model's chat template is not used"


def own_notes(dataset: TokenDataset) -> dict[str, int]:
    """What the report says beside the note on plain text, which all of these rows are."""
    notes = dict(dataset.report.notes)
    notes.pop(PLAIN, None)
    return notes


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(rows: list[dict[str, Any]], max_length: int = 100) -> TokenDataset:
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    settings = TokenizeSettings(max_length, "drop", rows="labelled")
    spec = SourceSpec(path="rows.jsonl")
    return load_dataset([spec], tiny_tokenizer("qwen"), settings, 0, Path("cache"))


def labelled(prompt: str, completion: str, label: bool = True) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "label": label}


def numbered(count: int, prompts: int) -> list[dict[str, Any]]:
    """Rows with an answer each of their own, and so many different prompts."""
    return [labelled(f"ask {n % prompts}:", f" say {n}.", n % 3 == 0) for n in range(count)]


def prompts_of(dataset: TokenDataset) -> list[list[int]]:
    return [dataset.document(row).prompt.tolist() for row in range(dataset.num_rows)]


# partners ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("count", "prompts"), [(2, 2), (3, 3), (40, 40), (40, 2), (40, 7), (41, 40)]
)
def test_a_partner_has_another_prompt(count: int, prompts: int, seed: int) -> None:
    dataset = load(numbered(count, prompts))
    assert dataset.num_rows == count
    found = prompts_of(dataset)
    assert len({tuple(prompt) for prompt in found}) == prompts
    partners = draw_partners(dataset, seed)
    assert (partners.shape, partners.dtype) == ((count,), np.int64)
    for row, partner in enumerate(partners.tolist()):
        assert found[row] != found[partner]


def test_one_other_prompt_among_many_equal_ones_is_found() -> None:
    dataset = load([*numbered(30, 1), labelled("other:", " say.")])
    for seed in range(5):
        partners = draw_partners(dataset, seed).tolist()
        assert partners[:30] == [30] * 30  # the only row with another prompt
        assert partners[30] != 30


def test_partners_are_those_of_the_seed() -> None:
    dataset = load(numbered(40, 40))
    assert draw_partners(dataset, 1).tolist() == draw_partners(dataset, 1).tolist()
    drawn = {tuple(draw_partners(dataset, seed).tolist()) for seed in range(10)}
    assert len(drawn) == 10
    # Where all prompts differ, each answer stands under one other prompt: a cycle.
    for partners in drawn:
        assert sorted(partners) == list(range(40))


@pytest.mark.parametrize("count", [2, 3, 20])
def test_where_all_prompts_are_equal_another_row_is_taken_and_counted(count: int) -> None:
    dataset = load(numbered(count, 1))
    found = with_mismatched(dataset, 100, seed=0)
    assert found.partners is not None
    partners = found.partners[:, 0].tolist()
    assert sorted(partners) == list(range(count))
    assert all(row != partner for row, partner in enumerate(partners))
    assert own_notes(found) == {ALONE: count}
    places = [f"rows.jsonl:{n}" for n in range(1, count + 1)][:3]
    assert found.report.examples[ALONE] == places
    word = "rows" if count > 1 else "row"
    assert found.report.lines()[-1] == f"{count} {word}: {ALONE} ({', '.join(places)})"
    assert own_notes(dataset) == {}  # the dataset itself is left alone


def test_a_single_row_is_its_own_partner() -> None:
    found = with_mismatched(load([labelled("ask:", " say.")]), 100, seed=0)
    assert found.partners is not None
    assert found.partners[:, 0].tolist() == [0]
    own, mismatched = found[0].branches
    assert mismatched.ids.tolist() == own.ids.tolist()
    assert own_notes(found) == {ALONE: 1}


# documents -----------------------------------------------------------------------------------


def test_a_document_has_its_own_answer_and_that_of_its_partner() -> None:
    dataset = load(numbered(12, 12))
    found = with_mismatched(dataset, 100, seed=3)
    assert found.partners is not None
    assert own_notes(found) == {}
    for row in range(12):
        before, after = dataset.document(row), found.document(row)
        partner = dataset.document(int(found.partners[row, 0])).branches[0]
        own, mismatched = after.branches
        assert after.prompt.tolist() == before.prompt.tolist()
        assert own.ids.tolist() == before.branches[0].ids.tolist()
        assert (own.role, mismatched.role) == (before.branches[0].role, Role.MISMATCHED)
        assert mismatched.ids.tolist() == partner.ids.tolist()
        assert mismatched.trained.tolist() == partner.trained.tolist()
        assert found.lengths[row] == after.num_tokens == before.num_tokens + len(partner.ids)
    assert found.num_trained.tolist() == dataset.num_trained.tolist()  # carries no loss
    packed = pack_documents([found[0], found[1]])
    roles = [found.roles[0, 0], Role.MISMATCHED, found.roles[1, 0], Role.MISMATCHED]
    assert packed.sequence_roles.tolist() == roles


def test_other_parts_of_the_dataset_stay() -> None:
    dataset = load(numbered(12, 12))
    found = with_mismatched(dataset, 100, seed=3)
    for field in dataclasses.fields(TokenDataset):
        if field.name not in ("partners", "report", "fingerprint"):
            assert getattr(found, field.name) is getattr(dataset, field.name), field.name
    fingerprints = {
        dataset.fingerprint,
        found.fingerprint,
        with_mismatched(dataset, 100, seed=4).fingerprint,
        with_mismatched(dataset, 99, seed=3).fingerprint,
    }
    assert len(fingerprints) == 4
    assert with_mismatched(dataset, 100, seed=3).fingerprint == found.fingerprint


def test_a_mismatched_answer_is_cut_to_max_length_and_counted() -> None:
    # Two rows: each is the other's partner.
    rows = [labelled("a " * 20, " b."), labelled("c", " d" * 20)]
    dataset = load(rows)
    long_prompt, long_answer = len(dataset[0].prompt), len(dataset[1].branches[0].ids)
    limit = max(dataset.lengths)
    assert long_prompt + long_answer > limit
    found = with_mismatched(dataset, int(limit), seed=0)
    cut = found[0].branches[1]
    assert len(cut.ids) == limit - long_prompt
    assert cut.ids.tolist() == dataset[1].branches[0].ids[: limit - long_prompt].tolist()
    assert cut.trained.all()
    whole = found[1].branches[1]
    assert whole.ids.tolist() == dataset[0].branches[0].ids.tolist()
    assert own_notes(found) == {CUT: 1}
    assert found.report.examples[CUT] == {CUT: ["rows.jsonl:1"]}[CUT]
    fits = with_mismatched(dataset, long_prompt + long_answer, seed=0)
    assert own_notes(fits) == {}
    assert fits[0].branches[1].ids.tolist() == dataset[1].branches[0].ids.tolist()


def test_at_least_one_token_is_left_of_a_mismatched_answer() -> None:
    dataset = load([labelled("a " * 20, " b."), labelled("c", " d" * 20)])
    found = with_mismatched(dataset, 5, seed=0)  # shorter than the first prompt
    assert [len(found[item].branches[1].ids) for item in range(2)] == [
        1,
        min(5 - len(dataset[1].prompt), len(dataset[0].branches[0].ids)),
    ]


# order of the labels -------------------------------------------------------------------------


def pairs(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"ask {n}:", "chosen": f" good {n}.", "rejected": f" bad {n}."}
        for n in range(count)
    ]


def labels_in_order(dataset: TokenDataset, batch_size: int, seed: int) -> list[list[bool]]:
    """Whether the rows of each step of one epoch are desirable."""
    steps = -(-len(dataset) // batch_size)
    return [
        [
            dataset[item].branches[0].role is Role.CHOSEN
            for item in step_items(step, len(dataset), batch_size, seed).tolist()
        ]
        for step in range(steps)
    ]


@pytest.mark.parametrize("seed", range(8))
def test_pairs_become_rows_of_mixed_labels(seed: int) -> None:
    dataset = with_mismatched(load(pairs(64)), 100, seed)
    assert len(dataset) == 128
    batches = labels_in_order(dataset, 16, seed)
    assert [len(batch) for batch in batches] == [16] * 8
    assert sum(map(sum, batches)) == 64
    for batch in batches:
        assert 1 <= sum(batch) <= 15, "both labels in every step"
    runs = [len(list(run)) for _, run in itertools.groupby(itertools.chain(*batches))]
    # Fair coins: a run of 17 or more in 128 has a probability below 1e-3.
    assert max(runs) <= 16


@pytest.mark.parametrize("order", ["sorted", "alternating"])
def test_labels_mix_however_the_file_sorts_them(order: str) -> None:
    rows = [labelled(f"ask {n}:", f" say {n}.", n < 64) for n in range(128)]
    if order == "alternating":
        rows = [row for both in zip(rows[:64], rows[64:], strict=True) for row in both]
    dataset = load(rows)
    for seed in range(8):
        batches = labels_in_order(dataset, 16, seed)
        assert all(1 <= sum(batch) <= 15 for batch in batches)
        # The two answers of alternating rows do not follow one another either.
        flat = list(itertools.chain(*batches))
        assert 32 <= sum(a != b for a, b in itertools.pairwise(flat)) <= 96


def test_both_answers_of_a_pair_are_on_one_side_of_a_split() -> None:
    dataset = load(pairs(20))
    for seed in range(5):
        train, held = split_dataset(dataset, 0.25, seed)
        assert (len(train), len(held)) == (30, 10)
        for part in (train, held):
            labels = part.roles[part.order, 0].tolist()
            assert labels.count(Role.CHOSEN) == labels.count(Role.REJECTED)
        places = [{dataset.places[row] for row in part.order} for part in (train, held)]
        assert not places[0] & places[1]
