"""Random rows and templates: a sentence or the right mask, whatever they hold."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tiny import END_OF_TURN, tiny_tokenizer

from alignkit.data.examples import parse_rows
from alignkit.data.prompt_rows import parse_prompts
from alignkit.data.sources import Row, load_source
from alignkit.data.tokenize import TokenizeSettings, tokenize_examples
from alignkit.errors import AlignkitError
from alignkit.recipe.rows import SourceSpec

many = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=50,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
few = settings(many, max_examples=25)

ANY_TEXT = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=12),
    st.sampled_from(["<|im_end|>", "{{x}}", "\ud83d", "\0", " ", "", "a\u0301\u200d👩", "\u2028"]),
)
"""Text with lone surrogates, marks of templates, and nothing."""
ANY_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=6,
)
ROLE = st.sampled_from(["user", "assistant", "system", "tool", "developer", "human", "gpt", "x", 5])
CALL = st.fixed_dictionaries(
    {},
    optional={
        "id": ANY_VALUE,
        "function": st.fixed_dictionaries({}, optional={"name": ANY_TEXT, "arguments": ANY_VALUE}),
    },
)
TURN = st.fixed_dictionaries(
    {},
    optional={
        "role": ROLE,
        "from": ROLE,
        "content": ANY_VALUE,
        "value": ANY_VALUE,
        "tool_calls": st.lists(CALL, max_size=2) | ANY_VALUE,
        "weight": ANY_VALUE,
        "reasoning_content": ANY_VALUE,
    },
)
TURNS = st.lists(TURN, max_size=4)
FIELDS = ("messages", "conversations", "chosen", "rejected", "prompt", "completion", "history")
OTHERS = ("text", "instruction", "input", "output", "system", "tools", "label", "margin", "zzz")
ODD_ROW = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(FIELDS, TURNS | ANY_VALUE),
        **dict.fromkeys(OTHERS, ANY_VALUE),
    },
)
"""Rows of the right keys with anything in them."""

SAID = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]
CALLING = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    ],
}
GOOD_ROWS: dict[str, list[dict[str, Any]]] = {
    "answers": [
        {"messages": SAID, "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"messages": [SAID[0], CALLING, {"role": "tool", "content": "5", "name": "f"}, SAID[1]]},
        {"conversations": [{"from": "human", "value": "A?"}, {"from": "gpt", "value": "B."}]},
        {"instruction": "A", "input": "b", "output": "C", "system": "D", "history": [["e", "f"]]},
        {"prompt": "A", "completion": "B"},
        {"prompt": SAID[:1], "completion": SAID[1:]},
        {"text": "A"},
    ],
    "pairs": [
        {"prompt": "A", "chosen": "B", "rejected": "C", "margin": 0.5},
        {"prompt": SAID[:1], "chosen": SAID[1:], "rejected": [CALLING]},
        {"chosen": SAID, "rejected": [SAID[0], {"role": "assistant", "content": "C."}]},
        {"chosen": "\n\nHuman: A\n\nAssistant: B", "rejected": "\n\nHuman: A\n\nAssistant: C"},
    ],
    "labelled": [
        {"messages": SAID, "label": True},
        {"prompt": "A", "completion": "B", "label": False},
    ],
}


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key path of a row."""
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    return [path] + [deep for key, inner in items for deep in paths(inner, (*path, key))]


