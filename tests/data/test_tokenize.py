"""Rows -> ids and mask: plain text, borders, truncation, and what is counted on the way."""

from __future__ import annotations

from typing import Any

import pytest
from documents import answers, as_rows
from tiny import TOKENIZERS, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from alignkit.data.documents import Branch
from alignkit.data.formats import Completion, Conversation
from alignkit.data.report import DataReport
from alignkit.data.texts import RENDERED
from alignkit.data.tokenize import UNKNOWN, TokenizeSettings, tokenize_examples
from alignkit.data.turns import Message
from alignkit.errors import DataError, ModelError

ADDS_BOS = {"llama3", "mistral", "mistral-sentencepiece", "gemma"}


def tokenize(
    tokenizer: Any,
    *rows: Any,
    max_length: int = 1000,
    too_long: Any = "error",
    train_on: Any = "completions",
) -> tuple[list[Branch], DataReport]:
    settings = TokenizeSettings(max_length, too_long, train_on)
    documents, report = tokenize_examples(answers(rows), tokenizer, settings)
    return as_rows(documents), report


def text_row(text: str, place: str = "r:1") -> Completion:
    return Completion("", text, place)


def chat(*turns: str, place: str = "r:1") -> Conversation:
    """Turns by user and assistant in alternation."""
    roles = ["user", "assistant"] * len(turns)
    messages = tuple(Message(role, text) for role, text in zip(roles, turns, strict=False))
    return Conversation(messages, (), place)


def trained_text(tokenizer: Any, row: Branch) -> str:
    return str(tokenizer.decode(row.ids[row.trained]))


