"""Rows of every preference format -> pairs and labelled answers, and every row that is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from tiny import tiny_tokenizer

from alignkit.data.examples import Example, parse_rows
from alignkit.data.formats import Completion, Conversation, Text
from alignkit.data.pairs import PAIR_PARSERS
from alignkit.data.sources import Row, load_source
from alignkit.data.tokenize import TokenizeSettings, tokenize_examples
from alignkit.data.turns import Message
from alignkit.errors import DataError
from alignkit.packed import Role
from alignkit.recipe.assets import assets_root
from alignkit.recipe.rows import SourceSpec

FORMATS = assets_root() / "data_templates" / "formats"
PLACE = "r.jsonl:5"

Turns = list[tuple[str, str]]


def parse_pairs(rows: list[Row], row_format: str) -> list[Example]:
    return parse_rows(rows, row_format, "pairs")


def parse_labelled(rows: list[Row], row_format: str) -> list[Example]:
    return parse_rows(rows, row_format, "labelled")


def pair(values: dict[str, Any], row_format: str = "auto") -> Any:
    (found,) = parse_pairs([Row(values, PLACE)], row_format)
    return found


def labelled(values: dict[str, Any], row_format: str = "auto") -> list[Example]:
    return parse_labelled([Row(values, PLACE)], row_format)


def label(text: Text, role: Role, place: str = PLACE) -> Example:
    return Example((text,), (role,), place)


def unusable(reason: str) -> Example:
    return Example((), (), PLACE, unusable=reason)


def failure(parse: Any, values: dict[str, Any], row_format: str = "auto") -> str:
    with pytest.raises(DataError) as caught:
        parse(values, row_format)
    return str(caught.value)


def say(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def speak(speaker: str, value: Any) -> dict[str, Any]:
    return {"from": speaker, "value": value}


def turns(example: Text) -> Turns:
    """Role and text of each turn."""
    assert isinstance(example, Conversation)
    return [(message.role, message.content) for message in example.messages]


def trained(example: Text) -> list[str]:
    """Texts of the assistant's turns that carry loss."""
    assert isinstance(example, Conversation)
    turns = example.messages[example.context :]
    return [turn.content for turn in turns if turn.role == "assistant" and turn.trained]


def talk(*texts: str) -> Turns:
    """Turns by user and assistant in alternation."""
    return [(("user", "assistant")[n % 2], text) for n, text in enumerate(texts)]


ASK, GOOD, BAD = say("user", "Why?"), say("assistant", "Because."), say("assistant", "No.")
SYSTEM = say("system", "Be kind.")


# shipped examples ----------------------------------------------------------------------------

SHIPPED_PAIRS = {
    "preference_hh.jsonl": "hh",
    "preference_implicit.jsonl": "preference",
    "preference_margin.jsonl": "preference",
    "preference_messages.jsonl": "preference",
    "preference_sharegpt.json": "sharegpt_preference",
    "preference_text.jsonl": "preference",
    "preference_ultrafeedback.jsonl": "preference",
}
SHIPPED_LABELLED = {
    "labelled_messages.jsonl": "messages",
    "labelled_prompt_completion.jsonl": "prompt_completion",
    "labelled_sharegpt.json": "sharegpt",
    "labelled_text.jsonl": "prompt_completion",
}


def shipped(name: str) -> list[Row]:
    return load_source(SourceSpec(path=str(FORMATS / name))).rows


def test_every_shipped_preference_file_is_tested_here() -> None:
    assert {path.name for path in FORMATS.glob("preference_*")} == set(SHIPPED_PAIRS)
    assert {path.name for path in FORMATS.glob("labelled_*")} == set(SHIPPED_LABELLED)
    assert set(SHIPPED_PAIRS.values()) == set(PAIR_PARSERS)


@pytest.mark.parametrize("name", SHIPPED_PAIRS)
def test_every_shipped_pair_parses(name: str) -> None:
    rows = shipped(name)
    pairs = parse_pairs(rows, "auto")
    assert len(pairs) == len(rows) >= 10
    assert pairs == parse_pairs(rows, SHIPPED_PAIRS[name])
    assert [found.place for found in pairs] == [row.place for row in rows]
    for found in pairs:
        chosen, rejected = found.texts
        assert found.roles == (Role.CHOSEN, Role.REJECTED)
        assert chosen.place == rejected.place == found.place
        if isinstance(chosen, Completion):
            assert isinstance(rejected, Completion)
            assert chosen.prompt == rejected.prompt
            continue
        # One prompt, which is not trained, and one answer, which is.
        assert turns(chosen)[:-1] == turns(rejected)[:-1]
        assert turns(chosen)[-2][0] == "user"
        assert trained(chosen) == [turns(chosen)[-1][1]]
        assert trained(rejected) == [turns(rejected)[-1][1]]
        assert trained(chosen) != trained(rejected)


