"""Sources -> one dataset: the cache, the mixture, the split, the overlap."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_tokenizer

from alignkit.data import dataset as dataset_module
from alignkit.data import sources as sources_module
from alignkit.data.dataset import (
    TokenDataset,
    load_dataset,
    tokenizer_identity,
)
from alignkit.data.split import count_overlap, split_dataset
from alignkit.data.tokenize import TokenizeSettings
from alignkit.errors import DataError
from alignkit.recipe.rows import SourceSpec

SETTINGS = TokenizeSettings(100, "drop", "completions")


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, rows: list[dict[str, Any]]) -> SourceSpec:
    Path(name).write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return SourceSpec(path=name)


def texts(*words: str) -> list[dict[str, Any]]:
    return [{"text": word} for word in words]


def load(*specs: SourceSpec, tokenizer: Any = None, seed: int = 0, **settings: Any) -> TokenDataset:
    tokenizer = tokenizer or tiny_tokenizer("qwen")
    chosen = dataclasses.replace(SETTINGS, **settings)
    return load_dataset(specs, tokenizer, chosen, seed, Path("cache"))


def decoded(dataset: TokenDataset) -> list[str]:
    tokenizer = tiny_tokenizer("qwen")
    return [
        tokenizer.decode(document.branches[0].ids).removesuffix("<|im_end|>")
        for document in dataset
    ]


def same(first: TokenDataset, second: TokenDataset) -> bool:
    arrays = ("ids", "trained", "bounds", "roles", "margins", "order")
    return all(
        np.array_equal(getattr(first, key), getattr(second, key))
        and getattr(first, key).dtype == getattr(second, key).dtype
        for key in arrays
    ) and (first.places, first.report, first.fingerprint) == (
        second.places,
        second.report,
        second.fingerprint,
    )


def tokenizations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows whenever rows are tokenized rather than read from the cache."""
    calls: list[int] = []
    inner = dataset_module.tokenize_examples

    def counted(examples: Any, *rest: Any) -> Any:
        calls.append(len(examples))
        return inner(examples, *rest)

    monkeypatch.setattr(dataset_module, "tokenize_examples", counted)
    return calls


# items ---------------------------------------------------------------------------------------


def test_items_are_documents_with_one_branch() -> None:
    dataset = load(write("a.jsonl", texts("one", "two words", "three")))
    assert decoded(dataset) == ["one", "two words", "three"]
    assert [document.row for document in dataset] == [0, 1, 2]
    for n, document in enumerate(dataset):
        (branch,) = document.branches
        assert len(document.prompt) == 0
        assert branch.trained.tolist() == [False] + [True] * (len(branch.ids) - 1)
        assert document.num_tokens == len(branch.ids) == dataset.lengths[n]
        assert dataset.num_trained[n] == branch.trained.sum()
    assert dataset.places == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]


def test_dropped_rows_leave_no_trace_but_a_count() -> None:
    dataset = load(write("a.jsonl", texts("one", "long " * 200, "two")))
    assert decoded(dataset) == ["one", "two"]
    assert dataset.places == ["a.jsonl:1", "a.jsonl:3"]
    assert dataset.report.dropped == {"longer than max_length = 100 tokens": 1}


def test_no_row_left() -> None:
    spec = write("a.jsonl", texts("long " * 200))
    with pytest.raises(DataError) as caught:
        load(spec)
    assert str(caught.value) == (
        "a.jsonl: no row is left to train on: 1 rows dropped: longer than max_length = 100 tokens "
        "(a.jsonl:1)\nhint: raise data.max_length, or choose another data.too_long"
    )


def test_no_row_left_for_another_reason() -> None:
    spec = write("a.jsonl", texts("<|im_end|>", "<|im_end|>", "long " * 200))
    with pytest.raises(DataError, match="2 rows dropped: nothing to train on") as caught:
        load(spec)
    assert caught.value.hint == (
        "every row needs an answer to train on: see data.train_on and the marks of turns"
    )
    pair = {"prompt": "a", "chosen": "b", "rejected": "b"}
    with pytest.raises(DataError, match="1 rows dropped: the two answers are equal") as caught:
        load(write("b.jsonl", [pair]), rows="pairs")
    assert caught.value.hint == "correct the rows, or name other columns of the file with columns"


