"""Foreign descriptions of rows: what they become, and that alignkit reads such rows in place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignkit.data.formats import Conversation, parse_answers
from alignkit.data.pairs import PAIR_PARSERS
from alignkit.data.sources import load_source
from alignkit.errors import DataError
from alignkit.recipe.importing.datasets import ForeignRows, llama_factory_rows
from alignkit.recipe.importing.entries import axolotl_rows, trl_rows
from alignkit.recipe.rows import SourceSpec

TALK = [("user", "Why?"), ("assistant", "So.")]


def turns(role: str, content: str, **speakers: str) -> list[dict[str, str]]:
    return [{role: speakers.get(speaker, speaker), content: text} for speaker, text in TALK]


HUMAN = turns("from", "value", user="human", assistant="gpt")
ALPACA = {"columns": {"prompt": "q", "response": "a", "system": "s"}}
SHAREGPT = {"formatting": "sharegpt"}
OPENAI = {
    "formatting": "sharegpt",
    "columns": {"messages": "messages"},
    "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user"}
    | {"assistant_tag": "assistant", "system_tag": "system"},
}
FROM_VALUE = {"message_field_role": "from", "message_field_content": "value"}
CHAT: dict[str, Any] = {"type": "chat_template", "field_messages": "talk"}
FIELDS = {"field_instruction": "q", "field_output": "a", "format": "{instruction}!"}

ANSWERS: dict[str, tuple[ForeignRows, dict[str, Any]]] = {
    "alpaca": (
        llama_factory_rows("x", {"file_name": "x.json"}),
        {"instruction": "Why?", "output": "So."},
    ),
    "renamed alpaca": (
        llama_factory_rows("x", {"file_name": "x.json"} | ALPACA),
        {"q": "Why?", "a": "So.", "s": ""},
    ),
    "sharegpt": (
        llama_factory_rows("x", {"file_name": "x.json"} | SHAREGPT),
        {"conversations": HUMAN},
    ),
    "openai": (
        llama_factory_rows("x", {"file_name": "x.json"} | OPENAI),
        {"messages": turns("role", "content")},
    ),
    "axolotl alpaca": (
        axolotl_rows({"path": "x.json", "type": "alpaca_chat.load_qa"}),
        {"instruction": "Why?", "output": "So."},
    ),
    "gpteacher": (
        axolotl_rows({"path": "x.json", "type": "gpteacher"}),
        {"instruction": "Why?", "response": "So."},
    ),
    "chat_template": (
        axolotl_rows({"path": "x.json"} | CHAT),
        {"talk": turns("role", "content")},
    ),
    "chat_template of from and value": (
        axolotl_rows({"path": "x.json"} | CHAT | FROM_VALUE),
        {"talk": HUMAN},
    ),
    "old sharegpt": (
        axolotl_rows({"path": "x.json", "type": "sharegpt"}),
        {"conversations": HUMAN},
    ),
    "fields": (
        axolotl_rows({"path": "x.json", "type": FIELDS}),
        {"q": "Why?", "a": "So."},
    ),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_rows_of_answers_are_read_in_place(case: str, tmp_path: Path) -> None:
    rows, row = ANSWERS[case]
    assert rows.in_place
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    spec = SourceSpec.model_validate(rows.source() | {"path": str(path)})
    (read,) = parse_answers(load_source(spec).rows, spec.format)
    assert isinstance(read, Conversation)
    assert [(turn.role, turn.content) for turn in read.messages] == TALK


PAIR = {"chosen": "So.", "rejected": "No."}
LAST = {"chosen": {"from": "gpt", "value": "So."}, "rejected": {"from": "gpt", "value": "No."}}
WHOLE = {
    side: [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": text}]
    for side, text in PAIR.items()
}
RANKING = {"file_name": "x.json", "ranking": True}

PAIRS: dict[str, tuple[ForeignRows, dict[str, Any]]] = {
    "alpaca": (llama_factory_rows("x", RANKING), {"instruction": "Why?"} | PAIR),
    "renamed": (
        llama_factory_rows("x", RANKING | {"columns": {"prompt": "q", "chosen": "chosen"}}),
        {"q": "Why?"} | PAIR,
    ),
    "sharegpt": (
        llama_factory_rows("x", RANKING | SHAREGPT),
        {"conversations": HUMAN[:1]} | LAST,
    ),
    "intel": (
        axolotl_rows({"path": "x.json", "type": "chatml.intel"}, "dpo"),
        {"question": "Why?"} | PAIR,
    ),
    "llama3.ultra": (
        axolotl_rows({"path": "x.json", "type": "llama3.ultra"}, "dpo"),
        {"prompt": "Why?"} | WHOLE,
    ),
    "argilla": (
        axolotl_rows({"path": "x.json", "type": "chat_template.argilla"}, "orpo"),
        WHOLE,
    ),
    "default": (
        axolotl_rows({"path": "x.json", "type": "chat_template.default"}, "dpo"),
        {
            "messages": WHOLE["chosen"][:1],
            "chosen": WHOLE["chosen"][1],
            "rejected": WHOLE["rejected"][1],
        },
    ),
    "bradley_terry": (
        axolotl_rows({"path": "x.json", "type": "bradley_terry.chat_template"}, "reward"),
        {"input": "Why?"} | PAIR,
    ),
    "fields": (
        axolotl_rows({"path": "x.json", "type": {"field_prompt": "q"}}, "dpo"),
        {"q": "Why?"} | PAIR,
    ),
}


@pytest.mark.parametrize("case", PAIRS)
def test_rows_of_pairs_are_read_in_place(case: str, tmp_path: Path) -> None:
    rows, row = PAIRS[case]
    assert rows.in_place
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    spec = SourceSpec.model_validate(rows.source() | {"path": str(path)})
    (read,) = load_source(spec).rows
    found = PAIR_PARSERS[spec.format](read)
    assert [[turn.content for turn in part] for part in found] == [["Why?"], ["So."], ["No."]]


KTO = {
    "chatml.intel": {"instruction": "question", "output": "completion"},
    "llama3.ultra": {"instruction": "prompt", "output": "completion"},
    "chatml.argilla_chat": {"messages": "completion"},
}


@pytest.mark.parametrize("name", KTO)
def test_labelled_rows_of_axolotl(name: str) -> None:
    rows = axolotl_rows({"path": "org/rows", "type": name}, "kto")
    assert (rows.hub, rows.columns) == ("org/rows", KTO[name])


def test_turns_with_other_names_say_how_they_are_called() -> None:
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "me", "function_tag": "call"}
    rows = llama_factory_rows("x", {"hf_hub_url": "org/x", "tags": tags} | SHAREGPT)
    assert not rows.in_place
    assert rows.turn_keys == {"role": "who", "content": "says"}
    assert rows.speakers == {"me": "user", "call": "function_call"}
    roles = {"user": ["me"], "assistant": ["bot", "ai"]}
    rows = axolotl_rows({"path": "x.jsonl", "roles": roles} | CHAT)
    assert not rows.in_place
    assert rows.speakers == {"me": "user", "bot": "assistant", "ai": "assistant"}
    trained = axolotl_rows({"path": "x.jsonl", "message_field_training": "learn"} | CHAT)
    assert not trained.in_place
    assert trained.turn_keys["train"] == "learn"
    assert axolotl_rows({"path": "x.jsonl", "message_field_training": "train"} | CHAT).in_place
    assert not axolotl_rows({"path": "x.jsonl", "type": "input_output"}).in_place
    assert not llama_factory_rows("x", {"file_name": "x.txt"}).in_place


def test_places() -> None:
    assert trl_rows({"path": "org/x", "name": "small", "split": "train[:50]"}).source() == {
        "hub": "org/x",
        "name": "small",
        "take": 50,
    }
    assert trl_rows({"path": "json", "data_files": "a.jsonl"}).source() == {"path": "a.jsonl"}
    local = {"path": "data", "ds_type": "json", "data_files": ["a.json"], "type": "alpaca"}
    assert axolotl_rows(local).path == "data/a.json"
    assert axolotl_rows(local | {"path": "a.json"}).path == "a.json"
    with pytest.raises(DataError, match="org/x is a hub dataset of which one file is read"):
        trl_rows({"path": "org/x", "data_files": "a.json"})
    half = llama_factory_rows("x", {"hf_hub_url": "org/x", "subset": "s", "split": "train[:5%]"})
    assert (half.subset, half.split) == ("s", "train[:5%]")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"ms_hub_url": "org/x"}, "x: has neither file_name nor hf_hub_url"),
        ({"file_name": "a.json", "formatting": "chat"}, "x: formatting is 'chat'"),
        ({"file_name": "a.json", "columns": ["q"]}, "columns must be a mapping"),
    ],
)
def test_entries_that_cannot_be_read(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        llama_factory_rows("x", entry)


def test_images_are_said_to_be_left_out() -> None:
    rows = llama_factory_rows("x", {"file_name": "a.json", "columns": {"images": "images"}})
    assert rows.notes == ("images are left out: alignkit trains on text",)


@pytest.mark.parametrize(
    ("more", "note"),
    [
        ({"shards": 10, "shards_idx": 0}, "all rows are taken, not one part of them"),
        ({"revision": "v1"}, "the newest revision is read"),
        ({"input_transform": "x"}, "input_transform is not read"),
        ({"conversation": "chatml"}, "conversation is not read"),
        ({"field_human": "q"}, "field_human is not read"),
        ({"split": "train[:10%]"}, "split train[:10%] is not read of a file"),
        ({"split": "train[10:20]"}, "all its rows are taken"),
    ],
)
def test_keys_that_choose_rows_are_not_silent(more: dict[str, Any], note: str) -> None:
    rows = axolotl_rows({"path": "x.json", "type": "alpaca"} | more)
    assert note in "; ".join(rows.notes)
    assert len(rows.notes) == 2  # and the prompt text
    usual = axolotl_rows({"path": "x.json", "type": "alpaca", "split": "train[:10]"})
    assert (usual.take, len(usual.notes)) == (10, 1)


def test_a_revision_of_trl_is_named() -> None:
    rows = trl_rows({"path": "org/x", "revision": "v1"})
    assert rows.notes == ("revision is not a key that alignkit knows of",)


def test_data_files_may_be_named_by_split() -> None:
    files = {"train": "s.json", "test": ["t.json"]}
    assert trl_rows({"path": "json", "data_files": files}).source() == {"path": "s.json"}
    test = trl_rows({"path": "json", "data_files": files, "split": "test[:5]"})
    assert test.source() == {"path": "t.json", "take": 5}
    with pytest.raises(DataError, match="no file for the split held") as caught:
        trl_rows({"path": "json", "data_files": files, "split": "held"})
    assert caught.value.hint == "it has train, test"
    for odd in (3, True, [4], {"train": {"a": 1}}):
        with pytest.raises(DataError, match="data_files must name a file"):
            trl_rows({"path": "json", "data_files": odd})


def test_rows_drawn_at_random_there_are_said() -> None:
    rows = llama_factory_rows("x", {"file_name": "a.json", "num_samples": 10})
    assert rows.take == 10
    assert "drawn at random, and repeated if there are too few" in rows.notes[0]
    joined = {"prompt": "q", "query": "context", "response": "a"}
    notes = llama_factory_rows("x", {"file_name": "a.json", "columns": joined}).notes
    assert notes == ("instruction and input are joined by an empty line, there by a line break",)
    other = {"prompt": "input", "response": "a"}
    assert llama_factory_rows("x", {"file_name": "a.json", "columns": other}).notes == ()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"num_samples": "10"}, "num_samples must be a whole number of 1 or more, got '10'"),
        ({"num_samples": -1}, "num_samples must be a whole number"),
        ({"num_samples": True}, "num_samples must be a whole number"),
        ({"ranking": "false"}, "ranking must be true or false, got 'false'"),
        ({"columns": {1: "a"}}, "columns: a key must be text, got 1"),
        ({"columns": {"prompt": ["a"]}}, "prompt must be text"),
        ({"tags": {"role_tag": 3}}, "role_tag must be text, got 3"),
        ({"split": 3}, "split must be text, got 3"),
        ({5: "a"}, "x: a key must be text, got 5"),
    ],
)
def test_wrong_types_of_llama_factory(entry: dict[Any, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        llama_factory_rows("x", {"file_name": "a.json"} | entry)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"type": {1: "a"}}, "x.json: type: a key must be text, got 1"),
        ({"type": {"field_output": 2}}, "field_output must be text, got 2"),
        ({"field_messages": ["a"]}, "field_messages must be text"),
        ({"type": "completion", "field": 3}, "field must be text, got 3"),
        ({"path": 3}, "path must be text, got 3"),
        ({"split": ["train"]}, "split must be text"),
        ({"path": "org/x", "name": 2024}, "name must be text, got 2024"),
        ({7: "a"}, "an entry: a key must be text, got 7"),
    ],
)
def test_wrong_types_of_axolotl(entry: dict[Any, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        axolotl_rows({"path": "x.json"} | entry)
    assert caught.value.hint