def put(row: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of a row with another value at a place; `...` removes it."""
    changed = here = copy.deepcopy(row)
    for part in path[:-1]:
        here = here[part]
    if value is ...:
        del here[path[-1]]
    else:
        here[path[-1]] = value
    return changed


@st.composite
def spoiled(draw: Any, kind: str) -> dict[str, Any]:
    """A good row with one value replaced or removed."""
    good = draw(st.sampled_from(GOOD_ROWS[kind]))
    path = draw(st.sampled_from(paths(good)[1:]))
    return put(good, path, ... if draw(st.integers(0, 5)) == 0 else draw(ANY_VALUE))


def any_rows(kind: str) -> st.SearchStrategy[list[dict[str, Any]]]:
    """Spoiled rows mostly; others that hold anything."""
    good = st.sampled_from(GOOD_ROWS[kind])
    return st.lists(spoiled(kind) | spoiled(kind) | ODD_ROW | good, min_size=1, max_size=2)


@functools.cache
def tokenizer_of(family: str) -> Any:
    return tiny_tokenizer(family)


def read_back(rows: list[Any]) -> list[Any]:
    """Rows as a file of JSON lines gives them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return load_source(SourceSpec(path=str(path))).rows


def tokens(written: list[Any], tokenizer: Any, **changed: Any) -> tuple[list[Any], Any]:
    options = TokenizeSettings(**{"max_length": 10_000, "too_long": "drop", **changed})
    examples = parse_rows(read_back(written), "auto", options.rows)
    return tokenize_examples(examples, tokenizer, options)


@pytest.mark.parametrize("kind", ["answers", "pairs", "labelled"])
@many
@given(length=st.integers(8, 60), data=st.data())
def test_any_row_is_used_dropped_or_refused_in_a_sentence(
    kind: Any, length: int, data: Any
) -> None:
    rows = data.draw(any_rows(kind))
    way = data.draw(st.sampled_from(["drop", "truncate_left", "truncate_right", "error"]))
    try:
        examples = parse_rows(read_back(rows), "auto", kind)
        options = TokenizeSettings(length, way, rows=kind)
        documents, report = tokenize_examples(examples, tokenizer_of("chatml"), options)
    except AlignkitError:
        return
    assert report.rows == len(examples) == len(documents) + sum(report.dropped.values())
    assert report.kept == len(documents)
    for document in documents:
        for branch in document.branches:
            assert len(document.prompt) + len(branch.ids) <= length
            assert branch.trained.any()


NASTY: list[Any] = [
    *(None, True, 5, -1, 0.5, 10**400, float("nan"), "", " ", "x", "{", "[1]", "{}"),
    *([], [[]], [None], [5], ["x"], [{}], {}, {"a": None}, {"role": "user"}, {"name": 5}),
    *([["a"]], [["a", "b", "c"]], [[None, None]], {"x": "y"}, [{"from": "human"}]),
]
"""Values that are put in every place of every good row; reading a file refuses half characters."""


@pytest.mark.parametrize("kind", GOOD_ROWS)
def test_every_place_of_every_row_may_hold_anything(kind: Any) -> None:
    options, tokenizer, wrong = TokenizeSettings(64, "drop", rows=kind), tokenizer_of("chatml"), []
    for good in GOOD_ROWS[kind]:
        for path in paths(good)[1:]:
            for value in NASTY:
                row = put(good, path, value)
                try:
                    examples = parse_rows([Row(row, "rows.jsonl:1")], "auto", kind)
                    documents, report = tokenize_examples(examples, tokenizer, options)
                    assert report.rows == len(documents) + sum(report.dropped.values())
                except AlignkitError:
                    pass
                except Exception as error:
                    wrong.append(f"{path} = {value!r:.20} in {good}: {error!r:.100}")
    assert not wrong, f"{len(wrong)} are wrong:\n" + "\n".join(wrong)


@many
@given(rows=any_rows("answers") | any_rows("pairs"))
def test_any_prompt_is_read_or_refused_in_a_sentence(rows: list[Any]) -> None:
    try:
        prompts = parse_prompts(read_back(rows), "auto")
    except AlignkitError:
        return
    assert len(prompts) == len(rows)


# Each role writes in letters of its own, so that a trained letter tells whose it is.


def written_in(letters: str) -> st.SearchStrategy[str]:
    words = st.text(letters, min_size=1, max_size=6)
    return st.lists(words, min_size=1, max_size=4).map(" ".join)


ASKED, ANSWERED, ORDERED, TOLD = "0123456789", "abcdefgh", "ABCDEFGH", "яшфцбдж"
LETTERS = {"user": ASKED, "assistant": ANSWERED, "system": ORDERED, "tool": TOLD}


def message(role: str) -> st.SearchStrategy[dict[str, str]]:
    return written_in(LETTERS[role]).map(lambda text: {"role": role, "content": text})


@st.composite
def conversations(draw: Any, *, system: bool = True, opened: bool = True) -> list[dict[str, str]]:
    """Turns of user and assistant, a system message before them perhaps."""
    turns: list[dict[str, str]] = []
    if system and draw(st.booleans()):
        turns.append(draw(message("system")))
    elif opened and draw(st.integers(0, 5)) == 0:
        turns.append(draw(message("assistant")))
    for _ in range(draw(st.integers(1, 3))):
        turns += [draw(message("user")), draw(message("assistant"))]
    return turns


def assert_only_answers(
    turns: list[dict[str, str]], document: Any, tokenizer: Any, end: str, last: bool = False
) -> None:
    """The trained tokens are the answers, each with its end, and nothing else."""
    (branch,) = document.branches
    text = tokenizer.decode(branch.ids[branch.trained])
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    assert [part.strip() for part in text.split(end)] == [*answers[-last:], ""]


FAMILIES = {  # family -> whether its template takes system messages and answers that come first
    "chatml": (True, True),
    "qwen": (True, True),
    "llama3": (True, True),
    "mistral": (False, False),
    "gemma": (False, False),
}


@pytest.mark.parametrize("family", FAMILIES)
@few
@given(data=st.data(), last=st.booleans())
def test_only_what_the_assistant_says_is_trained(family: str, data: Any, last: bool) -> None:
    tokenizer, (system, opened) = tokenizer_of(family), FAMILIES[family]
    turns = data.draw(conversations(system=system, opened=opened))
    on = "last_turn" if last else "completions"
    (document,), _ = tokens([{"messages": turns}], tokenizer, train_on=on)
    assert_only_answers(turns, document, tokenizer, END_OF_TURN[family], last)


SHORT = [{"role": "user", "content": "1 2"}, {"role": "assistant", "content": "a b"}]
ORDER = [{"role": "system", "content": "A B"}]
TALKS = [SHORT, SHORT * 2, [*ORDER, *SHORT * 2]]
HEADS = ["<|im_start|>ROLE\n", "[ROLE] ", "ROLE: ", "ROLE:\n", "\n\n### ROLE\n", "<ROLE>\t"]


def template_of(head: str, gap: str, trim: str, default: str, marked: bool) -> str:
    """A template: HEAD text <|im_end|> GAP for every turn, after a default system text."""

    def say(text: str) -> str:
        return "{{- '" + text.replace("\n", "\\n").replace("\t", "\\t") + "' -}}"

    answer = "{{- m.content" + trim + " + '<|im_end|>' -}}"
    if marked:
        answer = "{%- generation -%}" + answer + "{%- endgeneration -%}"
    return (
        ("{%- if messages[0].role != 'system' -%}" + say(default) + "{%- endif -%}")
        + ("{%- for m in messages -%}" + say(head).replace("ROLE", "' + m.role + '"))
        + ("{%- if m.role == 'assistant' -%}" + answer + "{%- else -%}")
        + ("{{- m.content" + trim + " + '<|im_end|>' -}}{%- endif -%}" + say(gap))
        + (
            "{%- endfor -%}{%- if add_generation_prompt -%}"
            + say(head.replace("ROLE", "assistant"))
        )
        + "{%- endif -%}"
    )


@pytest.mark.parametrize("marked", [False, True])
def test_a_template_of_any_look_trains_the_answers_only(marked: bool) -> None:
    defaults = ["", "<|im_start|>system\nHELP<|im_end|>\n"]
    looks = itertools.product(HEADS, ["", "\n", " ", "\n\n"], ["", "|trim"], defaults)
    wrong = []
    for look in looks:
        tokenizer = tiny_tokenizer("chatml", template_of(*look, marked))
        for turns in TALKS:
            (document,), _ = tokens([{"messages": turns}], tokenizer)
            try:
                assert_only_answers(turns, document, tokenizer, "<|im_end|>")
            except AssertionError as error:
                wrong.append(f"{look}, {len(turns)} turns: {str(error).splitlines()[0]}")
    assert not wrong, f"{len(wrong)} are wrong:\n" + "\n".join(wrong)


PIECES = [
    *("{{ messages[0].content }}", "{{ messages[-1]['role'] }}", "{{ messages }}", "x", " "),
    *("{% for m in messages %}", "{% endfor %}", "{% if m.role == 'user' %}", "{% else %}"),
    *("{% endif %}", "{{ m.content }}", "{{ m.nothing.at.all }}", "{{ m.content[::-1] }}"),
    *("{{ raise_exception('no') }}", "{% set x = 1 // 0 %}", "{{ x }}", "{{ x + 'a' }}"),
    *("{% generation %}", "{% endgeneration %}", "{{ bos_token + nothing }}", "{{ tools[0] }}"),
    *("{{ messages|map(attribute='role')|join }}", "{% macro f() %}", "{% endmacro %}", "{{"),
    *("{% if add_generation_prompt %}", "<|im_end|>", "{{ m.content|upper }}", "{{ f() }}"),
    *("{% break %}", "{% include 'a' %}", "{{ namespace(a=1).a }}", "{{ cycler(1)() }}", "#}"),
    *("{{ strftime_now('%Y') }}", "{{ m|tojson }}", "{{ ''.__class__ }}", "{% do x %}"),
]


@many
@given(turns=conversations(), pieces=st.lists(st.sampled_from(PIECES), max_size=8))
def test_any_template_is_used_or_refused_in_a_sentence(
    turns: list[dict[str, str]], pieces: list[str]
) -> None:
    try:
        tokenizer = tiny_tokenizer("chatml", "".join(pieces))
        documents, report = tokens([{"messages": turns}], tokenizer)
    except AlignkitError:
        return
    assert report.rows == len(documents) + sum(report.dropped.values())


NAMES = {"user": "human", "assistant": "gpt", "system": "system"}


def as_sharegpt(turns: list[dict[str, str]]) -> dict[str, Any]:
    shared = [{"from": NAMES[turn["role"]], "value": turn["content"]} for turn in turns]
    return {"conversations": shared}


def as_completion(turns: list[dict[str, str]]) -> dict[str, Any]:
    return {"prompt": turns[:-1], "completion": turns[-1:]}


def as_alpaca(turns: list[dict[str, str]]) -> dict[str, Any]:
    texts = [turn["content"] for turn in turns]
    head = {"system": texts.pop(0)} if turns[0]["role"] == "system" else {}
    history = [texts[number : number + 2] for number in range(0, len(texts) - 2, 2)]
    return {**head, "instruction": texts[-2], "output": texts[-1], "history": history}


@pytest.mark.parametrize("family", ["chatml", "llama3"])
@few
@given(turns=conversations(opened=False))
def test_every_format_says_the_same(family: str, turns: list[dict[str, str]]) -> None:
    tokenizer = tokenizer_of(family)
    (whole,), _ = tokens([{"messages": turns}], tokenizer)
    (end,), _ = tokens([{"messages": turns}], tokenizer, train_on="last_turn")
    for row, same in (
        (as_sharegpt(turns), whole),
        (as_alpaca(turns), whole),
        (as_completion(turns), end),
    ):
        (other,), _ = tokens([row], tokenizer)
        assert other.branches[0].ids.tolist() == same.branches[0].ids.tolist()
        assert other.branches[0].trained.tolist() == same.branches[0].trained.tolist()


def assert_begins(whole: Any, document: Any) -> None:
    """Prompt and first branch are the row, but for what follows its last trained token."""
    branch = document.branches[0]
    ids = [*document.prompt.tolist(), *branch.ids.tolist()]
    trained = [*([False] * len(document.prompt)), *branch.trained.tolist()]
    assert whole.ids[: len(ids)].tolist() == ids
    assert whole.trained[: len(ids)].tolist() == trained
    assert not whole.trained[len(ids) :].any()


@few
@given(turns=conversations(opened=False), worse=message("assistant"), label=st.booleans())
def test_pairs_and_labels_say_what_messages_say(
    turns: list[dict[str, str]], worse: dict[str, str], label: bool
) -> None:
    tokenizer = tokenizer_of("chatml")
    (whole,), _ = tokens([{"messages": turns}], tokenizer, train_on="last_turn")
    wanted = whole.branches[0]
    pair = {"prompt": turns[:-1], "chosen": turns[-1:], "rejected": [worse]}
    documents, report = tokens([pair], tokenizer, rows="pairs")
    if worse["content"] == turns[-1]["content"]:
        assert report.dropped
    else:
        assert_begins(wanted, documents[0])
    row = {"messages": turns, "label": label}
    (labelled,), _ = tokens([row], tokenizer, rows="labelled")
    assert_begins(wanted, labelled)
