"""Shipped chat templates, and the characters that belong to each turn under any template."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from documents import answers, as_rows
from tiny import END_OF_TURN, TOKENIZERS, chat_template, tiny_tokenizer

from alignkit.data.documents import Branch
from alignkit.data.formats import Conversation, parse_answers
from alignkit.data.sources import load_source
from alignkit.data.spans import RenderedTurns
from alignkit.data.templates import ChatTemplate, template_text
from alignkit.data.texts import NO_BOS
from alignkit.data.tokenize import (
    TokenizeSettings,
    answer_ends,
    probe_template,
    tokenize_examples,
)
from alignkit.data.turns import Message
from alignkit.errors import DataError, ModelError
from alignkit.recipe.assets import assets_root
from alignkit.recipe.rows import SourceSpec

SHIPPED = sorted(path.stem for path in (assets_root() / "data_templates/chat").glob("*.jinja"))


def user(text: str) -> Message:
    return Message("user", text)


def system(text: str) -> Message:
    return Message("system", text)


def answer(text: str, *calls: dict[str, Any], trained: bool = True) -> Message:
    parsed = tuple({"type": "function", "function": call} for call in calls)
    return Message("assistant", text, parsed, trained)


def result(text: str) -> Message:
    return Message("tool", text)


LOOK = {"name": "look", "arguments": {"at": "Zürich", "days": 2}}
WAIT = {"name": "wait", "arguments": {}}
LOOK_JSON = '{"name": "look", "arguments": {"at": "Zürich", "days": 2}}'
WAIT_JSON = '{"name": "wait", "arguments": {}}'
SCHEMA = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}

CONVERSATIONS: dict[str, tuple[Message, ...]] = {
    "single": (user("Hi?"), answer("Hello there.")),
    "multi": (user("Hi?"), answer("Hello."), user("And?"), answer("So."), user("?"), answer("No.")),
    "system": (system("Be kind."), user("Hi?"), answer("Hello."), user("And?"), answer("So.")),
    "ends open": (user("Hi?"), answer("Hello."), user("And?")),
    "same text": (user("Yes"), answer("Yes"), user("Yes"), answer("Yes")),
    "unknown letters": (user("Grüße 🙂?"), answer("ä\n\n\tß 🙂"), user("12345"), answer("67890!")),
    "padded": (user("  Hi?\n"), answer("  Hello.\n\n"), user("\nAnd? "), answer("\nSo. ")),
    "call": (user("Hi?"), answer("", LOOK), result('{"sky": "blue"}'), answer("It is blue.")),
    "text and calls": (
        *(system("Be kind."), user("Hi?"), answer("I look.", LOOK, WAIT)),
        *(result("blue"), result("waited"), answer("Blue."), user("Sure?"), answer("Yes.")),
    ),
}


def conversation(name: str, tools: bool = False) -> Conversation:
    return Conversation(CONVERSATIONS[name], (SCHEMA,) if tools else (), f"{name}:1")


def written(family: str, message: Message) -> str:
    """What a trained turn must decode to: its text as the family writes it, and its end."""
    content = message.content
    if family in ("llama3", "mistral", "mistral-sentencepiece", "gemma"):
        content = content.strip()
    calls = [LOOK_JSON if c["function"] == LOOK else WAIT_JSON for c in message.tool_calls]
    if family.startswith("mistral"):
        # An answer starts with the space that follows [/INST]; sentencepiece decoders drop it.
        lead = " " if content and family == "mistral" else ""
        content = lead + content + (f"[TOOL_CALLS] [{', '.join(calls)}]" if calls else "")
    else:
        tagged = [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
        content = "\n".join([content, *tagged] if content else tagged) if calls else content
    return content + END_OF_TURN[family]


def tokenize(tokenizer: Any, *rows: Conversation, train_on: Any = "completions") -> list[Branch]:
    settings = TokenizeSettings(100_000, "error", train_on)
    return as_rows(tokenize_examples(answers(rows), tokenizer, settings)[0])


def runs(row: Branch) -> list[tuple[int, int]]:
    """Begin and end of each run of trained tokens."""
    found, begin = [], None
    for position, trained in enumerate([*row.trained.tolist(), False]):
        if trained and begin is None:
            begin = position
        elif not trained and begin is not None:
            found.append((begin, position))
            begin = None
    return found


def decoded(tokenizer: Any, row: Branch) -> list[str]:
    return [tokenizer.decode(row.ids[begin:end]) for begin, end in runs(row)]


# shipped templates ---------------------------------------------------------------------------

TALK = (system("S"), user("Q1"), answer("A1"), user("Q2"))
RENDERED = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n"
    "<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|>",
    "mistral": "<s>[INST] S\n\nQ1[/INST] A1</s>[INST] Q2[/INST]",
    "gemma": "<bos><start_of_turn>user\nS\n\nQ1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>"
    "\n<start_of_turn>user\nQ2<end_of_turn>\n",
}
RENDERED["mistral-sentencepiece"] = RENDERED["mistral"]
RENDERED["qwen"] = RENDERED["chatml"]
GENERATION_PROMPT = {
    "chatml": "<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "",
    "mistral-sentencepiece": "",
    "gemma": "<start_of_turn>model\n",
    "qwen": "<|im_start|>assistant\n",
}


def render(tokenizer: Any, messages: tuple[Message, ...], *, prompt: bool = False) -> str:
    row = Conversation(messages, (), "r:1")
    template = ChatTemplate(tokenizer)
    return template.render(template.messages(row), row, generation_prompt=prompt)


@pytest.mark.parametrize("family", TOKENIZERS)
def test_the_published_layout(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    assert render(tokenizer, TALK) == RENDERED[family]
    assert render(tokenizer, TALK, prompt=True) == RENDERED[family] + GENERATION_PROMPT[family]


@pytest.mark.parametrize("name", SHIPPED)
def test_templates_open_with_a_comment_that_leaves_no_text(name: str) -> None:
    source = chat_template(name)
    assert source.startswith("{#-")
    family = name if name in TOKENIZERS else "chatml"
    tokenizer = tiny_tokenizer(family, source)
    assert render(tokenizer, TALK) == RENDERED[family]
    # A comment may speak of tools and markers without the template knowing them.
    template = ChatTemplate(tokenizer)
    assert template.has_markers == (name == "chatml-generation")
    assert template.knows_tools == template.knows_tool_calls == (name in ("mistral", "qwen"))


@pytest.mark.parametrize("family", TOKENIZERS)
def test_developer_is_system(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    messages = (Message("developer", "S"), *TALK[1:])
    assert render(tokenizer, messages) == RENDERED[family]


QWEN_TOOLS = """\
<|im_start|>system
Be kind.