# plain text ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TOKENIZERS)
def test_text_gets_bos_as_the_tokenizer_adds_it_and_eos_once(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    (row,), report = tokenize(tokenizer, text_row("Once upon a time."))
    body = tokenizer("Once upon a time.", add_special_tokens=False)["input_ids"]
    bos = [tokenizer.bos_token_id] if family in ADDS_BOS else []
    assert row.ids.tolist() == [*bos, *body, tokenizer.eos_token_id]
    # Nothing predicts the first token, whichever it is.
    assert row.trained.tolist() == [False] + [True] * (len(row.ids) - 1)
    assert report.stop_tokens == [tokenizer.eos_token_id]
    assert report.notes == {}


@pytest.mark.parametrize("family", TOKENIZERS)
def test_text_that_brings_its_own_bos_and_eos_is_the_same(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    bos = tokenizer.bos_token if family in ADDS_BOS else ""
    own = f"{bos}Once upon a time.{tokenizer.eos_token}"
    (plain, full), _ = tokenize(tokenizer, text_row("Once upon a time."), text_row(own))
    assert full.ids.tolist() == plain.ids.tolist()
    assert full.trained.tolist() == plain.trained.tolist()


def test_a_bos_that_the_tokenizer_does_not_add_stays_in_the_text() -> None:
    # SmolLM2's BOS is <|im_start|>: rows that are rendered already begin with it.
    tokenizer = tiny_tokenizer("chatml")
    text = "<|im_start|>user\nHi?<|im_end|>"
    (row,), _ = tokenize(tokenizer, text_row(text))
    assert tokenizer.decode(row.ids) == text


def test_a_tokenizer_that_adds_eos_itself_adds_no_second_one() -> None:
    tokenizer = tiny_tokenizer("gemma")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    plain = tiny_tokenizer("gemma")
    assert (plain.bos_token_id, plain.eos_token_id) == (2, 1)
    rows, _ = tokenize(tokenizer, text_row("Hello."), Completion("Hi", " you.", "r:2"))
    expected, _ = tokenize(plain, text_row("Hello."), Completion("Hi", " you.", "r:2"))
    for row, other in zip(rows, expected, strict=True):
        assert row.ids.tolist() == other.ids.tolist()
        assert row.trained.tolist() == other.trained.tolist()


@pytest.mark.parametrize("family", TOKENIZERS)
def test_only_the_completion_is_trained(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    (row,), _ = tokenize(tokenizer, Completion("The colour is", " green.", "r:1"))
    lead = "" if family == "mistral-sentencepiece" else " "  # its decoder drops the first space
    assert trained_text(tokenizer, row) == f"{lead}green.{tokenizer.eos_token}"
    prompt = tokenizer("The colour is")["input_ids"]
    assert row.ids[: len(prompt)].tolist() == prompt
    assert not row.trained[: len(prompt)].any()
    assert row.trained[len(prompt) :].all()


def test_a_completion_in_a_bos_prompt_keeps_its_border() -> None:
    # BOS is cut from the text before it is tokenized: offsets must be those of the whole text.
    tokenizer = tiny_tokenizer("llama3")
    with_bos = Completion("<|begin_of_text|>The colour is", " green.", "r:1")
    rows, _ = tokenize(tokenizer, with_bos, Completion("The colour is", " green.", "r:2"))
    assert rows[0].ids.tolist() == rows[1].ids.tolist()
    assert rows[0].trained.tolist() == rows[1].trained.tolist()


@pytest.mark.parametrize("family", TOKENIZERS)
def test_a_token_across_the_border_belongs_to_the_answer(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    whole = tokenizer("See the", add_special_tokens=False)["input_ids"]
    (row,), _ = tokenize(tokenizer, Completion("See t", "he", "r:1"))
    first = 1 if family in ADDS_BOS else 0
    assert row.ids[first:-1].tolist() == whole  # " the" is one token, across the border
    assert row.trained.tolist() == [False] * (first + len(whole) - 1) + [True, True]


def test_letters_of_several_tokens_are_trained_whole() -> None:
    # "🙂" is four byte tokens, all with the same offsets.
    tokenizer = tiny_tokenizer("chatml")
    (row,), _ = tokenize(tokenizer, Completion("A", "🙂", "r:1"))
    assert row.trained.tolist() == [False, True, True, True, True, True]
    (row,), _ = tokenize(tokenizer, Completion("🙂", "A", "r:1"))
    assert row.trained.tolist() == [False, False, False, False, True, True]


def test_a_token_across_the_generation_prompt_belongs_to_the_answer() -> None:
    template = "{% for m in messages %}{{ m.role }}.{{ m.content }}<|im_end|>{% endfor %}"
    prompt = "{% if add_generation_prompt %}assistant.{% endif %}"
    tokenizer = tiny_tokenizer("gemma", template + prompt)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_end|>"]})
    assert len(tokenizer(".\n", add_special_tokens=False)["input_ids"]) == 1
    (row,), _ = tokenize(tokenizer, chat("Hi?", "\nHello"))
    assert trained_text(tokenizer, row) == ".\nHello<|im_end|>"


# train_on ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TOKENIZERS)
def test_everything_is_every_token_but_the_first(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    rows, report = tokenize(
        tokenizer, chat("Hi?", "Hello.", "And?"), Completion("a", "b", "r:2"), train_on="everything"
    )
    for row in rows:
        assert row.trained.tolist() == [False] + [True] * (len(row.ids) - 1)
    assert report.trained_tokens == report.tokens - 2


def test_last_turn_of_plain_text_is_its_completion() -> None:
    tokenizer = tiny_tokenizer("chatml")
    row = Completion("The colour is", " green.", "r:1")
    (last,), _ = tokenize(tokenizer, row, train_on="last_turn")
    (every,), _ = tokenize(tokenizer, row)
    assert last.trained.tolist() == every.trained.tolist()


def test_the_first_token_is_never_trained() -> None:
    # Without BOS and prompt the answer itself comes first.
    tokenizer = tiny_tokenizer("qwen")
    opening = Conversation((Message("assistant", "Hello."), Message("user", "Hi?")), (), "r:1")
    rows, _ = tokenize(tokenizer, text_row("Hello."), opening)
    assert [bool(row.trained[0]) for row in rows] == [False, False]
    assert rows[0].trained[1:].all()
    assert trained_text(tokenizer, rows[1]) == "Hello.<|im_end|>"


def test_a_row_of_one_token_trains_nothing_and_is_dropped() -> None:
    tokenizer = tiny_tokenizer("qwen")
    rows, report = tokenize(tokenizer, text_row("<|im_end|>", "r:7"), text_row("Hello."))
    assert len(rows) == 1
    assert report.dropped == {"nothing to train on": 1}
    assert report.examples["nothing to train on"] == ["r:7"]


def test_a_last_turn_that_the_row_leaves_out_drops_the_row() -> None:
    messages = (
        *chat("Hi?", "Hello.", "And?").messages,
        Message("assistant", "So.", trained=False),
    )
    tokenizer = tiny_tokenizer("chatml")
    row = Conversation(messages, (), "r:1")
    rows, report = tokenize(tokenizer, row, train_on="last_turn")
    assert rows == []
    assert report.dropped == {"nothing to train on": 1}


# too long ------------------------------------------------------------------------------------

LONG = "one two three four five six seven eight nine ten."


@pytest.fixture
def lengths() -> tuple[int, int]:
    """Tokens of the prompt `LONG` with generation prompt, and of the whole row, in gemma."""
    tokenizer = tiny_tokenizer("gemma")
    (row,), _ = tokenize(tokenizer, chat(LONG, "Count on, please."))
    return int(row.trained.argmax()), len(row.ids)


def fit(limit: int, too_long: str) -> tuple[list[Branch], DataReport, Branch]:
    tokenizer = tiny_tokenizer("gemma")
    rows = [chat(LONG, "Count on, please.", place="r:3"), chat("Hi?", "No.", place="r:4")]
    kept, report = tokenize(tokenizer, *rows, max_length=limit, too_long=too_long)
    (whole, short), _ = tokenize(tokenizer, *rows)
    assert kept[-1].ids.tolist() == short.ids.tolist()
    return kept, report, whole


@pytest.mark.parametrize("too_long", ["drop", "truncate_left", "truncate_right", "error"])
def test_a_row_of_exactly_max_length_is_kept_whole(too_long: str, lengths: tuple[int, int]) -> None:
    kept, report, whole = fit(lengths[1], too_long)
    assert kept[0].ids.tolist() == whole.ids.tolist()
    assert (report.kept, report.truncated, report.dropped) == (2, 0, {})


def test_drop(lengths: tuple[int, int]) -> None:
    limit = lengths[1] - 1
    kept, report, _ = fit(limit, "drop")
    assert len(kept) == 1  # the short one
    reason = f"longer than max_length = {limit} tokens"
    assert report.dropped == {reason: 1}
    assert report.examples == {reason: ["r:3"]}
    assert (report.rows, report.kept, report.truncated) == (2, 1, 0)
    assert report.lengths == [lengths[1], len(kept[0].ids)]
    assert report.tokens == len(kept[0].ids)
    assert report.trained_tokens == int(kept[0].trained.sum())


def test_error(lengths: tuple[int, int]) -> None:
    limit = lengths[1] - 1
    with pytest.raises(DataError) as caught:
        fit(limit, "error")
    assert str(caught.value) == (
        f"r:3: the row has {lengths[1]} tokens, more than data.max_length = {limit}\n"
        "hint: raise data.max_length, shorten the row, or choose another data.too_long"
    )


def test_truncate_right_loses_the_end_and_says_so(lengths: tuple[int, int]) -> None:
    prompt, total = lengths
    limit = total - 3  # cuts the line break, the end of the turn and the full stop
    assert limit > prompt
    kept, report, whole = fit(limit, "truncate_right")
    assert kept[0].ids.tolist() == whole.ids[:limit].tolist()
    assert kept[0].trained.tolist() == whole.trained[:limit].tolist()
    assert (report.truncated, report.lost_ends, report.kept) == (1, 1, 2)
    assert report.lines()[1] == (
        "1 rows truncated; 1 of them lost the end of an answer and do not teach the model to stop"
    )


def test_truncate_right_may_cut_only_what_is_not_trained(lengths: tuple[int, int]) -> None:
    # The last token is the line break after <end_of_turn>.
    _, report, whole = fit(lengths[1] - 1, "truncate_right")
    assert not whole.trained[-1]
    assert (report.truncated, report.lost_ends) == (1, 0)


def test_truncate_right_drops_a_row_whose_prompt_fills_the_length(lengths: tuple[int, int]) -> None:
    kept, report, _ = fit(lengths[0], "truncate_right")
    assert len(kept) == 1  # the short one
    assert report.dropped == {f"the prompt alone fills max_length = {lengths[0]} tokens": 1}
    assert report.truncated == 0


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_truncate_left_keeps_bos_and_the_end(cut: int, lengths: tuple[int, int]) -> None:
    limit = lengths[1] - cut
    kept, report, whole = fit(limit, "truncate_left")
    assert kept[0].ids[0] == tiny_tokenizer("gemma").bos_token_id
    assert kept[0].ids.tolist() == [whole.ids[0], *whole.ids[1 + cut :]]
    assert kept[0].trained.tolist() == [False, *whole.trained[1 + cut :]]
    assert (report.truncated, report.lost_ends, report.kept) == (1, 0, 2)


def test_truncate_left_without_bos_does_not_train_the_new_first_token() -> None:
    tokenizer = tiny_tokenizer("qwen")
    (whole,), _ = tokenize(tokenizer, text_row(LONG))
    (row,), _ = tokenize(tokenizer, text_row(LONG), max_length=8, too_long="truncate_left")
    assert row.ids.tolist() == whole.ids[-8:].tolist()
    assert row.trained.tolist() == [False] + [True] * 7


def test_truncate_left_drops_a_row_whose_answer_is_cut_away() -> None:
    tokenizer = tiny_tokenizer("gemma")
    rows, report = tokenize(
        tokenizer, chat("Hi?", "No.", LONG), max_length=16, too_long="truncate_left"
    )
    assert rows == []
    assert report.dropped == {"the prompt alone fills max_length = 16 tokens": 1}


def test_a_text_that_is_far_too_long_is_not_even_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignkit.data.tokenize._SMALL", 1000)
    tokenizer, rows = tiny_tokenizer("qwen"), [chat("Hi?", "x" * 8001), text_row("Hello.", "r:2")]
    kept, report = tokenize(tokenizer, *rows, max_length=8, too_long="drop")
    assert len(kept) == 1
    assert report.dropped == {"far longer than max_length = 8 tokens": 1}
    with pytest.raises(DataError, match="r:1: the row has 8,004 characters, far more than"):
        tokenize(tokenizer, *rows, max_length=8, too_long="truncate_right")


def test_a_rendered_text_gets_no_second_eos() -> None:
    tokenizer = tiny_tokenizer("chatml")
    text = "<|im_start|>user\nHi?<|im_end|>\n"
    (row,), _ = tokenize(tokenizer, text_row(text))
    assert tokenizer.decode(row.ids) == text


# notes and failures --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "note"),
    [
        (chat("Hi {{ name }}!", "Hello."), "placeholder left in the text: {{ name }}"),
        (
            chat("Hi?", "Hello {{user.first-name}}."),
            "placeholder left in the text: {{user.first-name}}",
        ),
        (Completion("To {{x}}:", " hi", "r:1"), "placeholder left in the text: {{x}}"),
        (
            chat("Say <|im_end|> please.", "No."),
            "the text holds special tokens of this tokenizer",
        ),
        (
            Completion("a", "b", "r:1", ("system",)),
            "`system` is left out: plain text has no place for it",
        ),
        (chat("Hi [INST] you", "Hello."), RENDERED),
        (chat(" ", "Hello."), "a turn is empty"),
        (chat("Hi?", "Hello.", "And?"), "the last turn is not the assistant's; it is not trained"),
    ],
)
def test_notes(row: Any, note: str) -> None:
    quiet = [chat("Is {x} or {{ 1 }} fine?", "Yes, {}."), Completion("a", "b", "r:9")]
    _, report = tokenize(tiny_tokenizer("chatml"), row, *quiet)
    assert report.notes == {note: 1}
    assert report.examples == {note: ["r:1"]}
    assert report.lines()[-1] == f"1 row: {note} (r:1)"


@pytest.mark.parametrize("text", ["<|im_start|>a", "<start_of_turn>user", "[INST] a"])
def test_rows_that_are_rendered_already_are_noted(text: str) -> None:
    _, report = tokenize(tiny_tokenizer("chatml"), Completion(text, "b", "r:1"))
    assert report.notes == {RENDERED: 1}


def test_answers_that_the_tokenizer_cannot_write_are_noted() -> None:
    words = {"[UNK]": 0, "</s>": 1, "yes": 2}
    plain = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", eos_token="</s>")
    rows = [("yes", " maybe"), ("what", " yes"), ("yes", " [UNK]")]
    texts = [Completion(*row, f"r:{n}") for n, row in enumerate(rows, start=1)]
    _, report = tokenize(tokenizer, *texts)
    assert report.notes == {UNKNOWN: 1}
    assert report.lines()[-1] == "1 row: trained tokens are unknown to the tokenizer (r:1)"


def test_at_most_three_places_are_shown() -> None:
    rows = [chat("Hi {{ name }}!", "Hello.", place=f"r:{n}") for n in range(1, 6)]
    _, report = tokenize(tiny_tokenizer("chatml"), *rows)
    assert report.notes == {"placeholder left in the text: {{ name }}": 5}
    assert report.lines()[-1] == (
        "5 rows: placeholder left in the text: {{ name }} (r:1, r:2, r:3)"
    )


def test_a_slow_tokenizer() -> None:
    class Slow:
        is_fast = False
        eos_token = bos_token = None
        eos_token_id = None
        added_tokens_decoder: dict[int, Any] = {}
        all_special_tokens: list[str] = []
        all_special_ids: list[int] = []

    with pytest.raises(ModelError) as caught:
        tokenize(Slow(), text_row("a"))
    assert str(caught.value) == (
        "Slow has no character offsets, which the prompt mask needs\n"
        "hint: save the tokenizer as a fast one (tokenizer.json) and name that folder"
    )


def test_without_eos_the_row_says_that_it_does_not_teach_to_stop() -> None:
    tokenizer = tiny_tokenizer("qwen")
    tokenizer.eos_token = None
    (row,), report = tokenize(tokenizer, text_row("Hello."))
    assert trained_text(tokenizer, row) == "ello."
    assert report.notes == {
        "no stop token after the last answer: it does not teach the model to stop": 1
    }


def test_rows_stay_in_order_across_kinds_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer("llama3")
    kinds = [chat("Hi?", "A"), text_row("B"), Completion("C", "D", "r"), chat("Hi?", "E")]
    rows = [kinds[n % 4] for n in range(11)]
    expected, _ = tokenize(tokenizer, *kinds)
    for batch in (1, 3, 1000):
        monkeypatch.setattr("alignkit.data.tokenize._BATCH", batch)
        found, report = tokenize(tokenizer, *rows)
        assert [row.ids.tolist() for row in found] == [
            expected[n % 4].ids.tolist() for n in range(11)
        ]
        assert [row.trained.tolist() for row in found] == [
            expected[n % 4].trained.tolist() for n in range(11)
        ]
        assert report.tokens == sum(len(row.ids) for row in found)
        assert report.lengths == [len(row.ids) for row in found]


# reports -------------------------------------------------------------------------------------


def test_reports_merge() -> None:
    first, second = DataReport(rows=3, kept=2, tokens=20), DataReport(rows=2, kept=1, tokens=5)
    first.drop("long", "a:1")
    second.drop("long", "b:1")
    second.note("odd", "b:2")
    first.lengths, second.lengths = [9, 11], [5]
    first.stop_tokens, second.stop_tokens = [7], [2, 7]
    first.merge(second)
    assert first == DataReport(
        rows=5,
        kept=3,
        dropped={"long": 2},
        notes={"odd": 1},
        examples={"long": ["a:1", "b:1"], "odd": ["b:2"]},
        lengths=[9, 11, 5],
        tokens=25,
        stop_tokens=[2, 7],
    )


def test_percentiles_are_lengths_that_occur() -> None:
    report = DataReport(lengths=[10, 1, 9, 2, 8, 3, 7, 4, 6, 5])
    # The 90th of 10 sorted values from 0: position 0.9 * 9 = 8.1, rounded up to 9.
    assert report.percentiles() == {"min": 1, "p50": 6, "p90": 10, "p99": 10, "max": 10}
    assert DataReport().percentiles() == {}
    assert report.to_json()["lengths"] == report.percentiles()