@pytest.mark.parametrize("name", SHIPPED_LABELLED)
def test_every_shipped_labelled_row_parses(name: str) -> None:
    rows = shipped(name)
    found = parse_labelled(rows, "auto")
    assert found == parse_labelled(rows, SHIPPED_LABELLED[name])
    assert [item.place for item in found] == [row.place for row in rows]
    roles = [role for item in found for role in item.roles]
    wanted = {True: Role.CHOSEN, False: Role.REJECTED}
    assert roles == [wanted[row.values["label"]] for row in rows]
    assert set(roles) == {Role.CHOSEN, Role.REJECTED}


BIRTHDAY = "I have to give a toast for my aunt's birthday."
RADIOS = "She fixes old radios and never gives up."
WALK = (
    ("user", "Can you help me plan a walk?"),
    ("assistant", "Gladly. How much time do you have?"),
    ("user", "About two hours, and I like water."),
    ("assistant", "Then a loop around a lake or along a river would suit you. Do you want a place "
     "to rest?"),
    ("user", "Yes, somewhere with a bench at half way."),
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "row", "prompt", "chosen", "rejected", "margin"),
    [
        (
            "preference_hh.jsonl",
            2,
            [*WALK],
            "Walk along the river for fifty minutes, rest on a bench there for twenty, and come "
            "back on the other bank. That fills your two hours.",
            "A bench is a good place to sit on.",
            0.0,
        ),
        (
            "preference_implicit.jsonl",
            1,
            talk(BIRTHDAY, "What do you like most about her?", RADIOS),
            "Here is a short one: To the woman who finds music in every broken box. May your next "
            "years never lose their signal!",
            "Happy birthday to your aunt. I hope the party is nice.",
            0.0,
        ),
        (
            "preference_implicit.jsonl",
            2,
            [
                ("system", "You are a ticket clerk at a small railway museum."),
                ("user", "Is the steam train running today?"),
            ],
            "Please look at the board by platform one, which lists today's trips. On steam days "
            "the first one leaves after the whistle test.",
            "Trains run on some days and not on others.",
            0.0,
        ),
        (
            "preference_margin.jsonl",
            1,
            talk("Recommend a plant for a shady hallway."),
            "A cast iron plant does well there: it stands low light and does not mind if you "
            "forget to water it now and then.",
            "A peace lily may do, though it wilts as soon as you forget to water it.",
            0.5,
        ),
        (
            "preference_messages.jsonl",
            2,
            talk(
                "Our choir needs a name. We sing on a canal boat.",
                "How about The Lock Keepers?",
                "Nice, but we want something with a bird in it.",
            ),
            "Then try The Heron Barge Singers or Coot and Chorus. Both birds live along canals.",
            "The Lock Keepers is still a good name.",
            0.0,
        ),
        (
            "preference_sharegpt.json",
            2,
            [
                ("system", "You help visitors of a botanical garden."),
                ("user", "Which plant should my five-year-old see first?"),
            ],
            "Start with the sensitive plant in the warm house. It folds its leaves when a finger "
            "brushes them gently.",
            "All plants here are labelled in Latin.",
            0.0,
        ),
        (
            "preference_ultrafeedback.jsonl",
            3,
            talk("Which three items belong in a small bicycle repair kit?"),
            "Carry a spare tube, a pair of tyre levers, and a small pump.",
            "Bring some tools along.",
            0.0,
        ),
    ],
)
def test_shipped_pairs_by_hand(
    name: str, row: int, prompt: Turns, chosen: str, rejected: str, margin: float
) -> None:
    found = parse_pairs(shipped(name), "auto")[row]
    assert [turns(text) for text in found.texts] == [
        [*prompt, ("assistant", answer)] for answer in (chosen, rejected)
    ]
    assert found.margin == margin


def test_shipped_text_pairs_by_hand() -> None:
    found = parse_pairs(shipped("preference_text.jsonl"), "auto")[0]
    prompt = "Question: Which day comes three days after Monday?\nAnswer:"
    good = " Thursday, because the count runs Tuesday, Wednesday, Thursday."
    place = found.place
    assert place.endswith("preference_text.jsonl:1")
    assert found.texts == (
        Completion(prompt, good, place),
        Completion(prompt, " One of the later days of the week.", place),
    )
    assert found.margin == 0.0