# mixture -------------------------------------------------------------------------------------


def test_weights_repeat_items_of_their_source_after_dropping() -> None:
    first = write("a.jsonl", texts("a", "b"))
    second = write("b.jsonl", texts("long " * 200, "c", "d", "e", "f"))
    dataset = load(
        first.model_copy(update={"weight": 2.0}), second.model_copy(update={"weight": 0.5})
    )
    assert decoded(dataset)[:4] == ["a", "b", "a", "b"]
    drawn = decoded(dataset)[4:]
    assert len(drawn) == 2  # half of the four rows that are left
    assert set(drawn) < set("cdef")
    assert dataset.report.rows == 7
    assert len(dataset) == 6
    assert dataset.num_rows == 6  # every kept row is stored once


def test_the_mixture_is_that_of_the_seed() -> None:
    spec = write("a.jsonl", texts(*map(str, range(40)))).model_copy(update={"weight": 0.5})
    assert same(load(spec, seed=1), load(spec, seed=1))
    other = load(spec, seed=2)
    assert other.order.tolist() != load(spec, seed=1).order.tolist()
    assert other.fingerprint != load(spec, seed=1).fingerprint


def test_weights_that_draw_nothing() -> None:
    spec = write("a.jsonl", texts("a", "b")).model_copy(update={"weight": 0.2})
    with pytest.raises(DataError) as caught:
        load(spec)
    assert str(caught.value) == (
        "a.jsonl: the weights draw no row from 2\nhint: raise the weights of the sources"
    )


# cache ---------------------------------------------------------------------------------------


