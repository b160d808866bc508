"""Rows of every format -> examples, and every row that is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignkit.data.formats import (
    PARSERS,
    Completion,
    Conversation,
    detect_format,
    parse_answers,
)
from alignkit.data.sources import Row, load_source
from alignkit.data.turns import MARKS, Message
from alignkit.errors import DataError
from alignkit.recipe.assets import assets_root
from alignkit.recipe.rows import SourceSpec

FORMATS = assets_root() / "data_templates" / "formats"


def parse(values: dict[str, Any], row_format: str = "auto") -> Any:
    (example,) = parse_answers([Row(values, "r.jsonl:5")], row_format)
    return example


def failure(values: dict[str, Any], row_format: str = "auto") -> str:
    with pytest.raises(DataError) as caught:
        parse(values, row_format)
    return str(caught.value)


def rename(key: str) -> str:
    return f"\nhint: change the value, or name another column, as in columns: {{{key}: ...}}"


QUOTES = "\nhint: write keys and texts in double quotes, and true, false and null in lower case"


def say(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ASK, ANSWER = say("user", "Why?"), say("assistant", "Because.")
TURNS = (Message("user", "Why?"), Message("assistant", "Because."))
CALL = {"name": "look", "arguments": {"at": "it"}}
PARSED_CALL = {"type": "function", "function": CALL}
SCHEMA = {"name": "look", "parameters": {"type": "object", "properties": {}}}


# shipped examples ----------------------------------------------------------------------------

SHIPPED = {
    "alpaca.json": "alpaca",
    "messages.jsonl": "messages",
    "prompt_completion.jsonl": "prompt_completion",
    "prompt_completion_messages.jsonl": "prompt_completion",
    "sharegpt.jsonl": "sharegpt",
    "text.jsonl": "text",
    "tools.jsonl": "messages",
}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_example_is_detected_and_parses(name: str) -> None:
    row_format = SHIPPED[name]
    rows = load_source(SourceSpec(path=str(FORMATS / name))).rows
    assert {detect_format(row) for row in rows} == {row_format}
    examples = parse_answers(rows, "auto")
    assert len(examples) == len(rows) >= 10
    assert examples == parse_answers(rows, row_format)
    assert [example.place for example in examples] == [row.place for row in rows]


def test_every_format_has_a_shipped_example() -> None:
    assert set(SHIPPED.values()) == set(PARSERS)


def test_shipped_tools_keep_calls_results_and_schemas() -> None:
    (first, *_) = parse_answers(
        load_source(SourceSpec(path=str(FORMATS / "tools.jsonl"))).rows, "messages"
    )
    assert isinstance(first, Conversation)
    assert [message.role for message in first.messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    (call,) = first.messages[1].tool_calls
    assert call["function"]["name"] == first.tools[0]["function"]["name"] == "get_weather"
    assert call["function"]["arguments"] == {"city": "Bergen", "unit": "celsius"}


# what rows become ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "example"),
    [
        ({"messages": [ASK, ANSWER]}, Conversation(TURNS, (), "r.jsonl:5")),
        ({"messages": json.dumps([ASK, ANSWER])}, Conversation(TURNS, (), "r.jsonl:5")),
        (
            {"messages": [say("developer", "Be kind."), ASK, ANSWER]},
            Conversation((Message("developer", "Be kind."), *TURNS), (), "r.jsonl:5"),
        ),
        (
            {"messages": [ASK, ANSWER], "system": "Be kind."},
            Conversation((Message("system", "Be kind."), *TURNS), (), "r.jsonl:5"),
        ),
        (
            {"messages": [say("system", "Be kind."), ASK, ANSWER], "system": "Be kind."},
            Conversation((Message("system", "Be kind."), *TURNS), (), "r.jsonl:5"),
        ),
        (
            {"messages": [ASK, ANSWER], "system": "", "tools": " "},
            Conversation(TURNS, (), "r.jsonl:5"),
        ),
        (
            {"messages": [ASK, ANSWER], "system": None, "tools": None},
            Conversation(TURNS, (), "r.jsonl:5"),
        ),
        (
            {"messages": [ASK, ANSWER], "tools": [SCHEMA]},
            Conversation(TURNS, ({"type": "function", "function": SCHEMA},), "r.jsonl:5"),
        ),
        (
            {"messages": [ASK, ANSWER], "tools": json.dumps([{"function": SCHEMA}])},
            Conversation(TURNS, ({"function": SCHEMA},), "r.jsonl:5"),
        ),
        (
            {
                "conversations": [
                    {"from": "Human", "value": "Why?"},
                    {"from": "gpt", "value": "Because."},
                ]
            },
            Conversation(TURNS, (), "r.jsonl:5"),
        ),
        ({"conversations": [ASK, ANSWER]}, Conversation(TURNS, (), "r.jsonl:5")),
        (
            {"instruction": "Why?", "input": "", "output": "Because."},
            Conversation(TURNS, (), "r.jsonl:5"),
        ),
        (
            {"instruction": "Why?", "output": "Because.", "input": None, "history": None},
            Conversation(TURNS, (), "r.jsonl:5"),
        ),
        (
            {
                "instruction": "Add",
                "input": "1, 2",
                "output": "3",
                "system": "Sum.",
                "history": [["Why?", "Because."]],
            },
            Conversation(
                (
                    Message("system", "Sum."),
                    *TURNS,
                    Message("user", "Add\n\n1, 2"),
                    Message("assistant", "3"),
                ),
                (),
                "r.jsonl:5",
            ),
        ),
        ({"prompt": "1+1=", "completion": "2"}, Completion("1+1=", "2", "r.jsonl:5")),
        ({"text": "Once."}, Completion("", "Once.", "r.jsonl:5")),
        (
            # The prompt's own answers are context.
            {"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER]},
            Conversation((*TURNS, *TURNS), (), "r.jsonl:5", context=3),
        ),
    ],
)
def test_rows_become_examples(values: dict[str, Any], example: Any) -> None:
    assert parse(values) == example


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("plain", "plain"),
        ([{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}], "in parts"),
        (["in ", "parts"], "in parts"),
    ],
)
def test_content_in_parts(content: Any, text: str) -> None:
    assert parse({"messages": [say("user", content), ANSWER]}).messages[0].content == text


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"type": "function", "function": CALL},
        {"id": "x", "function": {"name": "look", "arguments": '{"at": "it"}'}},
    ],
)
def test_calls_in_any_form(call: dict[str, Any]) -> None:
    example = parse({"messages": [ASK, say("assistant", None, tool_calls=[call])]})
    ids = {"id": call["id"]} if "id" in call else {}
    assert example.messages[1] == Message("assistant", "", (PARSED_CALL | ids,))


def test_sharegpt_calls_and_results() -> None:
    turns = [
        {"from": "human", "value": "Why?"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "nothing"},
        {"from": "gpt", "value": "Because."},
    ]
    example = parse({"conversations": turns, "tools": json.dumps([SCHEMA])})
    assert example.messages == (
        TURNS[0],
        Message("assistant", "", (PARSED_CALL,)),
        Message("tool", "nothing"),
        TURNS[1],
    )


@pytest.mark.parametrize(
    ("weight", "trained"), [(0, False), (1, True), (0.0, False), (False, False), (None, True)]
)
def test_weight_says_whether_a_turn_is_trained(weight: Any, trained: bool) -> None:
    # Columnar files fill a key that other turns have with null: that is no weight of 0.
    turns = [ASK, say("assistant", "First.", weight=weight), ASK, ANSWER]
    assert parse({"messages": turns}).messages[1].trained is trained


def test_the_format_is_that_of_the_first_row() -> None:
    rows = [Row({"text": "a"}, "r:1"), Row({"messages": [ASK, ANSWER]}, "r:2")]
    with pytest.raises(DataError, match="r:2: the row has no `text`"):
        parse_answers(rows, "auto")


@pytest.mark.parametrize(
    ("keys", "row_format"),
    [
        (("messages", "prompt", "completion"), "messages"),
        (("text", "messages"), "messages"),
        (("conversations", "text"), "sharegpt"),
        (("prompt", "completion", "text"), "prompt_completion"),
        (("instruction", "output", "text"), "alpaca"),
        (("text", "label"), "text"),
    ],
)
def test_detection_order(keys: tuple[str, ...], row_format: str) -> None:
    assert detect_format(Row(dict.fromkeys(keys, ""), "r:1")) == row_format


@pytest.mark.parametrize("key", MARKS)
@pytest.mark.parametrize("form", ["messages", "sharegpt"])
def test_marks_of_any_format(form: str, key: str) -> None:
    def turns(mark: Any) -> dict[str, Any]:
        if form == "messages":
            return {"messages": [ASK, say("assistant", "First.", **{key: mark}), ASK, ANSWER]}
        says = [("human", "Why?"), ("gpt", "First."), ("human", "Why?"), ("gpt", "Because.")]
        found = [{"from": speaker, "value": value} for speaker, value in says]
        return {"conversations": [found[0], found[1] | {key: mark}, *found[2:]]}

    for mark, trained in [(0, False), (False, False), (1, True), (True, True), (None, True)]:
        assert [m.trained for m in parse(turns(mark)).messages] == [True, trained, True, True]
    assert f"[1].{key} is 'no'\nhint: 1 or true" in failure(turns("no"))


def test_further_keys_of_a_turn_are_kept_without_nulls() -> None:
    thought = say("assistant", "408.", reasoning_content="17 · 24", name=None, weight=1)
    result = say("tool", "3", tool_call_id="a1", name="look")
    messages = parse({"messages": [ASK, thought, result]}).messages
    assert [m.more for m in messages] == [
        {},
        {"reasoning_content": "17 · 24"},
        {"tool_call_id": "a1", "name": "look"},
    ]
    shared = {"from": "gpt", "value": "408.", "thinking": "17 · 24"}
    (_, answer) = parse({"conversations": [{"from": "human", "value": "?"}, shared]}).messages
    assert answer.more == {"thinking": "17 · 24"}


def test_nulls_that_a_table_fills_in_are_absent() -> None:
    call = {"id": None, "function": {"name": "look", "arguments": {"at": "it", "x": None}}}
    schema = {"name": "look", "parameters": {"properties": {"at": {}, "x": None}}}
    values = {"messages": [ASK, say("assistant", None, tool_calls=[call])], "tools": [schema]}
    (filled,) = parse_answers([Row(values, "r:1", filled=True)], "auto")
    assert isinstance(filled, Conversation)
    assert filled.messages[1].tool_calls == (PARSED_CALL,)
    assert filled.tools[0]["function"]["parameters"] == {"properties": {"at": {}}}
    (written,) = parse_answers([Row(values, "r:1")], "auto")  # here the user wrote the null
    assert isinstance(written, Conversation)
    assert written.messages[1].tool_calls[0]["function"]["arguments"] == {"at": "it", "x": None}


def test_rows_of_several_formats_in_one_table() -> None:
    chat = {"messages": [ASK, ANSWER], "prompt": None, "completion": None}
    text = {"messages": None, "prompt": "1+1=", "completion": "2", "chosen": None, "rejected": None}
    for rows in ([chat, text], [text, chat]):
        found = parse_answers([Row(values, "r:1") for values in rows], "auto")
        assert {type(example) for example in found} == {Conversation, Completion}


def test_an_answer_that_the_prompt_begins_is_one_turn() -> None:
    begun = say("assistant", '{"answer":')
    row = {"prompt": [ASK, begun], "completion": [say("assistant", " 4}"), ASK, ANSWER]}
    found = parse(row)
    assert found.context == 1
    assert found.messages == (
        TURNS[0],
        Message("assistant", '{"answer": 4}', given=len('{"answer":')),
        *TURNS,
    )
    assert "ends it, and each has another `name`" in failure(
        {"prompt": [ASK, begun | {"name": "a"}], "completion": [ANSWER | {"name": "b"}]}
    )


def test_a_history_that_the_assistant_opens() -> None:
    row = {"instruction": "Why?", "output": "Because.", "history": [[None, "I begin."]]}
    assert parse(row).messages == (Message("assistant", "I begin."), *TURNS)


# what is refused -----------------------------------------------------------------------------


def test_unknown_keys() -> None:
    assert failure({"question": "a", "answer": "b"}) == (
        "r.jsonl:5: no known row format has the keys question, answer\n"
        "hint: rows are messages | conversations | instruction, output | prompt, completion | "
        "text; rename with columns, as in columns: {prompt: question, completion: answer}"
    )


def test_pairs_belong_to_another_stage() -> None:
    assert failure({"prompt": "a", "chosen": "b", "rejected": "c"}) == (
        "r.jsonl:5: the row is a preference pair (chosen, rejected), and supervised fine-tuning "
        "trains on single answers\n"
        "hint: keep the better answer as `completion`, or train a preference stage on the pairs"
    )


NO_ANSWER = (
    "r.jsonl:5: the row has no answer: no assistant turn to train on\n"
    "hint: remove the row, or add the assistant's turn"
)


@pytest.mark.parametrize(
    ("row_format", "values", "message"),
    [
        (
            "messages",
            {"message": []},
            "r.jsonl:5: the row has no `messages`\n"
            "hint: its keys are message; rename with columns, as in columns: {messages: ...}",
        ),
        (
            "messages",
            {"messages": 3},
            f"r.jsonl:5: `messages` must be a list, got int{rename('messages')}",
        ),
        (
            "messages",
            {"messages": "[{"},
            "r.jsonl:5: `messages` is not valid JSON: Expecting property name enclosed in double "
            f"quotes at column 3{QUOTES}",
        ),
        ("messages", {"messages": []}, NO_ANSWER),
        ("messages", {"messages": [ASK]}, NO_ANSWER),
        ("messages", {"messages": [ASK, say("assistant", "no", weight=0)]}, NO_ANSWER),
        (
            "messages",
            {"messages": [ASK, say("assistant", " \n")]},
            "r.jsonl:5: the row has no answer: the assistant's turn 1 is empty\n"
            "hint: remove the row, or write the answer",
        ),
        (
            "messages",
            {"messages": [ASK, {"content": "x"}]},
            "r.jsonl:5: messages[1] has no `role`\n"
            'hint: as in {"role": "user", "content": "Hello"}',
        ),
        (
            "messages",
            {"messages": [say("bot", "x")]},
            "r.jsonl:5: messages[0].role is 'bot'\n"
            "hint: roles: system, developer, user, assistant, tool",
        ),
        (
            "messages",
            {"messages": [say("user", 3), ANSWER]},
            "r.jsonl:5: messages[0].content must be text, got int\n"
            'hint: write text, or a list of parts such as {"type": "text", "text": "Hello"}',
        ),
        (
            "messages",
            {"messages": [say("user", [{"type": "image_url", "image_url": "x"}]), ANSWER]},
            "r.jsonl:5: messages[0].content holds a part of type 'image_url'\n"
            "hint: alignkit trains on text; images and audio are not supported",
        ),
        (
            "messages",
            {"messages": [ASK, say("assistant", "a", weight=0.5)]},
            "r.jsonl:5: messages[1].weight is 0.5\n"
            "hint: 1 or true trains the turn, 0 or false leaves it out of the loss",
        ),
        (
            "messages",
            {"messages": [ASK, say("assistant", "", tool_calls=[{"arguments": {}}])]},
            "r.jsonl:5: turn 1 calls a tool without a name\n"
            'hint: as in {"name": "get_weather", "arguments": {"city": "Oslo"}}',
        ),
        (
            "messages",
            {"messages": [ASK, say("assistant", "", tool_calls=[CALL | {"arguments": "{"}])]},
            "r.jsonl:5: `arguments of look` is not valid JSON: Expecting property name enclosed in "
            f"double quotes at column 2{QUOTES}",
        ),
        (
            "messages",
            {"messages": [ASK, ANSWER], "tools": "[{"},
            "r.jsonl:5: `tools` is not valid JSON: Expecting property name enclosed in double "
            f"quotes at column 3{QUOTES}",
        ),
        (
            "messages",
            {"messages": [say("system", "Be kind."), ASK, ANSWER], "system": "Be brief."},
            "r.jsonl:5: the row has a system turn and another text under `system`\n"
            "hint: keep one of the two",
        ),
        (
            "messages",
            {"messages": [ASK, ANSWER], "tools": {"name": "look"}},
            f"r.jsonl:5: `tools` must be a list, got dict{rename('tools')}",
        ),
        (
            "messages",
            {"messages": [ASK, ANSWER], "tools": ["look"]},
            "r.jsonl:5: tools[0] describes no function with a name\n"
            'hint: as in {"name": "get_weather", "parameters": {...}}',
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "text": "x"}]},
            "r.jsonl:5: conversations[0] has no `from` and `value`\n"
            'hint: as in {"from": "human", "value": "Hello"}',
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "alien", "value": "x"}]},
            "r.jsonl:5: conversations[0].from is 'alien'\n"
            "hint: known speakers: human, user, gpt, chatgpt, assistant, model, system, "
            "function_call, observation, function_response, tool",
        ),
        ("sharegpt", {"conversations": [{"from": "human", "value": "x"}]}, NO_ANSWER),
        (
            "alpaca",
            {"instruction": "x"},
            "r.jsonl:5: the row has no `output`\n"
            "hint: its keys are instruction; rename with columns, as in columns: {output: ...}",
        ),
        (
            "alpaca",
            {"instruction": "x", "output": 3},
            f"r.jsonl:5: `output` must be text, got int{rename('output')}",
        ),
        (
            "alpaca",
            {"instruction": "x", "output": " "},
            "r.jsonl:5: the row has no answer: the assistant's turn 1 is empty\n"
            "hint: remove the row, or write the answer",
        ),
        (
            "alpaca",
            {"instruction": "x", "output": "y", "history": [["a"]]},
            "r.jsonl:5: history[0] must be [question, answer]\n"
            'hint: as in "history": [["Hello", "Hi, how can I help?"]]',
        ),
        (
            "prompt_completion",
            {"prompt": "x", "completion": "\n"},
            "r.jsonl:5: the row has no answer: completion is empty\n"
            "hint: remove the row, or write the completion",
        ),
        (
            "prompt_completion",
            {"prompt": "x", "completion": None},
            f"r.jsonl:5: `completion` must be text, got NoneType{rename('completion')}",
        ),
        (
            "prompt_completion",
            {"prompt": [ASK], "completion": "Because."},
            "r.jsonl:5: `prompt` and `completion` must both be text or both be messages\n"
            'hint: as in {"prompt": [{"role": "user", ...}], "completion": [{"role": ...}]}',
        ),
        (
            "prompt_completion",
            {"prompt": [ASK, ANSWER], "completion": [ASK]},
            NO_ANSWER,
        ),
        (
            "alpaca",
            {"instruction": "x", "output": "y", "history": [["And?", None]]},
            "r.jsonl:5: the row has no answer: the assistant's turn 1 is empty\n"
            "hint: remove the row, or write the answer",
        ),
        (
            "alpaca",
            {"instruction": "x", "output": "y", "history": 5},
            f"r.jsonl:5: `history` must be a list, got int{rename('history')}",
        ),
        (
            "messages",
            {"messages": [ASK, say("assistant", "a", weight=0, train=True)]},
            "r.jsonl:5: messages[1] has marks that contradict each other: weight is 0, train is "
            "True\nhint: keep one of them",
        ),
        (
            "messages",
            {"messages": [ASK, ANSWER], "tools": '[{"name": "\\ud83d"}]'},
            "r.jsonl:5: `tools` holds half of a character, as a cut-off emoji leaves it: "
            "'\\ud83d'\nhint: write the whole character, or remove the half",
        ),
        ("text", {"text": " "}, "r.jsonl:5: text is empty\nhint: remove the row"),
        ("text", {"text": ["a"]}, f"r.jsonl:5: `text` must be text, got list{rename('text')}"),
    ],
)
def test_refused_rows(row_format: str, values: dict[str, Any], message: str) -> None:
    assert failure(values, row_format) == message


def test_parquet_rows_parse_like_json_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    turns = [ASK, say("assistant", "Skip.", weight=0), ASK, ANSWER]
    path = tmp_path / "r.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns}]), path)
    (row,) = load_source(SourceSpec(path=str(path))).rows
    assert row.values["messages"][3]["weight"] is None  # a column has a value in every turn
    (example,) = parse_answers([row], "auto")
    assert [m.trained for m in example.messages] == [True, False, True, True]