def test_shipped_margins() -> None:
    found = parse_pairs(shipped("preference_margin.jsonl"), "auto")
    assert [item.margin for item in found] == [
        *(3.0, 0.5, 2.5, 1.2, 3.0, 0.3),
        *(2.0, 1.5, 0.0, 1.8, 2.2, 1.0),
    ]


def test_shipped_labelled_rows_by_hand() -> None:
    text = parse_labelled(shipped("labelled_text.jsonl"), "auto")[1]
    prompt = "The colours of a traffic light, from top to bottom, are"
    example = Completion(prompt, " bright and easy to see.", text.place)
    assert text == label(example, Role.REJECTED, text.place)
    rhymes = parse_labelled(shipped("labelled_messages.jsonl"), "auto")[2]
    assert rhymes.roles == (Role.CHOSEN,)
    assert turns(rhymes.texts[0]) == talk(
        "Give me a rhyme for 'kettle'.", "Nettle.", "And one for 'cup'?", "Pup."
    )
    assert trained(rhymes.texts[0]) == ["Pup."]  # the label is about the last turn
    toaster = parse_labelled(shipped("labelled_sharegpt.json"), "auto")[2]
    assert turns(toaster.texts[0])[1:3] == [
        ("assistant", "How about a robot or a toaster?"),
        ("user", "The toaster! What do I need?"),
    ]
    month = parse_labelled(shipped("labelled_prompt_completion.jsonl"), "auto")[2]
    assert turns(month.texts[0]) == [
        ("system", "Answer with a single word."),
        ("user", "Which month follows August?"),
        ("assistant", "September"),
    ]


# what pairs become ---------------------------------------------------------------------------

HH = "\n\nHuman: Why?\n\nAssistant: {}"


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASK], "chosen": GOOD, "rejected": BAD},
        {"prompt": [ASK], "chosen": "Because.", "rejected": "No."},
        {"prompt": [ASK], "chosen": speak("gpt", "Because."), "rejected": [speak("gpt", "No.")]},
        {"prompt": "Why?", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Why?", "chosen": GOOD, "rejected": "No."},
        {"prompt": "Why?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": "something else", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": [ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": None, "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {
            "chosen": [speak("human", "Why?"), speak("gpt", "Because.")],
            "rejected": [speak("human", "Why?"), speak("gpt", "No.")],
        },
        {"instruction": "Why?", "chosen": "Because.", "rejected": "No."},
        {"instruction": "Why?", "input": "", "chosen": "Because.", "rejected": "No."},
        {
            "conversations": [speak("human", "Why?")],
            "chosen": speak("gpt", "Because."),
            "rejected": speak("gpt", "No."),
        },
        {
            "conversations": [speak("human", "Why?")],
            "chosen": [speak("gpt", "Because.")],
            "rejected": [speak("gpt", "No.")],
        },
        {"conversations": [speak("human", "Why?")], "chosen": "Because.", "rejected": "No."},
        {"conversations": [ASK], "chosen": GOOD, "rejected": BAD},
        {"chosen": HH.format("Because."), "rejected": HH.format("No.")},
        {"chosen": HH.format(" Because.\n"), "rejected": HH.format("No.\n\n")},
        {"chosen": HH.format("Because.").lstrip(), "rejected": HH.format("No.").lstrip()},
        {"chosen": "\n " + HH.format("Because."), "rejected": " " + HH.format("No.").lstrip()},
    ],
)
def test_every_way_to_write_the_same_pair(values: dict[str, Any]) -> None:
    found = pair(values)
    assert turns(found.texts[0]) == [("user", "Why?"), ("assistant", "Because.")]
    assert turns(found.texts[1]) == [("user", "Why?"), ("assistant", "No.")]
    assert (trained(found.texts[0]), trained(found.texts[1])) == (["Because."], ["No."])
    assert (found.margin, found.place) == (0.0, PLACE)