def test_a_cache_hit_is_identical(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tokenizations(monkeypatch)
    rows = [*texts("one {{ x }}", "long " * 200, "Zwölf"), {"text": "two"}]
    specs = write("a.jsonl", rows), write("b.jsonl", texts("three"))
    fresh = load(*specs)
    assert calls == [4, 1]
    cached = load(*specs)
    assert calls == [4, 1]
    assert same(fresh, cached)
    assert fresh.report.notes
    assert fresh.report.dropped


def test_no_unfinished_file_is_left_behind() -> None:
    load(write("a.jsonl", texts("one")))
    (path,) = Path("cache").rglob("*")
    assert path.name.endswith(".npz")
    assert len(path.stem) == 64


@pytest.mark.parametrize(
    "content",
    [b"", b"rubbish", b"PK\x03\x04 rubbish", None, "other arrays", "other report"],
    ids=["empty", "text", "broken zip", "cut", "other arrays", "other report"],
)
def test_a_broken_cache_is_made_again(
    content: bytes | str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = write("a.jsonl", texts("one", "two"))
    fresh = load(spec)
    (path,) = Path("cache").iterdir()
    whole = path.read_bytes()
    if content == "other arrays":
        np.savez(path, nothing=np.zeros(3))
    elif content == "other report":
        with np.load(path) as stored:
            arrays = dict(stored)
        meta = json.loads(arrays["meta"].tobytes())
        meta["report"]["unknown"] = 1
        arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
        np.savez(path, **arrays)
    else:
        path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    calls = tokenizations(monkeypatch)
    assert same(load(spec), fresh)
    assert calls == [2]
    assert same(load(spec), fresh)
    assert calls == [2]  # and the good one took its place


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop() -> None:
    Path("cache").write_text("a file, not a folder", encoding="utf-8")
    assert decoded(load(write("a.jsonl", texts("one")))) == ["one"]


def test_what_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tokenizations(monkeypatch)
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    spec = write("a.jsonl", rows * 2)
    chatml = tiny_tokenizer("qwen").chat_template

    def fingerprint(changed: SourceSpec = spec, template: str = chatml, **settings: Any) -> str:
        tokenizer = tiny_tokenizer("qwen", template)
        return load(changed, tokenizer=tokenizer, **settings).fingerprint

    found = [
        fingerprint(),
        fingerprint(template=chatml + " "),
        fingerprint(max_length=99),
        fingerprint(too_long="error"),
        fingerprint(train_on="last_turn"),
        fingerprint(spec.model_copy(update={"take": 1})),
        fingerprint(spec.model_copy(update={"format": "messages"})),
        fingerprint(write("b.jsonl", rows * 2)),  # places name the file
        fingerprint(write("a.jsonl", rows * 3)),
    ]
    assert len(set(found)) == len(found) == len(calls)
    write("a.jsonl", rows * 2)
    assert fingerprint() == found[0]
    assert len(calls) == len(found)


def test_what_a_tokenizer_does_is_its_identity(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer("qwen")
    assert tokenizer_identity(tokenizer) == tokenizer_identity(tiny_tokenizer("qwen"))
    others = [tiny_tokenizer("chatml"), tiny_tokenizer("qwen", None), tiny_tokenizer("qwen")]
    others[2].eos_token = "<|endoftext|>"
    grown = tiny_tokenizer("qwen")
    grown.add_special_tokens({"extra_special_tokens": ["<|new|>"]})
    identities = {tokenizer_identity(other) for other in [tokenizer, *others, grown]}
    assert len(identities) == 5


# preferences ---------------------------------------------------------------------------------


def pair_rows(count: int = 3, prompts: int = 3) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"ask {n % prompts}:",
            "chosen": f" good {n}.",
            "rejected": f" {n} bad ones.",
            "margin": n / 4,
        }
        for n in range(count)
    ]


def labelled_rows(count: int = 3, prompts: int = 3) -> list[dict[str, Any]]:
    return [
        {"prompt": f"ask {n % prompts}:", "completion": f" say {n}.", "label": n % 3 > 0}
        for n in range(count)
    ]


PREFERENCES = {
    "pairs": ("pairs", pair_rows, [[0, 1]] * 3, [0.0, 0.25, 0.5]),
    "labelled": ("labelled", labelled_rows, [[1], [0], [0]], [0.0] * 3),
    "pairs as labelled": ("labelled", pair_rows, [[0], [1]] * 3, [0.0] * 6),
}


@pytest.mark.parametrize("case", PREFERENCES)
def test_a_dataset_of_preferences(case: str) -> None:
    kind, make, roles, margins = PREFERENCES[case]
    dataset = load(write("a.jsonl", make()), rows=kind)
    assert dataset.roles.tolist() == roles
    assert dataset.margins.tolist() == margins
    tokenizer = tiny_tokenizer("qwen")
    width = len(roles[0])
    assert dataset.bounds.shape == (len(roles), width + 2)
    assert dataset.bounds[0, 0] == 0
    assert dataset.bounds[1:, 0].tolist() == dataset.bounds[:-1, -1].tolist()
    assert dataset.bounds[-1, -1] == len(dataset.ids) == len(dataset.trained)
    for item, document in enumerate(dataset):
        asked = item // 2 if case == "pairs as labelled" else item
        assert tokenizer.decode(document.prompt) == f"ask {asked}:"
        texts = {
            "pairs": [f" good {asked}.", f" {asked} bad ones."],
            "labelled": [f" say {asked}."],
            "pairs as labelled": [[f" good {asked}."], [f" {asked} bad ones."]][item % 2],
        }[case]
        found = [tokenizer.decode(branch.ids) for branch in document.branches]
        assert found == [f"{text}<|im_end|>" for text in texts]
        assert [int(branch.role) for branch in document.branches] == roles[item]
        assert all(branch.trained.all() for branch in document.branches)
        assert all(np.isnan(branch.reference) for branch in document.branches)
        assert document.margin == margins[item]
        assert dataset.lengths[item] == document.num_tokens
        assert dataset.num_trained[item] == sum(len(branch.ids) for branch in document.branches)


@pytest.mark.parametrize("case", PREFERENCES)
def test_a_cache_hit_of_preferences_is_identical(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, make, _, _ = PREFERENCES[case]
    calls = tokenizations(monkeypatch)
    rows = [*make(), *make(1)]
    if case != "labelled":
        rows += [
            {"prompt": "ask:", "chosen": " same.", "rejected": " same."},
            {"prompt": "ask {{ x }}:", "chosen": " a.", "rejected": " b."},
        ]
    spec, other = write("a.jsonl", rows), write("b.jsonl", make(2))
    fresh = load(spec, other, rows=kind)
    assert len(calls) == 2
    cached = load(spec, other, rows=kind)
    assert len(calls) == 2
    assert same(fresh, cached)
    if case != "labelled":
        assert fresh.report.dropped == {"the two answers are equal": 1}
        assert list(fresh.report.notes) == [
            "placeholder left in the text: {{ x }}",
            "plain text: the model's chat template is not used",
        ]
    for one, two in zip(fresh, cached, strict=True):
        assert one.prompt.tolist() == two.prompt.tolist()
        assert (one.margin, one.row) == (two.margin, two.row)
        for first, second in zip(one.branches, two.branches, strict=True):
            assert first.ids.tolist() == second.ids.tolist()
            assert first.trained.tolist() == second.trained.tolist()
            assert first.role is second.role


@pytest.mark.parametrize(
    "spoil",
    ["cut", "no roles", "no margins", "unknown role", "old bounds", "wide bounds", "short trained"],
)
def test_a_broken_cache_of_pairs_is_made_again(spoil: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write("a.jsonl", pair_rows())
    fresh = load(spec, rows="pairs")
    (path,) = Path("cache").iterdir()
    if spoil == "cut":
        path.write_bytes(path.read_bytes()[:200])
    else:
        with np.load(path) as stored:
            arrays = dict(stored)
        if spoil == "unknown role":
            arrays["roles"] = np.full_like(arrays["roles"], 7)
        elif spoil == "old bounds":  # as releases before this one wrote them
            arrays["offsets"] = arrays.pop("bounds")[:, 0]
        elif spoil == "wide bounds":
            arrays["bounds"] = arrays["bounds"] + 1
        elif spoil == "short trained":
            arrays["trained"] = arrays["trained"][:-1]
        else:
            del arrays[spoil.removeprefix("no ")]
        np.savez(path, **arrays)
    calls = tokenizations(monkeypatch)
    assert same(load(spec, rows="pairs"), fresh)
    assert calls == [3]
    assert same(load(spec, rows="pairs"), fresh)
    assert calls == [3]


def test_a_cache_hit_parses_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write("a.jsonl", texts("one", "two"))
    fresh = load(spec)

    def refuse(*args: object, **options: object) -> Any:
        raise AssertionError("parsed")

    monkeypatch.setattr(sources_module, "read_values", refuse)
    assert same(load(spec), fresh)
    with pytest.raises(AssertionError, match="parsed"):
        load(spec, max_length=99)


def test_a_source_of_pairs_without_a_row_left_joins_the_others() -> None:
    alike = {"prompt": "ask:", "chosen": " same.", "rejected": " same."}
    empty, good = write("a.jsonl", [alike]), write("b.jsonl", pair_rows())
    alone = load(good, rows="pairs")
    for _ in ("fresh", "cached"):
        dataset = load(empty, good, empty, rows="pairs")
        assert dataset.bounds.tolist() == alone.bounds.tolist()
        assert dataset.roles.tolist() == alone.roles.tolist()
        assert dataset.report.dropped == {"the two answers are equal": 2}


def test_the_kind_of_row_is_part_of_the_key() -> None:
    spec = write("a.jsonl", pair_rows())
    pairs, labelled = load(spec, rows="pairs"), load(spec, rows="labelled")
    assert pairs.fingerprint != labelled.fingerprint
    assert len(list(Path("cache").iterdir())) == 2
    assert same(load(spec, rows="pairs"), pairs)
    assert same(load(spec, rows="labelled"), labelled)


def test_sources_of_pairs_mix_by_weight() -> None:
    first = write("a.jsonl", pair_rows(2)).model_copy(update={"weight": 2.0})
    dataset = load(first, write("b.jsonl", pair_rows(1)), rows="pairs")
    assert dataset.places == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1"]
    assert dataset.order.tolist() == [0, 1, 0, 1, 2]
    assert [document.margin for document in dataset] == [0.0, 0.25, 0.0, 0.25, 0.0]


@pytest.mark.parametrize("case", PREFERENCES)
def test_references_belong_to_the_branches(case: str) -> None:
    kind, make, roles, _ = PREFERENCES[case]
    dataset = load(write("a.jsonl", make()), rows=kind)
    values = -np.arange(len(roles) * len(roles[0]), dtype=np.float64).reshape(len(roles), -1)
    scored = dataclasses.replace(dataset, references=values)
    for row in range(len(roles)):
        found = [branch.reference for branch in scored.document(row).branches]
        assert found == values[row].tolist()


# split ---------------------------------------------------------------------------------------


def numbers(count: int) -> list[str]:
    return [f"row {n}" for n in range(count)]


def test_split_is_a_partition_of_the_asked_size() -> None:
    dataset = load(write("a.jsonl", texts(*numbers(40))))
    train, held = split_dataset(dataset, 0.25, seed=0)
    assert (len(train), len(held)) == (30, 10)
    assert sorted(decoded(train) + decoded(held)) == sorted(numbers(40))
    assert held.order.tolist() == sorted(held.order.tolist())
    assert count_overlap(train, held) == 0


def test_the_reports_of_both_parts_add_up() -> None:
    dataset = load(write("a.jsonl", texts(*numbers(40), "x" * 400)), max_length=100)
    whole = dataset.report
    train, held = split_dataset(dataset, 0.25, seed=0)
    assert train.report.lines()[0] == "30 of 41 rows used, 10 held out"
    assert held.report.lines() == ["10 of 10 rows used"]
    assert whole.lines()[0] == "40 of 41 rows used"
    assert train.report.dropped == whole.dropped != {}
    for part in (train, held):
        assert part.report.tokens == part.lengths.sum() > 0
        assert part.report.trained_tokens == part.num_trained.sum() > 0
    assert sorted(held.report.lengths) == sorted(held.lengths)
    assert sorted(train.report.lengths + held.report.lengths) == sorted(whole.lengths)


def test_the_reports_of_pairs_divide_lengths_and_cuts() -> None:
    """Every row's own: prompt and longest answer before it was cut, and whether it was."""
    rows = [
        {"prompt": f"q{'z' * n}", "chosen": "a" * 12, "rejected": "b" * (n + 4)} for n in range(24)
    ]
    spec = write("p.jsonl", rows)
    lengths = load(spec, rows="pairs").report.lengths
    limit = sorted(lengths)[11]
    dataset = load(spec, rows="pairs", max_length=limit, too_long="truncate_right")
    assert dataset.report.lengths == lengths
    for part in split_dataset(dataset, 0.3, seed=0):
        own = [lengths[row] for row in part.order.tolist()]
        assert part.report.lengths == own
        over = sum(length > limit for length in own)
        assert 0 < part.report.truncated == part.report.lost_ends == over < len(own)
        assert f"{over} rows truncated" in part.report.lines()[1]


def test_split_depends_on_the_seed_alone() -> None:
    dataset = load(write("a.jsonl", texts(*numbers(40))))
    first, again = split_dataset(dataset, 0.25, seed=1), split_dataset(dataset, 0.25, seed=1)
    assert decoded(first[1]) == decoded(again[1])
    assert decoded(split_dataset(dataset, 0.25, seed=2)[1]) != decoded(first[1])


@pytest.mark.parametrize("seed", range(5))
def test_equal_rows_and_repeats_stay_on_one_side(seed: int) -> None:
    words = [*numbers(6), *numbers(6), "alone"]  # every row but one stands there twice
    spec = write("a.jsonl", texts(*words)).model_copy(update={"weight": 2.0})
    dataset = load(spec)
    assert len(dataset) == 26
    train, held = split_dataset(dataset, 0.4, seed)
    assert not set(decoded(train)) & set(decoded(held))
    assert count_overlap(train, held) == 0
    # Held-out rows are not repeated by their weight; training rows are.
    assert len(set(held.order.tolist())) == len(held)
    assert len(set(decoded(held))) == round(0.4 * 7)
    assert len(train) == 26 - 2 * len(held)


def test_split_holds_out_at_least_one_row_that_is_used() -> None:
    # A weight of 0.1 draws four of forty rows: the others must not count as held out.
    spec = write("a.jsonl", texts(*numbers(40))).model_copy(update={"weight": 0.1})
    dataset = load(spec)
    for seed in range(10):
        train, held = split_dataset(dataset, 0.01, seed)
        assert (len(train), len(held)) == (3, 1)


def test_split_leaves_something_to_train_on() -> None:
    dataset = load(write("a.jsonl", texts("a", "a")))
    with pytest.raises(DataError) as caught:
        split_dataset(dataset, 0.1, seed=0)
    assert str(caught.value) == (
        "data.eval_fraction = 0.1 holds out all of the 2 rows\n"
        "hint: use a smaller fraction or more rows"
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("case", PREFERENCES)
def test_answers_to_one_prompt_stay_on_one_side(case: str, seed: int) -> None:
    kind, make, _, _ = PREFERENCES[case]
    spec = write("a.jsonl", make(24, 8)).model_copy(update={"weight": 2.0})
    dataset = load(spec, rows=kind)
    train, held = split_dataset(dataset, 0.25, seed)
    asked = [{document.prompt.tobytes() for document in part} for part in (train, held)]
    assert (len(asked[0]), len(asked[1])) == (6, 2)  # a quarter of the eight prompts
    assert not asked[0] & asked[1]
    per_prompt = 6 if case == "pairs as labelled" else 3
    assert (len(train), len(held)) == (2 * 6 * per_prompt, 2 * per_prompt)
    assert count_overlap(train, held) == 0


@pytest.mark.parametrize("family", ["llama3", "qwen"])
def test_rows_without_a_prompt_are_split_one_by_one(family: str) -> None:
    # Llama 3 begins each of them with BOS, which is no prompt that they have in common.
    rows = [{"text": f"row {n}", "label": n % 2 == 0} for n in range(20)]
    tokenizer = tiny_tokenizer(family)
    dataset = load(write("a.jsonl", rows), tokenizer=tokenizer, rows="labelled")
    assert {len(document.prompt) for document in dataset} == {1}
    train, held = split_dataset(dataset, 0.25, seed=0)
    assert (len(train), len(held)) == (15, 5)


def test_split_of_one_prompt_leaves_something_to_train_on() -> None:
    dataset = load(write("a.jsonl", pair_rows(6, 1)), rows="pairs")
    with pytest.raises(DataError, match="holds out all of the 6 rows"):
        split_dataset(dataset, 0.1, seed=0)


# overlap -------------------------------------------------------------------------------------


def test_overlap_of_pairs_counts_whole_rows() -> None:
    rows = pair_rows(4, 2)
    train = load(write("a.jsonl", rows[:2]), rows="pairs")
    held = load(write("b.jsonl", rows[1:]), rows="pairs")
    assert count_overlap(train, held) == 1  # the others only share their prompts


def test_overlap_counts_held_out_rows_that_are_trained_on() -> None:
    train = load(write("a.jsonl", texts("a", "b", "b", "c")))
    held = load(write("b.jsonl", texts("b", "x", "c", "c")))
    assert count_overlap(train, held) == 3  # b, c and c
    assert count_overlap(held, train) == 3  # b, b and c
    assert count_overlap(train.subset(np.array([0])), held) == 0


def test_subset_picks_items_not_rows() -> None:
    spec = write("a.jsonl", texts("a", "b")).model_copy(update={"weight": 2.0})
    dataset = load(spec)
    assert decoded(dataset.subset(np.array([3, 0]))) == ["b", "a"]