These tools can be called; each line describes one of them:
<tools>
{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
</tools>
To call one, answer with its name and arguments as JSON:
<tool_call>
{"name": "...", "arguments": {...}}
</tool_call><|im_end|>
<|im_start|>user
Hi?<|im_end|>
<|im_start|>assistant
I look.
<tool_call>
{"name": "look", "arguments": {"at": "Zürich", "days": 2}}
</tool_call>
<tool_call>
{"name": "wait", "arguments": {}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
blue
</tool_response>
<tool_response>
waited
</tool_response><|im_end|>
<|im_start|>assistant
Blue.<|im_end|>
<|im_start|>user
Sure?<|im_end|>
<|im_start|>assistant
Yes.<|im_end|>
"""
MISTRAL_TOOLS = (
    '<s>[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "look", "parameters": '
    '{"type": "object"}}}][/AVAILABLE_TOOLS][INST] Be kind.\n\nHi?[/INST] I look.'
    '[TOOL_CALLS] [{"name": "look", "arguments": {"at": "Zürich", "days": 2}}, '
    '{"name": "wait", "arguments": {}}]</s>[TOOL_RESULTS] {"content": "blue"}[/TOOL_RESULTS]'
    '[TOOL_RESULTS] {"content": "waited"}[/TOOL_RESULTS] Blue.</s>[INST] Sure?[/INST] Yes.</s>'
)


@pytest.mark.parametrize(("family", "text"), [("qwen", QWEN_TOOLS), ("mistral", MISTRAL_TOOLS)])
def test_the_layout_of_tools(family: str, text: str) -> None:
    template = ChatTemplate(tiny_tokenizer(family))
    row = conversation("text and calls", tools=True)
    assert template.render(template.messages(row), row) == text
    assert not template.flattens(row)


def test_ids_of_mistral_calls_are_written_where_the_row_has_them() -> None:
    turns = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "tool_calls": [{"id": "abcdefghi", "function": WAIT}]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": '{"a": 1}'},
    ]
    text = tiny_tokenizer("mistral").apply_chat_template(turns, tokenize=False)
    assert text == (
        '<s>[INST] Q[/INST][TOOL_CALLS] [{"name": "wait", "arguments": {}, "id": "abcdefghi"}]</s>'
        '[TOOL_RESULTS] {"content": {"a": 1}, "call_id": "abcdefghi"}[/TOOL_RESULTS]'
    )


def test_neighbours_on_gemmas_user_side_share_a_turn() -> None:
    messages = (user("Q"), answer("C"), result("R1"), result("R2"), user("Q2"), answer("A"))
    assert render(tiny_tokenizer("gemma"), messages) == (
        "<bos><start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\nC<end_of_turn>\n"
        "<start_of_turn>user\nR1\n\nR2\n\nQ2<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"
    )


@pytest.mark.parametrize("family", ["gemma", "mistral"])
@pytest.mark.parametrize(
    ("messages", "rule"),
    [
        ((user("a"), user("b"), answer("c")), "two user turns in a row; join them into one"),
        (
            (user("a"), answer("b"), answer("c")),
            "an assistant turn must follow a user or tool turn, not assistant",
        ),
        ((answer("a"),), "an assistant turn must follow a user or tool turn, not nothing"),
        (
            (system("a"), answer("b")),
            "an assistant turn must follow a user or tool turn, not system",
        ),
        ((user("a"), system("b"), answer("c")), "a system turn must be the first turn"),
        ((user("a"), Message("critic", "b")), "the format has no role critic"),
    ],
)
def test_refused_turns(family: str, messages: tuple[Message, ...], rule: str) -> None:
    with pytest.raises(DataError) as caught:
        tokenize(tiny_tokenizer(family), Conversation(messages, (), "r.jsonl:3"))
    assert str(caught.value) == (
        f"r.jsonl:3: the chat template refuses the conversation: {rule}\n"
        "hint: change the row, or choose another template with model.chat_template"
    )


def test_mistral_refuses_a_result_without_a_call() -> None:
    with pytest.raises(DataError, match="a tool turn must follow the call of an assistant turn"):
        render(tiny_tokenizer("mistral"), (user("a"), result("b"), answer("c")))


@pytest.mark.parametrize(("ours", "theirs"), [("llama3", "llama3"), ("gemma", "gemma3")])
def test_the_layout_is_that_of_upstream(ours: str, theirs: str) -> None:
    found = importlib.util.find_spec("trl")
    path = found and Path(str(found.origin)).parent / "chat_templates" / f"{theirs}.jinja"
    if not path or not path.is_file():
        pytest.skip("TRL, which carries the published templates, is not installed")
    tokenizer = tiny_tokenizer(ours)
    reference = tiny_tokenizer(ours, path.read_text(encoding="utf-8"))
    for name in ("single", "multi", "system", "ends open", "unknown letters", "padded"):
        for prompt in (False, True):
            text = render(tokenizer, CONVERSATIONS[name], prompt=prompt)
            assert text == render(reference, CONVERSATIONS[name], prompt=prompt), name


# spans ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tools", [False, True], ids=["", "tools"])
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("family", TOKENIZERS)
def test_trained_text_is_the_answer_and_its_end(family: str, name: str, tools: bool) -> None:
    tokenizer = tiny_tokenizer(family)
    (row,) = tokenize(tokenizer, conversation(name, tools))
    answers = [m for m in CONVERSATIONS[name] if m.role == "assistant"]
    assert decoded(tokenizer, row) == [written(family, message) for message in answers]
    stop = tokenizer.convert_tokens_to_ids(END_OF_TURN[family])
    assert [int(row.ids[end - 1]) for _, end in runs(row)] == [stop] * len(answers)


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("family", TOKENIZERS)
def test_prompt_ids_are_a_prefix_and_training_starts_right_after(family: str, name: str) -> None:
    """What is generated from at inference is what was read in training, token by token."""
    tokenizer = tiny_tokenizer(family)
    row_in = conversation(name)
    (row,) = tokenize(tokenizer, row_in)
    template = ChatTemplate(tokenizer)
    turns = template.messages(row_in)
    positions = [n for n, turn in enumerate(turns) if turn["role"] == "assistant"]
    for position, (begin, _) in zip(positions, runs(row), strict=True):
        prompt = template.render(turns[:position], row_in, generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert row.ids[:begin].tolist() == ids


@pytest.mark.parametrize("name", ["sft/messages.jsonl", "sft/messages_eval.jsonl", "formats/*"])
@pytest.mark.parametrize("family", TOKENIZERS)
def test_shipped_rows_are_trained_without_a_doubt(family: str, name: str) -> None:
    tokenizer = tiny_tokenizer(family)
    settings = TokenizeSettings(100_000, "error", "completions")
    for path in sorted((assets_root() / "data_templates").glob(name)):
        source = load_source(SourceSpec(path=str(path)))
        if "rejected" in source.rows[0].values or path.name.startswith("prompt_only_"):
            continue
        examples = parse_answers(source.rows, "auto")
        documents, report = tokenize_examples(answers(examples), tokenizer, settings)
        rows = as_rows(documents)
        assert set(report.notes) <= {"tool calls written as text: the template has none"}
        for example, row in zip(examples, rows, strict=True):
            if isinstance(example, Conversation):
                turns = example.messages[example.context :]
                wanted = [m for m in turns if m.role == "assistant" and m.trained]
                found = decoded(tokenizer, row)
                assert len(found) == len(wanted)
                for text, message in zip(found, wanted, strict=True):
                    assert message.content.strip() in text
                    assert text.endswith(END_OF_TURN[family])


@pytest.mark.parametrize("family", TOKENIZERS)
def test_the_stop_token_is_reported(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    settings = TokenizeSettings(1000, "error", "completions")
    _, report = tokenize_examples(answers([conversation("multi")]), tokenizer, settings)
    assert report.stop_tokens == [tokenizer.convert_tokens_to_ids(END_OF_TURN[family])]
    assert report.notes == {}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("family", TOKENIZERS)
def test_last_turn_is_the_last_run_of_completions(family: str, name: str) -> None:
    tokenizer = tiny_tokenizer(family)
    (every,) = tokenize(tokenizer, conversation(name))
    (last,) = tokenize(tokenizer, conversation(name), train_on="last_turn")
    assert last.ids.tolist() == every.ids.tolist()
    assert runs(last) == runs(every)[-1:]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_markers_give_the_mask_of_the_spans(name: str) -> None:
    plain = tiny_tokenizer("chatml")
    marked = tiny_tokenizer("chatml", chat_template("chatml-generation"))
    for train_on in ("completions", "last_turn", "everything"):
        (expected,) = tokenize(plain, conversation(name), train_on=train_on)
        (found,) = tokenize(marked, conversation(name), train_on=train_on)
        assert found.ids.tolist() == expected.ids.tolist()
        assert found.trained.tolist() == expected.trained.tolist()


@pytest.mark.parametrize("template", ["chatml", "chatml-generation"])
def test_a_turn_that_is_not_trained(template: str) -> None:
    tokenizer = tiny_tokenizer("chatml", chat_template(template))
    messages = (user("Hi?"), answer("Skip.", trained=False), user("And?"), answer("Take."))
    (row,) = tokenize(tokenizer, Conversation(messages, (), "r:1"))
    assert decoded(tokenizer, row) == ["Take.<|im_end|>"]


# Markers that close before the end of the turn, as many published training templates have them.
SHORT_MARKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{%+ generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
)


def test_markers_that_close_early_still_train_the_stop_token() -> None:
    tokenizer = tiny_tokenizer("chatml", SHORT_MARKS)
    assert ChatTemplate(tokenizer).has_markers
    (row,) = tokenize(tokenizer, conversation("multi"))
    assert decoded(tokenizer, row) == ["Hello.<|im_end|>", "So.<|im_end|>", "No.<|im_end|>"]


def test_markers_that_do_not_fit_the_turns_cannot_leave_one_out() -> None:
    only_last = SHORT_MARKS.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last")
    tokenizer = tiny_tokenizer("chatml", only_last)
    messages = (user("Hi?"), answer("Skip.", trained=False), user("And?"), answer("Take."))
    with pytest.raises(DataError) as caught:
        tokenize(tokenizer, Conversation(messages, (), "r:1"))
    assert str(caught.value) == (
        "r:1: the template marks 1 runs of generated tokens for 2 assistant turns, so single "
        "turns cannot be left out\n"
        "hint: choose a template without markers (model.chat_template)"
    )


def test_a_refusal_is_one_sentence_with_markers_and_without() -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    for source in (
        SHORT_MARKS,
        SHORT_MARKS.replace(" generation ", " if true ").replace("endgeneration", "endif"),
    ):
        tokenizer = tiny_tokenizer("chatml", refuses + source)
        with pytest.raises(DataError) as caught:
            tokenize(tokenizer, conversation("system"))
        assert str(caught.value).startswith(
            "system:1: the chat template refuses the conversation: no system\nhint: "
        )


# a conversation that the assistant opens ------------------------------------------------------

DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
)
OPENED = (answer("Hello."), user("And?"), answer("So."))


@pytest.mark.parametrize("train_on", ["completions", "last_turn"])
@pytest.mark.parametrize("head", ["", DEFAULT_SYSTEM], ids=["", "default system text"])
@pytest.mark.parametrize("name", ["chatml", "chatml-generation"])
def test_the_header_of_a_first_answer_is_not_trained(name: str, head: str, train_on: str) -> None:
    tokenizer = tiny_tokenizer("chatml", head + chat_template(name))
    wanted = ["Hello.<|im_end|>", "So.<|im_end|>"]
    rows = [Conversation(OPENED, (), "r:1"), Conversation(OPENED[:1], (), "r:2")]
    both, single = tokenize(tokenizer, *rows, train_on=train_on)
    assert decoded(tokenizer, both) == (wanted if train_on == "completions" else wanted[1:])
    assert decoded(tokenizer, single) == wanted[:1]


def test_a_first_answer_where_the_generation_prompt_has_a_thinking_switch() -> None:
    source = chat_template("chatml").replace("assistant\\n' -}}", "assistant\\n<think>\\n' -}}")
    tokenizer = tiny_tokenizer("chatml", source)
    assert ChatTemplate(tokenizer).generation_prompt.endswith("<think>\n")
    (row,) = tokenize(tokenizer, Conversation(OPENED, (), "r:1"))
    assert decoded(tokenizer, row) == ["Hello.<|im_end|>", "So.<|im_end|>"]


# an answer that the prompt begins -------------------------------------------------------------

BEGUN = Message("assistant", '{"answer": 4}', given=len('{"answer":'))


@pytest.mark.parametrize("name", ["chatml", "chatml-generation"])
def test_an_answer_is_trained_from_where_the_prompt_leaves_it(name: str) -> None:
    tokenizer = tiny_tokenizer("chatml", chat_template(name))
    (row,) = tokenize(tokenizer, Conversation((user("JSON?"), BEGUN), (), "r:1", context=1))
    assert decoded(tokenizer, row)[0].removeprefix(":").strip() == "4}<|im_end|>"
    turns = [{"role": "user", "content": "JSON?"}, {"role": "assistant", "content": BEGUN.content}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert tokenizer.decode(row.ids) == text


@pytest.mark.parametrize("family", TOKENIZERS)
def test_a_prompt_ends_where_the_answer_goes_on_as_in_transformers(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    turns = [{"role": "user", "content": "JSON?"}, {"role": "assistant", "content": '{"answer":'}]
    begun = Message("assistant", '{"answer":', given=10)
    row = Conversation((user("JSON?"), begun), (), "r:1")
    expected = tokenizer.apply_chat_template(turns, tokenize=False, continue_final_message=True)
    assert RenderedTurns(ChatTemplate(tokenizer), row).prompt() == expected


def test_a_beginning_that_the_template_changes_is_refused() -> None:
    loud = chat_template("chatml").replace("(message.content or '')", "message.content.upper()")
    tokenizer = tiny_tokenizer("chatml", loud)
    begun = Message("assistant", "it is four", given=5)
    rendered = RenderedTurns(ChatTemplate(tokenizer), Conversation((user("a"), begun), (), "r:1"))
    with pytest.raises(DataError, match="r:1: the chat template changes the beginning"):
        rendered.prompt()


# keys and marks of a turn ---------------------------------------------------------------------

THINKS = chat_template("chatml").replace(
    "(message.content or '')", "(message.reasoning_content or '') + (message.content or '')"
)


def test_further_keys_reach_the_template_or_are_counted() -> None:
    thought = Message("assistant", "408.", more={"reasoning_content": "17 · 24. ", "mood": "good"})
    row = Conversation((user("17 · 24?"), thought), (), "r:1")
    settings = TokenizeSettings(1000, "error")
    for source, left_out in ((THINKS, ["mood"]), ("", ["mood", "reasoning_content"])):
        tokenizer = tiny_tokenizer("chatml", source)
        documents, report = tokenize_examples(answers([row]), tokenizer, settings)
        text = decoded(tokenizer, as_rows(documents)[0])[0]
        assert text == ("17 · 24. " if source else "") + "408.<|im_end|>"
        assert report.notes == {f"the template leaves out `{key}` of a turn": 1 for key in left_out}


def test_ids_of_calls_reach_the_template() -> None:
    calls = ({"type": "function", "function": WAIT, "id": "abcdefghi"},)
    messages = (user("Q"), Message("assistant", "", calls))
    messages += (Message("tool", "3", more={"tool_call_id": "abcdefghi"}), answer("A"))
    row = Conversation(messages, (), "r:1")
    template = ChatTemplate(tiny_tokenizer("mistral"))
    text = template.render(template.messages(row), row)
    assert '"id": "abcdefghi"}]' in text
    assert '"call_id": "abcdefghi"' in text
    settings = TokenizeSettings(1000, "error")
    _, report = tokenize_examples(answers([row]), tiny_tokenizer("chatml"), settings)
    assert {
        "the template leaves out `id` of a turn",
        "the template leaves out `tool_call_id` of a turn",
    } <= report.notes.keys()


@pytest.mark.parametrize("name", ["chatml", "chatml-generation"])
def test_everything_honours_the_marks_of_any_turn(name: str) -> None:
    tokenizer = tiny_tokenizer("chatml", chat_template(name))
    bad = answer("Bad one.", trained=False)
    shy = Message("user", "Shy.", trained=False)
    row = Conversation((user("Hi?"), bad, shy, answer("Good.")), (), "r:1")
    (found,) = tokenize(tokenizer, row, train_on="everything")
    text = "".join(decoded(tokenizer, found))
    assert [part in text for part in ("Bad one", "Shy", "Hi?", "Good.")] == [False] * 2 + [True] * 2


# what is said of a template -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "doubt"),
    [
        (chat_template("chatml"), []),
        (SHORT_MARKS, ["it has no generation prompt: an answer follows the last turn directly"]),
        (
            chat_template("chatml") + "{% if add_generation_prompt %}<think>\n{% endif %}",
            ["its generation prompt opens a think block: '<|im_start|>assistant\\n<think>\\n'"],
        ),
        ("{{ strftime_now('%Y') }}" + chat_template("chatml"), ["it writes the date of the day"]),
    ],
)
def test_doubts(source: str, doubt: list[str]) -> None:
    found = ChatTemplate(tiny_tokenizer("chatml", source)).doubts()
    assert [text.partition(": tomorrow")[0] for text in found] == doubt


@pytest.mark.parametrize("family", TOKENIZERS)
def test_one_rule_for_what_ends_an_answer(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN[family])
    assert answer_ends(tokenizer) == sorted({end, tokenizer.eos_token_id})
    assert answer_ends(tiny_tokenizer(family, None)) == [tokenizer.eos_token_id]
    assert set(answer_ends(tokenizer, [1])) >= {1, end}


def test_a_template_without_bos_is_noted() -> None:
    settings = TokenizeSettings(1000, "error")
    for source, notes in ((chat_template("chatml"), {NO_BOS}), ("", set())):
        tokenizer = tiny_tokenizer("llama3", source)
        _, report = tokenize_examples(answers([conversation("single")]), tokenizer, settings)
        assert report.notes.keys() & {NO_BOS} == notes
        assert probe_template(tokenizer).notes.keys() & {NO_BOS} == notes


# templates that render a turn differently once others follow ----------------------------------

CHATML_TURN = "<|im_start|>{{ m.role }}\n{{ text }}<|im_end|>\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# Qwen3: reasoning of earlier turns is dropped from the history.
DROPS_THINKING = (
    "{% for m in messages %}{% set text = m.content %}"
    "{% if m.role == 'assistant' and not loop.last %}{% set text = m.content.split('</think>')[-1]"
    ".lstrip('\\n') %}{% endif %}" + CHATML_TURN + "{% endfor %}" + PROMPT
)
# Qwen3 without reasoning: the last answer is opened with an empty thinking block.
EMPTY_BLOCK = (
    "{% for m in messages %}{% set text = m.content %}{% for call in m.tool_calls or [] %}"
    "{% set text = text ~ '<tool_call>' ~ (call.function | tojson) %}{% endfor %}"
    "{% if m.tool_calls %}{% set text = '<tool_call>' ~ (m.tool_calls[0].function | tojson) %}"
    "{% endif %}{% if m.role == 'assistant' and loop.last %}"
    "{% set text = '<think>\\n\\n</think>\\n\\n' ~ text %}{% endif %}"
    + CHATML_TURN
    + "{% endfor %}"
    + PROMPT
)
# Phi-3: the whole text is closed with another token.
CLOSES_THE_TEXT = (
    "{% for m in messages %}{% set text = m.content %}" + CHATML_TURN + "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|endoftext|>{% endif %}"
)
# Reasoning models: the generation prompt opens a thinking block that no finished turn repeats.
PROMPT_SAYS_MORE = (
    "{% for m in messages %}{% set text = m.content %}" + CHATML_TURN + "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# gpt-oss: another end-of-turn token after the last answer than after earlier ones.
OTHER_END = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if loop.last and m.role == 'assistant' %}<|endoftext|>{% else %}<|im_end|>{% endif %}"
    "{% endfor %}" + PROMPT
)
# A special token opens the reasoning, which is emptied in earlier turns.
EMPTIES_THINKING = (
    "{% for m in messages %}{% set text = m.content %}{% if m.role == 'assistant' %}"
    "{% if not loop.last %}{% set text = text.split('@')[-1] %}{% endif %}"
    "{% set text = '<|endoftext|>' ~ text %}{% endif %}" + CHATML_TURN + "{% endfor %}" + PROMPT
)


def thought(text: str) -> Message:
    return answer(f"<think>\nhm\n</think>\n\n{text}")


REWRITTEN = (
    "r.jsonl:9: the chat template rewrites turn 1 once later turns follow it, so no mask over that "
    "turn can be right\n"
    "hint: train only the last turn (data.train_on: last_turn), or choose a template that keeps "
    "earlier turns (model.chat_template)"
)


@pytest.mark.parametrize(
    ("source", "messages", "last"),
    [
        (
            DROPS_THINKING,
            (user("Hi?"), thought("A"), user("And?"), thought("B")),
            "<think>\nhm\n</think>\n\nB<|im_end|>",
        ),
        (OTHER_END, (user("Hi?"), answer("A"), user("And?"), answer("B")), "B<|endoftext|>"),
        (
            EMPTIES_THINKING,
            (user("Hi?"), answer("hm@A"), user("And?"), answer("hm@B")),
            "<|endoftext|>hm@B<|im_end|>",
        ),
    ],
    ids=["drops thinking", "other end", "empties thinking"],
)
def test_a_template_that_rewrites_earlier_turns(
    source: str, messages: tuple[Message, ...], last: str
) -> None:
    tokenizer = tiny_tokenizer("chatml", source)
    row = Conversation(messages, (), "r.jsonl:9")
    with pytest.raises(DataError) as caught:
        tokenize(tokenizer, row)
    assert str(caught.value) == REWRITTEN
    (only_last,) = tokenize(tokenizer, row, train_on="last_turn")
    assert decoded(tokenizer, only_last) == [last]
    # The same holds where the row itself leaves the rewritten turn out.
    untrained = (messages[0], answer(messages[1].content, trained=False), *messages[2:])
    (left_out,) = tokenize(tokenizer, Conversation(untrained, (), "r.jsonl:9"))
    assert decoded(tokenizer, left_out) == [last]


BLOCK = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("source", "name", "texts"),
    [
        (EMPTY_BLOCK, "multi", ["Hello.", "So.", f"{BLOCK}No."]),
        (EMPTY_BLOCK, "same text", ["Yes", f"{BLOCK}Yes"]),
        (EMPTY_BLOCK, "call", [f"<tool_call>{LOOK_JSON}", f"{BLOCK}It is blue."]),
        (PROMPT_SAYS_MORE, "multi", ["Hello.", "So.", "No."]),
    ],
)
def test_templates_that_open_turns_in_their_own_way(
    source: str, name: str, texts: list[str]
) -> None:
    tokenizer = tiny_tokenizer("chatml", source)
    (row,) = tokenize(tokenizer, conversation(name))
    assert decoded(tokenizer, row) == [f"{text}<|im_end|>" for text in texts]


def test_a_template_that_closes_the_whole_text() -> None:
    tokenizer = tiny_tokenizer("chatml", CLOSES_THE_TEXT)
    (row,) = tokenize(tokenizer, conversation("multi"))
    last = "No.<|im_end|>\n<|endoftext|>"
    assert decoded(tokenizer, row) == ["Hello.<|im_end|>", "So.<|im_end|>", last]


def test_reasoning_that_the_prompt_opens_is_trained_from_there() -> None:
    tokenizer = tiny_tokenizer("chatml", PROMPT_SAYS_MORE)
    (row,) = tokenize(tokenizer, Conversation((user("Hi?"), thought("A")), (), "r:1"))
    assert decoded(tokenizer, row) == ["hm\n</think>\n\nA<|im_end|>"]


def test_a_template_without_stop_token_gets_eos_and_a_note() -> None:
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer = tiny_tokenizer("qwen", plain)
    settings = TokenizeSettings(1000, "error", "completions")
    documents, report = tokenize_examples(answers([conversation("multi")]), tokenizer, settings)
    (row,) = as_rows(documents)
    assert tokenizer.decode(row.ids) == (
        "user: Hi?\nassistant: Hello.\nuser: And?\nassistant: So.\nuser: ?\nassistant: No.\n"
        "<|im_end|>"
    )
    assert row.ids[-1] == tokenizer.eos_token_id
    assert row.trained[-1]
    assert report.notes == {"the template ends no turn with a stop token; EOS was appended": 1}
    assert report.stop_tokens == [tokenizer.eos_token_id]


def test_without_a_stop_token_nothing_after_an_answer_is_trained() -> None:
    # GLM: a turn ends where the next one begins, with a special token of that turn.
    bare = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}" + PROMPT
    tokenizer = tiny_tokenizer("chatml", bare)
    (row,) = tokenize(tokenizer, conversation("multi"))
    assert decoded(tokenizer, row) == ["Hello.", "So.", "No.<|im_end|>"]
    settings = TokenizeSettings(1000, "error", "completions")
    documents, report = tokenize_examples(answers([conversation("ends open")]), tokenizer, settings)
    (row,) = as_rows(documents)
    assert decoded(tokenizer, row) == ["Hello."]
    assert row.ids[-1] != tokenizer.eos_token_id
    assert report.notes == {
        "no stop token after the last answer: it does not teach the model to stop": 1,
        "the last turn is not the assistant's; it is not trained": 1,
    }


NOTE = "the template leaves out or changes what a turn says"


@pytest.mark.parametrize(
    ("source", "messages", "noted"),
    [
        # Templates of vision models read lists of parts and write nothing for plain text.
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}"
            "{{ p.text }}{% endfor %}<|im_end|>\n{% endfor %}",
            CONVERSATIONS["single"],
            True,
        ),
        # Reasoning dropped from the very answer that is trained.
        (
            DROPS_THINKING.replace(" and not loop.last", ""),
            (user("Hi?"), thought("A")),
            True,
        ),
        # Turns of a role that the template does not know.
        (
            "{% for m in messages if m.role != 'system' %}{% set text = m.content %}"
            + CHATML_TURN
            + "{% endfor %}"
            + PROMPT,
            CONVERSATIONS["system"],
            True,
        ),
        # Calls that the template asks for and does not write.
        (
            "{% for m in messages %}{% set text = m.content or m.tool_calls | length %}"
            + CHATML_TURN
            + "{% endfor %}"
            + PROMPT,
            CONVERSATIONS["call"],
            True,
        ),
        (chat_template("llama3"), CONVERSATIONS["padded"], False),  # trimming is no change
        (chat_template("chatml"), CONVERSATIONS["text and calls"], False),
    ],
    ids=["parts", "thinking", "role", "lost calls", "trimmed", "calls"],
)
def test_what_a_template_leaves_out_is_counted(
    source: str, messages: tuple[Message, ...], noted: bool
) -> None:
    tokenizer = tiny_tokenizer("chatml", source)
    settings = TokenizeSettings(1000, "error", "completions")
    row = Conversation(messages, (), "r.jsonl:4")
    _, report = tokenize_examples(answers([row]), tokenizer, settings)
    assert (NOTE in report.notes) is noted
    assert report.examples.get(NOTE) == (["r.jsonl:4"] if noted else None)


# around the template -------------------------------------------------------------------------


def test_a_tokenizer_without_template() -> None:
    with pytest.raises(ModelError) as caught:
        tokenize(tiny_tokenizer("chatml", None), conversation("single"))
    assert str(caught.value) == (
        "the model's tokenizer has no chat template, and the rows are conversations\n"
        f"hint: set model.chat_template to one of {', '.join(SHIPPED)}"
    )


def test_calls_and_schemas_become_text_where_the_template_has_no_form_for_them() -> None:
    template = ChatTemplate(tiny_tokenizer("chatml"))
    schema = {"type": "function", "function": {"name": "look", "description": "für alle"}}
    offer = (
        'You may call these tools:\n<tools>\n{"type": "function", "function": {"name": "look", '
        '"description": "für alle"}}\n</tools>'
    )
    turns = template.messages(Conversation(CONVERSATIONS["call"], (schema,), "r:1"))
    assert turns == [
        {"role": "system", "content": offer},
        {"role": "user", "content": "Hi?"},
        {"role": "assistant", "content": f"<tool_call>\n{LOOK_JSON}\n</tool_call>"},
        {"role": "tool", "content": '{"sky": "blue"}'},
        {"role": "assistant", "content": "It is blue."},
    ]
    turns = template.messages(Conversation(CONVERSATIONS["text and calls"], (schema,), "r:1"))
    assert turns[0]["content"] == f"Be kind.\n\n{offer}"
    assert turns[2]["content"] == (
        f"I look.\n<tool_call>\n{LOOK_JSON}\n</tool_call>\n<tool_call>\n{WAIT_JSON}\n</tool_call>"
    )


def test_flattened_calls_are_noted() -> None:
    settings = TokenizeSettings(1000, "error", "completions")
    for family, notes in {
        "chatml": {"tool calls written as text: the template has none": 1},
        "qwen": {},
    }.items():
        rows = [conversation("call", tools=True), conversation("single")]
        _, report = tokenize_examples(answers(rows), tiny_tokenizer(family), settings)
        assert report.notes == notes


def test_template_text_is_a_shipped_name_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{{ messages }}\n\n", encoding="utf-8")
    assert template_text(str(path)) == "{{ messages }}"
    assert template_text("gemma") == chat_template("gemma")