@pytest.mark.parametrize(
    ("values", "prompt"),
    [
        (
            {"prompt": [SYSTEM, ASK], "chosen": [GOOD], "rejected": [BAD]},
            [("system", "Be kind."), ("user", "Why?")],
        ),
        (
            {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD], "system": "Be kind."},
            [("system", "Be kind."), ("user", "Why?")],
        ),
        (
            {"chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, BAD]},
            [("system", "Be kind."), ("user", "Why?")],
        ),
        (
            {"prompt": [ASK, BAD, ASK], "chosen": [GOOD], "rejected": [BAD]},
            talk("Why?", "No.", "Why?"),
        ),
        (
            {"chosen": [ASK, BAD, ASK, GOOD], "rejected": [ASK, BAD, ASK, BAD]},
            talk("Why?", "No.", "Why?"),
        ),
        (
            {
                "instruction": "Add",
                "input": "1, 2",
                "history": [["Why?", "No."]],
                "system": "Sum.",
                "chosen": "Because.",
                "rejected": "No.",
            },
            [("system", "Sum."), *talk("Why?", "No.", "Add\n\n1, 2")],
        ),
        (
            {
                "conversations": [
                    speak("system", "Be kind."),
                    *(speak("human", "Why?"), speak("gpt", "No."), speak("human", "Why?")),
                ],
                "chosen": speak("gpt", "Because."),
                "rejected": speak("gpt", "No."),
            },
            [("system", "Be kind."), *talk("Why?", "No.", "Why?")],
        ),
        (
            {
                "chosen": "\n\nHuman: A\n\nAssistant: B\n\nHuman: C" + HH.format("Because."),
                "rejected": "\n\nHuman: A\n\nAssistant: B\n\nHuman: C" + HH.format("No."),
            },
            # Two turns of one speaker in a row are one turn in two paragraphs.
            talk("A", "B", "C\n\nWhy?"),
        ),
        (
            {
                "chosen": "\n\nHuman: A\n\nAssistant: B\n\nAssistant: C\n\nHuman: "
                "D: Human: no turn\n\n\nE\n\nAssistant: Because.",
                "rejected": "\n\nHuman: A\n\nAssistant: B\n\nAssistant: C\n\nHuman: "
                "D: Human: no turn\n\n\nE\n\nAssistant: No.",
            },
            talk("A", "B\n\nC", "D: Human: no turn\n\n\nE"),
        ),
    ],
)
def test_only_what_differs_is_an_answer(values: dict[str, Any], prompt: Turns) -> None:
    found = pair(values)
    assert turns(found.texts[0]) == [*prompt, ("assistant", "Because.")]
    assert turns(found.texts[1]) == [*prompt, ("assistant", "No.")]
    # Answers in the prompt are context of both sides.
    assert (trained(found.texts[0]), trained(found.texts[1])) == (["Because."], ["No."])


def test_an_answer_may_go_on_for_several_turns() -> None:
    ends = {"chosen": [ASK, GOOD, ASK, BAD], "rejected": [ASK, BAD]}
    found = pair(ends)
    assert turns(found.texts[0]) == talk("Why?", "Because.", "Why?", "No.")
    assert trained(found.texts[0]) == ["Because.", "No."]
    assert turns(found.texts[1]) == talk("Why?", "No.")
    assert pair({"prompt": [ASK], "chosen": [GOOD, ASK, BAD], "rejected": BAD}) == found


def test_text_pairs_are_plain_text() -> None:
    values = {"prompt": "1+1=", "chosen": "2", "rejected": " 3\n", "system": "Sum."}
    texts = tuple(Completion("1+1=", text, PLACE, ("system",)) for text in ("2", " 3\n"))
    assert pair(values) == Example(texts, (Role.CHOSEN, Role.REJECTED), PLACE)
    assert pair({"prompt": "", "chosen": "2", "rejected": "3"}).texts[0].prompt == ""


BEGUN = say("assistant", '{"answer":')


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": [ASK, BEGUN], "chosen": [say("assistant", " 4}")]},
        {"conversations": [ASK, BEGUN], "chosen": speak("gpt", " 4}")},
    ],
)
def test_completions_go_on_from_the_beginning_that_the_prompt_has(values: dict[str, Any]) -> None:
    chosen, rejected = pair(values | {"rejected": [say("assistant", " four")]}).texts
    assert turns(chosen) == talk("Why?", '{"answer": 4}')
    assert turns(rejected) == talk("Why?", '{"answer": four')
    for text in (chosen, rejected):
        assert isinstance(text, Conversation)
        assert (text.context, text.messages[-1].given) == (1, len('{"answer":'))


def test_text_that_begins_with_human_and_has_a_prompt_is_no_dialogue() -> None:
    found = pair({"prompt": "Q", "chosen": HH.format("a"), "rejected": HH.format("b")})
    assert found.texts[0] == Completion("Q", HH.format("a"), PLACE)


