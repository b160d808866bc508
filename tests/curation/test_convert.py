"""Rows from format to format: what comes back is what was there, or the loss is counted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from commandline import CommandLine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import write_rows

from alignkit.curation.converting.convert import convert_row
from alignkit.curation.converting.foreign import known_row
from alignkit.curation.converting.told import Told, tell
from alignkit.curation.converting.written import WRITERS
from alignkit.data.sources import Row, stream_rows
from alignkit.recipe.rows import SourceSpec

TEMPLATES = sorted(
    path
    for path in (Path(__file__).parents[2] / "data_templates" / "formats").iterdir()
    if path.stem != "prompt_only_question"  # whose columns must be renamed
)

many = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=300,
    suppress_health_check=list(HealthCheck),
)

SAID = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(str.strip)
CALL = st.builds(
    lambda name, arguments, more: {
        "type": "function",
        "function": {"name": name, "arguments": arguments},
        **more,
    },
    SAID,
    st.dictionaries(SAID, SAID | st.integers() | st.none(), max_size=2),
    st.sampled_from([{}, {"id": "call_1"}]),
)
MORE = st.sampled_from([{}, {"name": "x"}, {"reasoning_content": "so"}])


@st.composite
def exchange(draw: Any) -> list[dict[str, Any]]:
    turns = [{"role": "user", "content": draw(SAID), **draw(MORE)}]
    if draw(st.integers(0, 4)) == 0:
        calls = draw(st.lists(CALL, min_size=1, max_size=2))
        content = draw(st.sampled_from(["", "Let me look."]))
        turns.append({"role": "assistant", "content": content, "tool_calls": calls})
        turns.append({"role": "tool", "content": draw(SAID)})
    mark = draw(st.sampled_from([{}, {}, {}, {"weight": 0}, {"weight": 1}]))
    return [*turns, {"role": "assistant", "content": draw(SAID), **draw(MORE), **mark}]


@st.composite
def conversation(draw: Any) -> list[dict[str, Any]]:
    system = draw(st.sampled_from([None, None, "system", "developer"]))
    turns = [{"role": system, "content": draw(SAID)}] if system else []
    for part in draw(st.lists(exchange(), min_size=1, max_size=3)):
        turns += part
    turns[-1].pop("weight", None)
    return turns


TOOLS = st.sampled_from([{}, {"tools": [{"type": "function", "function": {"name": "f"}}]}])
BESIDE = st.sampled_from([{}, {"id": 7}, {"topic": "a", "n": None}])
MARGIN = st.sampled_from([{}, {"margin": 0.5}])
LABEL = st.sampled_from([{}, {"label": True}, {"label": False}])


def joined(*parts: Any) -> Any:
    return st.tuples(*parts).map(lambda found: {k: v for one in found for k, v in one.items()})


CHAT = joined(conversation().map(lambda turns: {"messages": turns}), TOOLS, BESIDE, LABEL)
DIVIDED = conversation().flatmap(
    lambda turns: st.integers(1, len(turns) - 1).map(
        lambda n: {"prompt": turns[:n], "completion": turns[n:]}
    )
)
PLAIN = joined(
    st.fixed_dictionaries({"prompt": SAID, "completion": SAID}, optional={"system": SAID}),
    BESIDE,
    LABEL,
)
PAIR = joined(
    st.tuples(conversation(), SAID).map(
        lambda x: {
            "prompt": x[0][:-1],
            "chosen": x[0][-1:],
            "rejected": [{"role": "assistant", "content": x[1]}],
        }
    ),
    MARGIN,
    TOOLS,
    BESIDE,
)
TEXT_PAIR = joined(
    st.fixed_dictionaries({"prompt": SAID, "chosen": SAID, "rejected": SAID}), MARGIN
)
ASKED = st.one_of(SAID, conversation().map(lambda turns: turns[:-1])).map(lambda x: {"prompt": x})
ROW = st.one_of(CHAT, DIVIDED, PLAIN, PAIR, TEXT_PAIR, ASKED, SAID.map(lambda x: {"text": x}))


def moved(values: dict[str, Any], to: str) -> tuple[list[dict[str, Any]], Told, Counter[str]]:
    row, lost = Row(values, "r.jsonl:1"), Counter[str]()
    told = tell(known_row(row))
    return convert_row(row, told, to, lambda what, _: lost.update([what])), told, lost


@many
@given(row=ROW, path=st.lists(st.sampled_from(sorted(WRITERS)), min_size=1, max_size=3))
def test_from_format_to_format(row: dict[str, Any], path: list[str]) -> None:
    told = tell(known_row(Row(row, "r.jsonl:1")))
    for to in path:
        found, before, lost = moved(row, to)
        assert (before, before.others) == (told, told.others)
        if to != "hh":  # which loses blanks at the ends, and where equal answers begin
            assert "rows are read as something else" not in lost
        if lost or len(found) == 2:
            return
        (row,) = found


def said(values: dict[str, Any], to: str) -> tuple[list[dict[str, Any]], list[str]]:
    found, _, lost = moved(values, to)
    return found, sorted(lost)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def test_what_formats_look_like() -> None:
    turns = [{"role": "system", "content": "S"}, user("a"), answer("b"), user("c"), answer("d")]
    assert said({"messages": turns, "id": 1}, "alpaca") == (
        [{"id": 1, "instruction": "c", "output": "d", "system": "S", "history": [["a", "b"]]}],
        [],
    )
    spoken = [("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")]
    assert said({"messages": turns}, "sharegpt") == (
        [{"conversations": [{"from": f, "value": v} for f, v in spoken], "system": "S"}],
        [],
    )
    assert said({"messages": turns}, "prompt_completion") == (
        [{"prompt": turns[:2], "completion": turns[2:]}],
        [],
    )
    assert said({"messages": turns}, "prompts") == (
        [{"prompt": turns[:4]}],
        ["rows lose their answers"],
    )
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "source": "me"}
    expected = {"source": "me", "messages": [user("Add.\n\n1 2"), answer("3")]}
    assert said(row, "messages") == ([expected], [])
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2}
    plain = "rows were plain text: as a chat they go through the model's "
    assert said(pair, "hh") == (
        [
            {
                "chosen": "\n\nHuman: p\n\nAssistant: a",
                "rejected": "\n\nHuman: p\n\nAssistant: b",
                "margin": 2,
            }
        ],
        [plain + "template"],
    )
    assert said(pair, "labelled") == (
        [
            {"prompt": "p", "completion": "a", "label": True},
            {"prompt": "p", "completion": "b", "label": False},
        ],
        ["rows lose their margins"],
    )


def test_what_is_not_trained_stays_so() -> None:
    row = {"prompt": [user("a"), answer("b"), user("c")], "completion": [answer("d")]}
    (found,), lost = said(row, "messages")
    assert [turn.get("weight") for turn in found["messages"]] == [None, 0, None, None]
    assert not lost
    assert said(found, "prompt_completion") == ([row], [])
    begun = {"prompt": [user("a"), answer("It is ")], "completion": [answer("so.")]}
    (found,), lost = said(begun, "messages")
    assert found["messages"] == [user("a"), answer("It is so.")]
    assert lost == ["rows lose how much of an answer their prompt begins: all of it is trained"]
    assert said(begun, "prompts") == (
        [{"prompt": [user("a"), answer("It is ")]}],
        ["rows lose their answers"],
    )


def test_what_a_format_has_no_place_for() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    turns = [user("a"), answer("", tool_calls=[call]), {"role": "tool", "content": "2"}]
    turns.append(answer("b"))
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {"messages": turns, "tools": tools}
    (found,), lost = said(row, "sharegpt")
    assert not lost
    assert found["conversations"][1] == {
        "from": "function_call",
        "value": '{"name": "f", "arguments": {"x": 1}}',
    }
    assert said(row, "alpaca") == (
        [],
        ["rows left out: alpaca has no place for tools and further speakers"],
    )
    (found,), lost = said(row, "openai")
    assert lost == ["rows get ids for their calls"]
    named = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    assert found["messages"][1]["tool_calls"] == [named]
    assert found["messages"][2] == {"role": "tool", "content": "2", "tool_call_id": "call_1"}
    assert said(found, "openai") == ([found], [])
    assert row["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert said({"messages": [user("a"), answer("b")]}, "preference")[0] == []
    assert said({"text": "a"}, "messages")[0] == []
    _, lost = said({"instruction": "a", "output": "b", "text": "mine"}, "messages")
    assert lost == []
    _, lost = said({"messages": [user("a"), answer("b")], "output": "mine"}, "alpaca")
    assert lost == ["rows lose their column 'output': alpaca has one of that name"]


def test_further_columns_change_nothing_that_is_read() -> None:
    row = {"prompt": "2+2?", "completion": "4", "input": "EXTRA", "note": "n"}
    (found,), lost = said(row, "alpaca")
    assert found == {"note": "n", "instruction": "2+2?", "output": "4"}
    assert "rows lose their column 'input', which would be read as a part of them" in lost
    (found,), _ = said({"messages": [user("a"), answer("b")], "text": "t"}, "prompts")
    assert "text" not in found


def test_a_dialogue_in_a_prompt_is_not_lost_in_silence() -> None:
    asked = "So:\n\nHuman: hi\n\nAssistant: yo"
    _, lost = said({"prompt": asked, "chosen": "a", "rejected": "b"}, "hh")
    assert "rows are read as something else" in lost


def test_ids_of_calls_are_each_ones_own() -> None:
    def call(**more: str) -> dict[str, Any]:
        return {"type": "function", "function": {"name": "f", "arguments": {}}, **more}

    results = [{"role": "tool", "content": text} for text in ("one", "two")]
    turns = [user("a"), answer("", tool_calls=[call(id="call_1"), call()]), *results, answer("b")]
    (found,), _ = said({"messages": turns}, "openai")
    assert [one["id"] for one in found["messages"][1]["tool_calls"]] == ["call_1", "call_2"]
    assert [turn.get("tool_call_id") for turn in found["messages"]][2:4] == ["call_1", "call_2"]


def test_pairs_of_openai() -> None:
    given = {"messages": [user("a")], "tools": [{"type": "function", "function": {"name": "f"}}]}
    row = {"input": given, "preferred_output": [answer("b")], "non_preferred_output": [answer("c")]}
    (found,), lost = said(row, "preference")
    assert not lost
    assert found == {
        "prompt": [user("a")],
        "chosen": [answer("b")],
        "rejected": [answer("c")],
        "tools": given["tools"],
    }
    assert said(found, "openai") == ([row], [])


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_templates_go_through_openai(path: Path) -> None:
    for row in stream_rows(SourceSpec(path=str(path))):
        found, told, lost = moved(row.values, "openai")
        if not lost:
            assert tell(known_row(Row(found[0], row.place))) == told
        assert "rows are read as something else" not in lost


def test_the_command(alignkit: CommandLine, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"question": "Two?", "answer": "2"},
        {"question": "", "answer": "3"},
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    names = ["--columns", "prompt=question", "--columns", "completion=answer"]
    command = ["data", "convert", "rows.jsonl", "-o", "out.jsonl", "--to", "messages", *names]
    done = alignkit(*command, cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert "2 rows read, 1 written; what was lost or changed:" in done.stderr
    assert "1 rows left out: messages has no place for plain text without a prompt" in done.stderr
    assert "(rows.jsonl:2)" in done.stderr
    (line,) = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {"messages": [user("Two?"), answer("2")]}
    assert "out.jsonl exists" in alignkit(*command, cwd=tmp_path).stderr
    none = alignkit(*command[:-5], "hh", *names, "--overwrite", cwd=tmp_path)
    assert none.code == 2
    assert "none of 2 rows can be written as hh" in none.stderr
    wrong = alignkit(*command[:-5], "chatml", *names, "--overwrite", cwd=tmp_path)
    assert "--to chatml is not a format" in wrong.stderr


# as other toolkits describe them ---------------------------------------------------------------


def converted(alignkit: CommandLine, folder: Path, *arguments: str) -> tuple[list[Any], str]:
    done = alignkit("data", "convert", *arguments, "-o", "o.jsonl", "--overwrite", cwd=folder)
    assert done.code == 0, done.stderr
    lines = (folder / "o.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], done.stderr


INFO: dict[str, Any] = {
    "plain": {"file_name": "plain.jsonl", "columns": {"prompt": "q", "response": "a"}},
    "chat": {
        "file_name": "chat.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "turns", "system": "sys"},
        "tags": {
            "role_tag": "who",
            "content_tag": "what",
            "user_tag": "guest",
            "assistant_tag": "host",
            "function_tag": "call",
            "observation_tag": "seen",
        },
    },
    "ranked": {
        "file_name": "ranked.jsonl",
        "ranking": True,
        "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"},
    },
}


def test_rows_of_llama_factory(alignkit: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "dataset_info.json").write_text(json.dumps(INFO), encoding="utf-8")
    write_rows(tmp_path / "d" / "plain.jsonl", [{"q": "Two?", "a": "2", "n": 1}])
    turns = [
        {"who": "guest", "what": "Two?"},
        {"who": "call", "what": '{"name": "count", "arguments": {"n": 2}}'},
        {"who": "seen", "what": "2"},
        {"who": "host", "what": "Two."},
    ]
    write_rows(tmp_path / "d" / "chat.jsonl", [{"turns": turns, "sys": "Short."}])
    write_rows(tmp_path / "d" / "ranked.jsonl", [{"q": "Two?", "good": "2", "bad": "3"}])
    info = "d/dataset_info.json"
    rows, _ = converted(alignkit, tmp_path, info, "--name", "plain")
    assert rows == [{"n": 1, "messages": [user("Two?"), answer("2")]}]
    rows, _ = converted(alignkit, tmp_path, info, "--name", "chat", "--to", "sharegpt")
    assert rows == [
        {
            "conversations": [
                {"from": "human", "value": "Two?"},
                {"from": "function_call", "value": '{"name": "count", "arguments": {"n": 2}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "Two."},
            ],
            "system": "Short.",
        }
    ]
    rows, _ = converted(alignkit, tmp_path, info, "--name", "ranked", "--to", "preference")
    assert rows == [{"prompt": [user("Two?")], "chosen": [answer("2")], "rejected": [answer("3")]}]
    wrong = alignkit("data", "convert", info, "--name", "plane", "-o", "x.jsonl", cwd=tmp_path)
    assert wrong.code == 2
    assert "dataset_info.json has no plane\nhint: it has plain, chat, ranked" in wrong.stderr


def test_rows_of_axolotl(alignkit: CommandLine, tmp_path: Path) -> None:
    write_rows(tmp_path / "intel.jsonl", [{"question": "Two?", "chosen": "2", "rejected": "3"}])
    rows, said = converted(
        alignkit, tmp_path, "intel.jsonl", "--from", "axolotl:chatml.intel", "--to", "preference"
    )
    assert rows == [{"prompt": [user("Two?")], "chosen": [answer("2")], "rejected": [answer("3")]}]
    assert "note: the model's chat template takes the place of Axolotl's own" in said
    segments = [
        {"label": False, "text": "Two? "},
        {"label": True, "text": "2"},
        {"label": True, "text": "."},
    ]
    write_rows(tmp_path / "parts.jsonl", [{"segments": segments}])
    rows, _ = converted(
        alignkit, tmp_path, "parts.jsonl", "--from", "axolotl:input_output", "--to", "text"
    )
    assert rows == [{"text": "Two? 2."}]
    config = """\
base_model: a
datasets:
  - path: turns.jsonl
    type: chat_template
    field_messages: said
    message_property_mappings: {role: who, content: what}
    message_field_training: learn
    roles: {user: [guest], assistant: [host]}
"""
    (tmp_path / "ax.yaml").write_text(config, encoding="utf-8")
    turns = [
        {"who": "guest", "what": "a"},
        {"who": "host", "what": "b", "learn": False},
        {"who": "guest", "what": "c"},
        {"who": "host", "what": "d", "learn": True},
    ]
    write_rows(tmp_path / "turns.jsonl", [{"said": turns}, {"said": [{"who": "x", "what": "y"}]}])
    rows, said = converted(alignkit, tmp_path, "ax.yaml", "--name", "turns.jsonl")
    expected = [user("a"), answer("b", weight=0), user("c"), answer("d", weight=1)]
    assert rows == [{"messages": expected}]
    assert "1 rows left out: messages[0].who is 'x' (turns.jsonl:2)" in said
    wrong = alignkit("data", "convert", "ax.yaml", "--name", "z", "-o", "x.jsonl", cwd=tmp_path)
    assert "has no dataset with the path z\nhint: it has turns.jsonl" in wrong.stderr
