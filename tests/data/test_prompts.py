"""Rows of every format -> prompts: what is asked, what is cut, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import TOKENIZERS, tiny_tokenizer
from tokenizers import normalizers, processors

from alignkit.data.formats import KEYS, PARSERS
from alignkit.data.prompts import (
    Prompt,
    PromptSet,
    load_prompts,
)
from alignkit.data.report import DataReport, describe_rows
from alignkit.data.split import count_prompt_overlap, split_prompts
from alignkit.errors import DataError, ModelError
from alignkit.recipe.assets import assets_root
from alignkit.recipe.rows import SourceSpec

FORMATS = assets_root() / "data_templates" / "formats"
PLAIN = "plain text: the model's chat template is not used"
REPEAT = "the same prompt as an earlier row's"


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, rows: list[dict[str, Any]], **fields: Any) -> SourceSpec:
    Path(name).write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return SourceSpec(path=name, **fields)


def load(*specs: SourceSpec, tokenizer: Any = None, **settings: Any) -> PromptSet:
    chosen = {"max_length": 1000, "too_long": "error", "seed": 0, **settings}
    return load_prompts(specs, tokenizer or tiny_tokenizer("chatml"), **chosen)


def failure(*specs: SourceSpec, tokenizer: Any = None, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(*specs, tokenizer=tokenizer, **settings)
    return str(caught.value)


def say(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def speak(speaker: str, value: str) -> dict[str, Any]:
    return {"from": speaker, "value": value}


def texts(*words: str) -> list[dict[str, Any]]:
    return [{"prompt": word} for word in words]


def decoded(prompts: PromptSet) -> list[str]:
    tokenizer = tiny_tokenizer("chatml")
    return [tokenizer.decode(prompt.ids) for prompt in prompts.prompts]


ASK, ANSWER = say("user", "Why?"), say("assistant", "Because.")
SYSTEM = say("system", "Be kind.")
BE = say("assistant", "Be")
HUMAN, GPT = speak("human", "Why?"), speak("gpt", "Because.")
BAD = say("assistant", "No.")
HH = "\n\nHuman: Why?\n\nAssistant: {}"
ASKED = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
WRITTEN_CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "it"}}\n</tool_call>'
SCHEMA = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


# formats -------------------------------------------------------------------------------------

# Every row asks "Why?" of the user; those of the first group know that "Because." is the answer.
CHATS_WITH_ANSWER: dict[str, dict[str, Any]] = {
    "messages": {"messages": [ASK, ANSWER]},
    "sharegpt": {"conversations": [HUMAN, GPT]},
    "sharegpt with roles": {"conversations": [ASK, ANSWER]},
    "alpaca": {"instruction": "Why?", "output": "Because."},
    "prompt_completion": {"prompt": [ASK], "completion": [ANSWER]},
    "pair": {"prompt": [ASK], "chosen": [ANSWER], "rejected": [BAD]},
    "pair of one prompt text": {"prompt": "Why?", "chosen": [ANSWER], "rejected": [BAD]},
    "pair that repeats its prompt": {
        "prompt": "Why?",
        "chosen": [ASK, ANSWER],
        "rejected": [ASK, BAD],
    },
    "implicit pair": {"chosen": [ASK, ANSWER], "rejected": [ASK, BAD]},
    "equal answers": {"chosen": [ASK, ANSWER], "rejected": [ASK, ANSWER]},
    "alpaca pair": {"instruction": "Why?", "chosen": "Because.", "rejected": "No."},
    "sharegpt_preference": {
        "conversations": [HUMAN],
        "chosen": GPT,
        "rejected": speak("gpt", "No."),
    },
    "hh": {"chosen": HH.format("Because."), "rejected": HH.format("No.")},
    "labelled": {"messages": [ASK, ANSWER], "label": True},
    "chosen alone": {"messages": [ASK, ANSWER], "chosen": "nothing", "score": 3},
}
CHATS_WITHOUT: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": [ASK]},
    "prompt with an empty completion": {"prompt": [ASK], "completion": None},
    "messages": {"messages": [ASK]},
    "messages with an empty answer": {"messages": [ASK, say("assistant", " ")]},
    "conversations": {"conversations": [HUMAN]},
    "instruction": {"instruction": "Why?", "input": ""},
    "instruction with an empty output": {"instruction": "Why?", "output": ""},
    "hh that ends with the human": {"chosen": "\n\nHuman: Why?", "rejected": HH.format("No.")},
    "undesirable": {"messages": [ASK, ANSWER], "label": False},
    "undesirable completion": {"prompt": [ASK], "completion": [ANSWER], "label": False},
}


@pytest.mark.parametrize("name", CHATS_WITH_ANSWER)
def test_the_last_answer_is_taken_off(name: str) -> None:
    row = CHATS_WITH_ANSWER[name]
    prompts = load(write("a.jsonl", [row]))
    (prompt,) = prompts.prompts
    assert decoded(prompts) == [ASKED]
    assert prompt.ids.dtype == np.int32
    assert (prompt.shown, prompt.answer) == ([ASK], "Because.")
    assert (prompt.columns, prompt.place) == (row, "a.jsonl:1")
    assert prompts.report.notes == {}


@pytest.mark.parametrize("name", CHATS_WITHOUT)
def test_rows_without_an_answer(name: str) -> None:
    row = CHATS_WITHOUT[name]
    prompts = load(write("a.jsonl", [row]))
    (prompt,) = prompts.prompts
    assert decoded(prompts) == [ASKED]
    assert (prompt.shown, prompt.answer, prompt.columns) == ([ASK], None, row)


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"prompt": "Why?"}, None),
        ({"text": "Why?"}, None),
        ({"prompt": "Why?", "completion": " Because."}, " Because."),
        ({"prompt": "Why?", "completion": " "}, None),
        ({"prompt": "Why?", "completion": " No.", "label": False}, None),
        ({"prompt": "Why?", "chosen": " Because.", "rejected": " No."}, " Because."),
        ({"prompt": "Why?", "chosen": " No.", "rejected": " No."}, " No."),
        ({"prompt": "Why?", "chosen": " Because."}, None),
    ],
)
def test_plain_text_is_read_as_it_is(row: dict[str, Any], answer: str | None) -> None:
    prompts = load(write("a.jsonl", [row]))
    (prompt,) = prompts.prompts
    assert decoded(prompts) == ["Why?"]
    assert (prompt.shown, prompt.answer, prompt.columns) == ("Why?", answer, row)
    assert prompts.report.notes == {PLAIN: 1}


def test_without_a_template_plain_text_is_no_surprise() -> None:
    prompts = load(write("a.jsonl", texts("Why?")), tokenizer=tiny_tokenizer("chatml", None))
    assert prompts.report.notes == {}


@pytest.mark.parametrize("family", TOKENIZERS)
def test_ids_are_those_of_the_rendered_text(family: str) -> None:
    """BOS stands where the family has one: a template writes it, or the tokenizer adds it."""
    tokenizer = tiny_tokenizer(family)
    spec = write("a.jsonl", [{"messages": [ASK]}])
    (chat,) = load(spec, tokenizer=tokenizer).prompts
    rendered = tokenizer.apply_chat_template([ASK], tokenize=False, add_generation_prompt=True)
    assert chat.ids.tolist() == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    (plain,) = load(write("b.jsonl", texts("Why?")), tokenizer=tokenizer).prompts
    assert plain.ids.tolist() == tokenizer("Why?")["input_ids"]
    if family in ("llama3", "mistral", "mistral-sentencepiece", "gemma"):
        for prompt in (chat, plain):
            assert prompt.ids[0] == tokenizer.bos_token_id
            assert prompt.ids.tolist().count(tokenizer.bos_token_id) == 1


def test_a_bos_in_the_text_is_not_doubled() -> None:
    tokenizer = tiny_tokenizer("llama3")
    spec = write("a.jsonl", texts("Why?", "<|begin_of_text|>Why?"))
    first, second = load(spec, tokenizer=tokenizer).prompts
    assert first.ids.tolist() == second.ids.tolist()
    assert second.shown == "<|begin_of_text|>Why?"


def test_an_eos_that_the_tokenizer_adds_would_end_the_prompt() -> None:
    tokenizer = tiny_tokenizer("qwen")
    expected = tokenizer("Why?")["input_ids"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", tokenizer.eos_token_id)]
    )
    assert tokenizer("Why?")["input_ids"] == [*expected, tokenizer.eos_token_id]
    (prompt,) = load(write("a.jsonl", texts("Why?")), tokenizer=tokenizer).prompts
    assert prompt.ids.tolist() == expected


def test_several_turns_and_the_system_text() -> None:
    rows = [
        {"messages": [SYSTEM, ASK, ANSWER, say("user", "Really?"), say("assistant", "Yes.")]},
        {"conversations": [HUMAN, GPT, speak("human", "Really?")], "system": "Be kind."},
        {"instruction": "Really?", "history": [["Why?", "Because."]], "system": "Be kind."},
        {"instruction": "Add.", "input": "1, 2"},
    ]
    prompts = load(
        write("a.jsonl", rows[:1]), write("b.jsonl", rows[1:2]), write("c.jsonl", rows[2:])
    )
    turns = [SYSTEM, ASK, ANSWER, say("user", "Really?")]
    shown = [prompt.shown for prompt in prompts.prompts]
    assert shown == [turns, turns, turns, [say("user", "Add.\n\n1, 2")]]
    assert [prompt.answer for prompt in prompts.prompts] == ["Yes.", None, None, None]
    assert decoded(prompts)[0] == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\nBecause.<|im_end|>\n<|im_start|>user\nReally?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_prompt_may_end_with_the_result_of_a_tool() -> None:
    turns = [ASK, say("assistant", "", tool_calls=[CALL]), say("tool", "42")]
    spec = write("a.jsonl", [{"messages": [*turns, ANSWER], "tools": [SCHEMA]}])
    tokenizer = tiny_tokenizer("qwen")
    (prompt,) = load(spec, tokenizer=tokenizer).prompts
    rendered = tokenizer.apply_chat_template(
        turns, tools=[SCHEMA], tokenize=False, add_generation_prompt=True
    )
    assert '"name": "look"' in rendered.split("<|im_start|>user")[0]  # the schema is offered
    assert prompt.ids.tolist() == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert prompt.shown == [ASK, say("assistant", WRITTEN_CALL), say("tool", "42")]
    assert prompt.answer == "Because."


def test_tools_that_the_template_does_not_know_are_written_out_and_noted() -> None:
    prompts = load(write("a.jsonl", [{"messages": [ASK], "tools": [SCHEMA]}]))
    assert json.dumps(SCHEMA) in decoded(prompts)[0]
    assert prompts.report.notes == {"tool calls written as text: the template has none": 1}
    assert prompts.prompts[0].shown == [ASK]


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"prompt": [ASK, BE]}, None),
        (
            {"prompt": [ASK, say("assistant", "Be")], "completion": [say("assistant", "cause.")]},
            "cause.",
        ),
    ],
)
def test_a_prompt_may_begin_the_answer(row: dict[str, Any], answer: str | None) -> None:
    prompts = load(write("a.jsonl", [row]))
    assert decoded(prompts) == [ASKED + "Be"]
    assert prompts.prompts[0].shown == [ASK, BE]
    assert prompts.prompts[0].answer == answer


def test_an_answer_that_only_calls_a_tool_has_no_text() -> None:
    rows = [{"messages": [ASK, say("assistant", "", tool_calls=[CALL])]}]
    assert load(write("a.jsonl", rows)).prompts[0].answer is None


def test_columns_rename_and_the_others_stay() -> None:
    rows = [{"question": "1 + 1?", "answer": "#### 2"}]
    renamed = load(write("a.jsonl", rows, columns={"prompt": "question"})).prompts[0]
    assert (renamed.shown, renamed.answer) == ("1 + 1?", None)
    assert renamed.columns == {"answer": "#### 2", "prompt": "1 + 1?"}
    both = {"prompt": "question", "completion": "answer"}
    assert load(write("a.jsonl", rows, columns=both)).prompts[0].answer == "#### 2"


def test_a_named_format_goes_before_the_keys() -> None:
    rows = [{"prompt": "Why?", "chosen": "a", "rejected": None, "messages": [ANSWER]}]
    prompts = load(write("a.jsonl", rows, format="prompt_completion"))
    assert (prompts.prompts[0].shown, prompts.prompts[0].answer) == ("Why?", None)


def test_each_source_has_the_format_of_its_first_row() -> None:
    first = write("a.jsonl", [{"prompt": [ASK]}, {"prompt": "Why?"}])
    second = write("b.jsonl", [{"text": "Why?"}])
    prompts = load(first, second)
    assert decoded(prompts) == [ASKED, "Why?", "Why?"]
    assert [prompt.place for prompt in prompts.prompts] == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1"]


# shipped examples ----------------------------------------------------------------------------

SHIPPED: dict[str, dict[str, Any]] = {
    "prompt_only_conversation.jsonl": {},
    "prompt_only_instruction.json": {},
    "prompt_only_messages.jsonl": {},
    "prompt_only_question.jsonl": {"columns": {"prompt": "question"}},
    "prompt_only_sharegpt.jsonl": {},
    "prompt_only_text.jsonl": {},
}


def test_every_shipped_prompt_file_is_tested_here() -> None:
    assert {path.name for path in FORMATS.glob("prompt_only_*")} == set(SHIPPED)
    assert set(KEYS) == set(PARSERS)


@pytest.mark.parametrize("family", TOKENIZERS)
def test_every_shipped_file_holds_prompts(family: str) -> None:
    allowed = {PLAIN, REPEAT, "tool calls written as text: the template has none"}
    for path in sorted(FORMATS.iterdir()):
        spec = SourceSpec(path=str(path), **SHIPPED.get(path.name, {}))
        prompts = load(spec, tokenizer=tiny_tokenizer(family), max_length=100_000)
        assert prompts.report.kept == prompts.report.rows == len(prompts) >= 10
        assert set(prompts.report.notes) <= allowed, path.name
        only = path.name.startswith("prompt_only_") or path.name == "text.jsonl"
        assert all((prompt.answer is None) for prompt in prompts.prompts) == only, path.name
        for prompt in prompts.prompts:
            if not isinstance(prompt.shown, str):
                assert prompt.shown[-1]["role"] in ("user", "tool")


# length --------------------------------------------------------------------------------------

LONG = "the cat and the dog and the bird and the fish"


@pytest.mark.parametrize("too_long", ["drop", "truncate_left", "error"])
def test_a_prompt_of_exactly_max_length_is_whole(too_long: str) -> None:
    spec = write("a.jsonl", texts(LONG))
    (whole,) = load(spec).prompts
    prompts = load(spec, max_length=len(whole.ids), too_long=too_long)
    assert prompts.prompts[0].ids.tolist() == whole.ids.tolist()
    assert (prompts.report.truncated, prompts.report.dropped) == (0, {})


def test_drop() -> None:
    spec = write("a.jsonl", texts("Why?", LONG, "Who?"))
    lengths = [len(prompt.ids) for prompt in load(spec).prompts]
    prompts = load(spec, max_length=lengths[1] - 1, too_long="drop")
    assert [prompt.shown for prompt in prompts.prompts] == ["Why?", "Who?"]
    report = prompts.report
    assert (report.rows, report.kept, report.lengths) == (3, 2, lengths)
    assert report.dropped == {f"longer than max_length = {lengths[1] - 1} tokens": 1}
    assert report.tokens == lengths[0] + lengths[2]
    assert (report.trained_tokens, report.lost_ends) == (0, 0)


@pytest.mark.parametrize("family", ["llama3", "qwen"])
def test_truncate_left_keeps_bos_and_the_end(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    spec = write("a.jsonl", [{"messages": [say("user", LONG)]}, {"messages": [ASK]}])
    long, short = (prompt.ids for prompt in load(spec, tokenizer=tokenizer).prompts)
    limit = len(short)
    assert len(long) > limit + 2
    prompts = load(spec, tokenizer=tokenizer, max_length=limit, too_long="truncate_left")
    expected = [*long[:1], *long[1 - limit :]] if family == "llama3" else long[-limit:]
    assert prompts.prompts[0].ids.tolist() == list(expected)
    assert prompts.prompts[0].ids.dtype == np.int32
    assert prompts.prompts[0].shown == [say("user", LONG)]
    assert prompts.prompts[1].ids.tolist() == short.tolist()
    report = prompts.report
    assert (report.truncated, report.kept, report.tokens) == (1, 2, 2 * limit)
    assert report.lengths == [len(long), limit]


def test_error() -> None:
    spec = write("a.jsonl", texts("Why?", LONG))
    length = len(load(spec).prompts[1].ids)
    assert failure(spec, max_length=length - 1) == (
        f"a.jsonl:2: the prompt has {length} tokens, more than data.max_length = {length - 1}\n"
        "hint: raise data.max_length, shorten the prompt, or choose another data.too_long"
    )


def test_truncate_right_would_cut_off_the_question() -> None:
    assert failure(write("a.jsonl", texts("Why?")), too_long="truncate_right") == (
        "data.too_long: prompts keep their end, where the question stands, got truncate_right\n"
        "hint: truncate_left keeps the end, drop leaves the row out"
    )


def test_the_report_says_nothing_that_is_only_true_of_answers() -> None:
    spec = write("a.jsonl", texts(LONG, "Why?"))
    length = len(load(spec).prompts[1].ids)
    longest = len(load(spec).prompts[0].ids)
    report = load(spec, max_length=length, too_long="truncate_left").report
    assert describe_rows("train", report) == [
        f"train: 2 of 2 rows used, {2 * length} tokens; "
        f"lengths: median {longest}, 90% {longest}, longest {longest}",
        "1 prompts truncated; they lost their beginning",
        f"2 rows: {PLAIN} (a.jsonl:1, a.jsonl:2)",
    ]


# what is counted -----------------------------------------------------------------------------


def test_repeated_prompts_are_counted_over_all_sources() -> None:
    first = write("a.jsonl", [{"messages": [ASK]}, {"messages": [ASK, ANSWER]}])
    second = write("b.jsonl", [{"instruction": "Why?"}, {"instruction": "Who?"}])
    report = load(first, second).report
    assert report.notes == {REPEAT: 2}
    assert report.examples == {REPEAT: ["a.jsonl:2", "b.jsonl:1"]}


@pytest.mark.parametrize(
    ("turn", "note"),
    [
        ("Dear {{ name }}, why?", "placeholder left in the text: {{ name }}"),
        ("Why <|im_end|>?", "the text holds special tokens of this tokenizer"),
    ],
)
def test_doubts(turn: str, note: str) -> None:
    rows = [{"messages": [ASK]}, {"messages": [say("user", turn)]}]
    report = load(write("a.jsonl", rows)).report
    assert report.notes == {note: 1}
    assert report.examples == {note: ["a.jsonl:2"]}


# what is refused -----------------------------------------------------------------------------

NAME = "hint: remove the row, or name the column that asks, as in columns: {prompt: question}"
ENDS = "a prompt ends with the user's or a tool's turn"
ADD = "hint: remove the row, or add what the user asks"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "a", "answer": "b"},
            "a.jsonl:1: no known row format with a prompt has the keys question, answer\n"
            "hint: rows are prompt | messages | conversations | instruction | text, with or "
            "without an answer, or pairs; rename with columns, as in columns: {prompt: question}",
        ),
        ({"prompt": None}, f"a.jsonl:1: the row has no prompt: `prompt` is null\n{NAME}"),
        ({"messages": None}, f"a.jsonl:1: the row has no prompt: `messages` is null\n{NAME}"),
        ({"prompt": " \n"}, f"a.jsonl:1: the row has no prompt: its text is ' \\n'\n{NAME}"),
        (
            {"prompt": "", "chosen": "a", "rejected": "b"},
            f"a.jsonl:1: the row has no prompt: its text is ''\n{NAME}",
        ),
        ({"text": " "}, "a.jsonl:1: text is empty\nhint: remove the row"),
        (
            {"messages": []},
            f"a.jsonl:1: the row has no prompt: no turn stands before the assistant's\n{NAME}",
        ),
        (
            {"chosen": [ANSWER], "rejected": [BAD]},
            f"a.jsonl:1: the row has no prompt: no turn stands before the assistant's\n{NAME}",
        ),
        (
            {"messages": [SYSTEM, say("user", " ")]},
            f"a.jsonl:1: the row has no prompt: the user's turn 1 is ' '\n{NAME}",
        ),
        (
            {"instruction": "", "output": "a"},
            f"a.jsonl:1: the row has no prompt: the user's turn 0 is ''\n{NAME}",
        ),
        ({"messages": [SYSTEM]}, f"a.jsonl:1: {ENDS}, and turn 0 is by 'system'\n{ADD}"),
        (
            {"messages": [ASK, ANSWER, ANSWER]},
            f"a.jsonl:1: {ENDS}, and turn 1 is by 'assistant'\n{ADD}",
        ),
        (
            {"messages": [ASK, say("assistant", ""), ASK]},
            "a.jsonl:1: the row has no answer: the assistant's turn 1 is empty\n"
            "hint: remove the row, or write the answer",
        ),
        (
            {"prompt": "Why?", "chosen": "a", "rejected": None},
            "a.jsonl:1: the row has no rejected answer: `rejected` is null\n"
            "hint: every pair needs both answers; the row's keys are prompt, chosen, rejected",
        ),
        (
            {"prompt": [ASK], "completion": "Because."},
            "a.jsonl:1: `prompt` and `completion` must both be text or both be messages\n"
            'hint: as in {"prompt": [{"role": "user", ...}], "completion": [{"role": ...}]}',
        ),
    ],
)
def test_refused_rows(row: dict[str, Any], message: str) -> None:
    assert failure(write("a.jsonl", [row])) == message


def test_a_later_row_that_lacks_the_prompt() -> None:
    assert failure(write("a.jsonl", [*texts("Why?"), {"question": "Who?"}])) == (
        "a.jsonl:2: the row has no `prompt`\n"
        "hint: its keys are question; rename with columns, as in columns: {prompt: ...}"
    )


def test_a_prompt_that_the_tokenizer_swallows() -> None:
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    assert failure(write("a.jsonl", texts("Why?", "xx")), tokenizer=tokenizer) == (
        "a.jsonl:2: the row has no prompt: the tokenizer makes no token of 'xx'\n"
        "hint: remove the row"
    )


def test_conversations_without_a_template() -> None:
    with pytest.raises(ModelError, match="the model's tokenizer has no chat template"):
        load(write("a.jsonl", [{"messages": [ASK]}]), tokenizer=tiny_tokenizer("chatml", None))


def test_a_template_that_refuses_the_row() -> None:
    refuses = "{{ raise_exception('no') }}"
    found = failure(
        write("a.jsonl", [{"messages": [ASK]}]), tokenizer=tiny_tokenizer("chatml", refuses)
    )
    assert found.startswith(
        "a.jsonl:1: the chat template refuses the conversation: no\nhint: change the"
    )


def test_no_prompt_left() -> None:
    specs = write("a.jsonl", texts(LONG)), write("b.jsonl", texts(LONG))
    assert failure(*specs, max_length=3, too_long="drop") == (
        "a.jsonl, b.jsonl: no prompt is left: 2 rows dropped: longer than max_length = 3 tokens "
        f"(a.jsonl:1, b.jsonl:1); 2 rows: {PLAIN} (a.jsonl:1, b.jsonl:1)\n"
        "hint: raise data.max_length, or choose another data.too_long"
    )


# mixture -------------------------------------------------------------------------------------


def shown(prompts: PromptSet) -> list[Any]:
    return [prompt.shown for prompt in prompts.prompts]


def test_weights_repeat_and_draw_rows_after_dropping() -> None:
    first = write("a.jsonl", texts("a", "b"), weight=2.0)
    second = write("b.jsonl", texts(LONG, "c", "d", "e", "f"), weight=0.5)
    prompts = load(first, second, max_length=4, too_long="drop")
    assert shown(prompts)[:4] == ["a", "b", "a", "b"]
    drawn = shown(prompts)[4:]
    assert len(drawn) == 2  # half of the four rows that are left
    assert set(drawn) < set("cdef")
    assert (prompts.report.rows, prompts.report.kept) == (7, 6)
    assert REPEAT not in prompts.report.notes  # a weight is no repeated row


def test_weights_that_draw_nothing() -> None:
    assert failure(write("a.jsonl", texts("a", "b"), weight=0.2)) == (
        "a.jsonl: the weights draw no row from 2\nhint: raise the weights of the sources"
    )


def test_take() -> None:
    prompts = load(write("a.jsonl", texts("a", "b", "c"), take=2))
    assert shown(prompts) == ["a", "b"]
    assert prompts.report.rows == 2


def test_the_seed_draws_the_rows() -> None:
    spec = write("a.jsonl", texts(*map(str, range(40))), weight=0.5)
    assert shown(load(spec, seed=1)) == shown(load(spec, seed=1))
    assert shown(load(spec, seed=1)) != shown(load(spec, seed=2))


def test_the_fingerprint_changes_with_all_that_changes_prompts() -> None:
    spec = write("a.jsonl", texts("a", "b"))
    same = load(spec).fingerprint
    assert load(spec).fingerprint == same
    assert load(write("other.jsonl", texts("a", "b"))).fingerprint == same  # by content
    changed = [
        load(write("c.jsonl", texts("a", "c"))),
        load(write("a.jsonl", texts("a", "b"), weight=2.0)),
        load(write("a.jsonl", texts("a", "b"), take=1)),
        load(write("a.jsonl", texts("a", "b"), format="prompt_completion")),
        load(write("a.jsonl", texts("a", "b"), columns={"text": "prompt"})),
        load(spec, spec),
        load(spec, seed=1),
        load(spec, max_length=999),
        load(spec, too_long="drop"),
        load(spec, tokenizer=tiny_tokenizer("qwen")),
        load(spec, tokenizer=tiny_tokenizer("chatml", "{{ messages }}")),
    ]
    assert len({same, *(prompts.fingerprint for prompts in changed)}) == len(changed) + 1


# subset, split, overlap ----------------------------------------------------------------------


def numbers(*tokens: int, places: list[str] | None = None) -> PromptSet:
    """A prompt of one token for each number."""
    named = places or [f"r:{n}" for n in range(len(tokens))]
    made = tuple(
        Prompt(np.array([token], np.int32), str(token), None, {}, place)
        for token, place in zip(tokens, named, strict=True)
    )
    report = DataReport(rows=len(made), kept=len(made), tokens=len(made))
    return PromptSet(made, report, "f")


def test_subset_picks_in_order() -> None:
    prompts = numbers(5, 6, 7)
    picked = prompts.subset(np.array([2, 0, 2]))
    assert shown(picked) == ["7", "5", "7"]
    assert len(picked) == 3
    assert (picked.report, picked.fingerprint) == (prompts.report, "f")
    assert shown(prompts.subset([])) == []


@pytest.mark.parametrize("seed", range(5))
def test_equal_prompts_stay_on_one_side(seed: int) -> None:
    prompts = numbers(*(n % 10 for n in range(40)))  # ten different prompts, four rows each
    train, held_out = split_prompts(prompts, 0.3, seed)
    assert (len(train), len(held_out)) == (28, 12)
    assert not set(shown(train)) & set(shown(held_out))
    assert len(set(shown(held_out))) == 3
    assert count_prompt_overlap(train, held_out) == 0
    places = [prompt.place for side in (train, held_out) for prompt in side.prompts]
    assert sorted(places) == sorted(prompt.place for prompt in prompts.prompts)
    assert (train.report.kept, train.report.held_out, held_out.report.kept) == (28, 12, 12)
    assert train.report.tokens + held_out.report.tokens == prompts.report.tokens
    assert held_out.report.tokens == sum(len(prompt.ids) for prompt in held_out.prompts)
    again = split_prompts(prompts, 0.3, seed)
    assert [shown(side) for side in again] == [shown(train), shown(held_out)]


def test_the_seed_draws_what_is_held_out() -> None:
    prompts = numbers(*range(40))
    found = {tuple(shown(split_prompts(prompts, 0.25, seed)[1])) for seed in range(5)}
    assert len(found) == 5


def test_at_least_one_prompt_is_held_out() -> None:
    train, held_out = split_prompts(numbers(1, 2, 3), 0.01, 0)
    assert (len(train), len(held_out)) == (2, 1)


def test_a_weighted_row_is_held_out_once() -> None:
    prompts = load(write("a.jsonl", texts("a", "b", "c", "d"), weight=3.0))
    train, held_out = split_prompts(prompts, 0.5, 0)
    assert (len(train), len(held_out)) == (6, 2)
    assert sorted([*shown(held_out), *shown(train)[:2]]) == ["a", "b", "c", "d"]


def test_nothing_left_to_train_on() -> None:
    with pytest.raises(DataError) as caught:
        split_prompts(numbers(4, 4, 4), 0.1, 0)
    assert str(caught.value) == (
        "data.eval_fraction = 0.1 holds out all of the 1 different prompts\n"
        "hint: use a smaller fraction or more prompts"
    )


def test_overlap_counts_held_out_rows_once() -> None:
    train = numbers(1, 2, 2)
    # Rows r:0, r:1 and r:3 are in the training prompts; r:1 stands there twice by its weight.
    held_out = numbers(1, 2, 2, 3, 1, places=["r:0", "r:1", "r:1", "r:2", "r:3"])
    assert count_prompt_overlap(train, held_out) == 3
    assert count_prompt_overlap(numbers(9), held_out) == 0