def test_tools_belong_to_both_sides() -> None:
    schema = {"type": "function", "function": {"name": "look", "parameters": {}}}
    found = pair({"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD], "tools": [schema]})
    assert found.texts[0].tools == found.texts[1].tools == (schema,)


def test_a_call_is_an_answer() -> None:
    call = {"name": "look", "arguments": {}}
    found = pair(
        {
            "prompt": [ASK],
            "chosen": [{"role": "assistant", "content": None, "tool_calls": [call]}],
            "rejected": [BAD],
        }
    )
    (parsed,) = found.texts[0].messages[-1].tool_calls
    assert parsed == {"type": "function", "function": call}
    assert found.texts[0].messages[-1] == Message("assistant", "", (parsed,))


@pytest.mark.parametrize(
    ("more", "margin"),
    [
        ({}, 0.0),
        ({"margin": None}, 0.0),
        ({"margin": 0}, 0.0),
        ({"margin": 0.0}, 0.0),
        ({"margin": 2}, 2.0),
        ({"margin": 0.25}, 0.25),
        ({"margin": -1.5}, -1.5),
    ],
)
def test_margin(more: dict[str, Any], margin: float) -> None:
    for values in (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
    ):
        found = pair(values | more).margin
        assert (found, type(found)) == (margin, float)


@pytest.mark.parametrize(
    ("margin", "shown"),
    [
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (-float("inf"), "-inf"),
        ("2", "'2'"),
        ("", "''"),
        (True, "True"),
        (False, "False"),
        ([], "[]"),
        ([1], "[1]"),
    ],
)
def test_margin_that_is_no_number(margin: Any, shown: str) -> None:
    values = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": margin}
    hint = "hint: write a finite number, or remove `margin`"
    assert failure(pair, values) == f"{PLACE}: margin must be a number, got {shown}\n{hint}"


def test_the_format_of_pairs_is_that_of_the_first_row() -> None:
    rows = [
        Row({"chosen": HH.format("a"), "rejected": HH.format("b")}, "r:1"),
        Row({"prompt": "x", "chosen": "a", "rejected": "b"}, "r:2"),
    ]
    with pytest.raises(DataError) as caught:
        parse_pairs(rows, "auto")
    assert str(caught.value) == (
        "r:2: `chosen` is not a dialogue of Human: and Assistant: turns\n"
        r"hint: as in \n\nHuman: question\n\nAssistant: answer"
    )


# pairs that say nothing ----------------------------------------------------------------------

EQUAL = "the two answers are equal"
OTHER_PROMPT = "the two answers follow different prompts"
EMPTY = "an answer is empty"
OPEN_END = "the last turn is not the assistant's"
OTHER = say("user", "How?")

UNUSABLE: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, EQUAL),
    ({"prompt": [ASK], "chosen": [GOOD], "rejected": [GOOD]}, EQUAL),
    ({"prompt": [ASK], "chosen": GOOD, "rejected": "Because."}, EQUAL),
    ({"chosen": [ASK, GOOD], "rejected": [ASK, GOOD]}, EQUAL),
    ({"chosen": HH.format("a"), "rejected": HH.format(" a ")}, EQUAL),
    ({"prompt": [ASK], "chosen": "", "rejected": ""}, EQUAL),
    ({"chosen": [ASK, GOOD], "rejected": [OTHER, BAD]}, OTHER_PROMPT),
    ({"chosen": [SYSTEM, ASK, GOOD], "rejected": [ASK, BAD]}, OTHER_PROMPT),
    ({"prompt": "Why?", "chosen": [ASK, GOOD], "rejected": [OTHER, BAD]}, OTHER_PROMPT),
    ({"chosen": [ASK, GOOD, ASK, GOOD], "rejected": [ASK, GOOD, OTHER, BAD]}, OTHER_PROMPT),
    ({"chosen": [ASK, GOOD, ASK, BAD], "rejected": [ASK, GOOD]}, OTHER_PROMPT),
    (
        {"chosen": HH.format("a"), "rejected": "\n\nHuman: How?\n\nAssistant: b"},
        OTHER_PROMPT,
    ),
    ({"prompt": [ASK], "chosen": [], "rejected": [BAD]}, OTHER_PROMPT),
    ({"prompt": "a", "chosen": "", "rejected": "c"}, EMPTY),
    ({"prompt": "a", "chosen": "b", "rejected": " \n"}, EMPTY),
    ({"prompt": "a", "chosen": "", "rejected": ""}, EMPTY),
    ({"prompt": [ASK], "chosen": [say("assistant", " ")], "rejected": [BAD]}, EMPTY),
    ({"prompt": [ASK], "chosen": [GOOD], "rejected": [say("assistant", None)]}, EMPTY),
    ({"chosen": HH.format("a"), "rejected": HH.format("")}, EMPTY),
    (
        {"instruction": "Why?", "chosen": "", "rejected": "No."},
        EMPTY,
    ),
    (
        {
            "conversations": [speak("human", "Why?")],
            "chosen": speak("gpt", "Because."),
            "rejected": speak("gpt", ""),
        },
        EMPTY,
    ),
    ({"prompt": [ASK], "chosen": [GOOD, ASK], "rejected": [BAD]}, OPEN_END),
    ({"chosen": [ASK, GOOD], "rejected": [ASK, BAD, OTHER]}, OPEN_END),
    ({"chosen": HH.format("a"), "rejected": HH.format("b\n\nHuman: c")}, OPEN_END),
]


@pytest.mark.parametrize(("values", "reason"), UNUSABLE)
def test_unusable_pairs(values: dict[str, Any], reason: str) -> None:
    assert pair(values) == unusable(reason)
    assert labelled(values) == [unusable(reason)]


@pytest.mark.parametrize("kind", ["pairs", "labelled"])
def test_unusable_rows_are_dropped_and_counted(kind: Any) -> None:
    good: dict[str, Any] = {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}
    rows = [
        good,
        good | {"chosen": [BAD]},
        good | {"chosen": [BAD], "margin": 1},
        good | {"rejected": [say("assistant", "")]},
        good | {"rejected": [BAD, ASK]},
        good | {"chosen": [ASK, GOOD], "rejected": [OTHER, BAD]},
    ]
    parsed = parse_rows(
        [Row(values, f"r:{n}") for n, values in enumerate(rows, start=1)], "preference", kind
    )
    settings = TokenizeSettings(100, "error", rows=kind)
    documents, report = tokenize_examples(parsed, tiny_tokenizer("qwen"), settings)
    used = 1 if kind == "pairs" else 2
    assert [parsed[document.row].place for document in documents] == ["r:1"] * used
    assert (report.rows, report.kept, len(report.lengths)) == (used + 5, used, used)
    assert report.dropped == {EQUAL: 2, EMPTY: 1, OPEN_END: 1, OTHER_PROMPT: 1}
    assert report.lines() == [
        f"{used} of {used + 5} rows used",
        f"2 rows dropped: {EQUAL} (r:2, r:3)",
        f"1 rows dropped: {EMPTY} (r:4)",
        f"1 rows dropped: {OPEN_END} (r:5)",
        f"1 rows dropped: {OTHER_PROMPT} (r:6)",
    ]


def test_answers_that_only_the_template_makes_equal_are_dropped() -> None:
    # Llama 3's template strips what a turn says.
    rows = [Row({"prompt": [ASK], "chosen": "Because.", "rejected": " Because.\n"}, "r:7")]
    found = parse_pairs(rows, "auto")
    assert len(found[0].texts) == 2
    settings = TokenizeSettings(100, "error", rows="pairs")
    documents, report = tokenize_examples(found, tiny_tokenizer("llama3"), settings)
    assert documents == []
    assert (report.dropped, report.examples[EQUAL]) == ({EQUAL: 1}, ["r:7"])


# pairs that are refused ----------------------------------------------------------------------

NO_PAIR = (
    "\nhint: pairs are prompt, chosen, rejected | conversations, chosen, rejected | chosen, "
    "rejected; rename with columns, as in columns: {chosen: better, rejected: worse}"
)


@pytest.mark.parametrize(
    ("row_format", "values", "message"),
    [
        (
            "auto",
            {"prompt": "a", "completion": "b"},
            f"{PLACE}: the row is not a preference pair: its keys are prompt, completion{NO_PAIR}",
        ),
        (
            "auto",
            {"messages": [ASK, GOOD], "label": True},
            f"{PLACE}: the row is not a preference pair: its keys are messages, label{NO_PAIR}",
        ),
        (
            "auto",
            {"prompt": "a", "chosen": "b"},
            f"{PLACE}: the row has no rejected answer: `rejected` is missing\n"
            "hint: every pair needs both answers; the row's keys are prompt, chosen",
        ),
        (
            "auto",
            {"prompt": "a", "rejected": "b"},
            f"{PLACE}: the row has no chosen answer: `chosen` is missing\n"
            "hint: every pair needs both answers; the row's keys are prompt, rejected",
        ),
        (
            "auto",
            {"prompt": "a", "chosen": "b", "rejected": None},
            f"{PLACE}: the row has no rejected answer: `rejected` is null\n"
            "hint: every pair needs both answers; the row's keys are prompt, chosen, rejected",
        ),
        (
            "preference",
            {"prompt": "a", "chosen": None, "rejected": "b"},
            f"{PLACE}: the row has no chosen answer: `chosen` is null\n"
            "hint: every pair needs both answers; the row's keys are prompt, chosen, rejected",
        ),
        (
            "sharegpt_preference",
            {"chosen": GOOD, "rejected": BAD},
            f"{PLACE}: the row has no `conversations`\n"
            "hint: its keys are chosen, rejected; rename with columns, as in columns: "
            "{conversations: ...}",
        ),
        (
            "auto",
            {"chosen": "b", "rejected": "c"},
            f"{PLACE}: the row has no `prompt`\n"
            "hint: text pairs need one; whole conversations are lists of messages, or texts that "
            "begin with Human:",
        ),
        (
            "auto",
            {"prompt": 3, "chosen": "b", "rejected": "c"},
            f"{PLACE}: `prompt` must be a list, got int\n"
            "hint: change the value, or name another column, as in columns: {prompt: ...}",
        ),
        (
            "auto",
            {"prompt": [ASK], "chosen": 3, "rejected": "c"},
            f"{PLACE}: `chosen` must be a list, got int\n"
            "hint: change the value, or name another column, as in columns: {chosen: ...}",
        ),
        (
            "auto",
            {"prompt": [ASK], "chosen": {"text": "b"}, "rejected": "c"},
            f"{PLACE}: messages[0] has no `role`\n"
            'hint: as in {"role": "user", "content": "Hello"}',
        ),
        (
            "hh",
            {"chosen": "Why?", "rejected": HH.format("a")},
            f"{PLACE}: `chosen` is not a dialogue of Human: and Assistant: turns\n"
            r"hint: as in \n\nHuman: question\n\nAssistant: answer",
        ),
        (
            "auto",
            {"chosen": HH.format("a"), "rejected": "Oh. " + HH.format("a")},
            f"{PLACE}: `rejected` is not a dialogue of Human: and Assistant: turns\n"
            r"hint: as in \n\nHuman: question\n\nAssistant: answer",
        ),
        (
            "messages",
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            f"{PLACE}: format messages has single answers, and pairs are wanted here\n"
            "hint: formats of pairs: preference, sharegpt_preference, hh",
        ),
    ],
)
def test_pairs_that_are_refused(row_format: str, values: dict[str, Any], message: str) -> None:
    assert failure(pair, values, row_format) == message


def test_a_null_answer_in_a_later_row_is_refused_at_its_line() -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    rows = [Row(good, "r:1"), Row(good, "r:2"), Row(good | {"rejected": None}, "r:3")]
    for parse in (parse_pairs, parse_labelled):
        with pytest.raises(DataError, match=r"^r:3: the row has no rejected answer: `rejected` is"):
            parse(rows, "auto")


def test_pairs_are_no_single_answers() -> None:
    with pytest.raises(DataError) as caught:
        parse_rows([Row({"chosen": "a", "rejected": "b"}, PLACE)], "hh", "answers")
    assert str(caught.value) == (
        f"{PLACE}: format hh is one of preference pairs, and single answers are wanted here\n"
        "hint: formats of single answers: messages, sharegpt, alpaca, prompt_completion, text"
    )


# labelled rows -------------------------------------------------------------------------------


@pytest.mark.parametrize("role", [Role.CHOSEN, Role.REJECTED])
@pytest.mark.parametrize(
    "values",
    [
        {"messages": [ASK, GOOD]},
        {"conversations": [speak("human", "Why?"), speak("gpt", "Because.")]},
        {"prompt": [ASK], "completion": [GOOD]},
        {"instruction": "Why?", "output": "Because."},
    ],
)
def test_labelled_conversations(values: dict[str, Any], role: Role) -> None:
    (found,) = labelled(values | {"label": role is Role.CHOSEN})
    assert (found.roles, found.place) == ((role,), PLACE)
    assert turns(found.texts[0]) == talk("Why?", "Because.")
    assert trained(found.texts[0]) == ["Because."]


def test_labelled_text() -> None:
    (found,) = labelled({"prompt": "1+1=", "completion": "2", "label": False})
    assert found == label(Completion("1+1=", "2", PLACE), Role.REJECTED)
    (found,) = labelled({"text": "Once.", "label": True})
    assert found == label(Completion("", "Once.", PLACE), Role.CHOSEN)


def test_only_the_last_turn_is_labelled() -> None:
    (found,) = labelled({"messages": [ASK, BAD, ASK, GOOD], "label": True})
    assert turns(found.texts[0]) == talk("Why?", "No.", "Why?", "Because.")
    assert trained(found.texts[0]) == ["Because."]
    (weighed,) = labelled({"messages": [ASK, BAD, ASK, GOOD | {"weight": 0}], "label": True})
    assert weighed == found  # a weight is about supervised fine-tuning


def test_a_labelled_row_that_ends_with_the_user_is_unusable() -> None:
    values = {"messages": [ASK, GOOD, ASK], "label": True}
    assert labelled(values) == [unusable(OPEN_END)]


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        (1, "1"),
        (0, "0"),
        ("yes", "'yes'"),
        ("true", "'true'"),
        (None, "None"),
        (1.0, "1.0"),
        ([], "[]"),
    ],
)
def test_label_that_is_no_boolean(label: Any, shown: str) -> None:
    assert failure(labelled, {"messages": [ASK, GOOD], "label": label}) == (
        f"{PLACE}: label must be true or false, got {shown}\n"
        "hint: true marks a desirable answer, false an undesirable one"
    )


NO_LABEL = (
    f"{PLACE}: the row has no `label`\n"
    "hint: labelled rows are prompt, completion, label (true or false) | messages, label; pairs "
    "(prompt, chosen, rejected) are split; rename with columns"
)


@pytest.mark.parametrize(
    ("row_format", "values"),
    [
        ("auto", {"messages": [ASK, GOOD]}),
        ("messages", {"messages": [ASK, GOOD]}),
        ("auto", {"prompt": "a", "completion": "b", "score": True}),
        ("auto", {"prompt": "a", "rejected": "b"}),
    ],
)
def test_no_label(row_format: str, values: dict[str, Any]) -> None:
    assert failure(labelled, values, row_format) == NO_LABEL


def test_a_later_row_without_label_is_refused_at_its_line() -> None:
    rows = [Row({"text": "a", "label": True}, "r:1"), Row({"text": "a"}, "r:2")]
    with pytest.raises(DataError) as caught:
        parse_labelled(rows, "auto")
    assert str(caught.value) == (
        "r:2: label must be true or false, got None\n"
        "hint: true marks a desirable answer, false an undesirable one"
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"question": "a", "label": True},
            f"{PLACE}: no known row format has the keys question, label\n"
            "hint: rows are messages | conversations | instruction, output | prompt, completion | "
            "text; rename with columns, as in columns: {prompt: question, completion: answer}",
        ),
        (
            {"messages": [ASK], "label": True},
            f"{PLACE}: the row has no answer: no assistant turn to train on\n"
            "hint: remove the row, or add the assistant's turn",
        ),
        (
            {"prompt": "a", "completion": " ", "label": False},
            f"{PLACE}: the row has no answer: completion is empty\n"
            "hint: remove the row, or write the completion",
        ),
    ],
)
def test_labelled_rows_that_are_refused(values: dict[str, Any], message: str) -> None:
    assert failure(labelled, values) == message


# pairs as labelled rows ----------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED_PAIRS)
def test_a_pair_counts_as_a_good_and_a_bad_answer(name: str) -> None:
    rows = shipped(name)
    pairs = parse_pairs(rows, "auto")
    expected = []
    for found in pairs:
        chosen, rejected = found.texts
        expected.append(label(chosen, Role.CHOSEN, found.place))
        expected.append(label(rejected, Role.REJECTED, found.place))
    assert parse_labelled(rows, "auto") == expected
    assert parse_labelled(rows, SHIPPED_PAIRS[name]) == expected


def test_a_label_beside_a_pair_is_not_read() -> None:
    values = {"prompt": "a", "chosen": "b", "rejected": "c", "label": "good"}
    found: Sequence[Any] = labelled(values)
    assert [(item.texts[0].completion, item.roles) for item in found] == [
        ("b", (Role.CHOSEN,)),
        ("c", (Role.REJECTED,)),
    ]


@pytest.mark.parametrize(("kind", "roles"), [("pairs", [[0, 1]] * 2), ("labelled", [[0], [1]] * 2)])
def test_roles_of_the_documents(kind: Any, roles: list[list[int]]) -> None:
    values = {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD], "margin": 2.0}
    parsed = parse_rows([Row(values, "r:1"), Row(values, "r:2")], "auto", kind)
    settings = TokenizeSettings(100, "error", rows=kind)
    tokenizer = tiny_tokenizer("qwen")
    documents, _ = tokenize_examples(parsed, tokenizer, settings)
    assert [[branch.role for branch in document.branches] for document in documents] == roles
    answers = {Role.CHOSEN: "Because.<|im_end|>", Role.REJECTED: "No.<|im_end|>"}
    for document in documents:
        for branch in document.branches:
            assert tokenizer.decode(branch.ids) == answers[branch.role]
        assert document.margin == (2.0 if kind == "pairs" else 0.0)


def test_a_note_counts_a_row_once_whatever_its_completions() -> None:
    rows = [
        Row({"system": "S", "prompt": f"{n}?", "chosen": " a b", "rejected": " c"}, f"r.jsonl:{n}")
        for n in (1, 2)
    ]
    settings = TokenizeSettings(64, "drop", rows="pairs")
    _, report = tokenize_examples(parse_pairs(rows, "auto"), tiny_tokenizer(), settings)
    (noted,) = [key for key in report.notes if "`system` is left out" in key]
    assert report.notes[noted] == 2
    assert report.examples[noted] == ["r.jsonl:1", "r.jsonl:2"]
