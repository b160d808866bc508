"""Rules as rewards: every score by hand, and what a row must hold for them."""

from __future__ import annotations

import sys
from decimal import Decimal
from typing import Any

import pytest

from alignkit.errors import RewardError
from alignkit.generation.rewards.build import build_score
from alignkit.generation.rewards.responses import Response
from alignkit.generation.rewards.rules import last_number
from alignkit.recipe.rules import (
    ExactReward,
    FormatReward,
    JsonReward,
    LengthReward,
    NumericReward,
    RegexReward,
    RuleReward,
    SentimentReward,
)


def response(completion: str, **columns: Any) -> Response:
    return Response("Why?", completion, columns, "rows.jsonl:7")


def scored(spec: RuleReward, completion: str, **columns: Any) -> float:
    (value,) = build_score(spec)([response(completion, **columns)]).values
    assert isinstance(value, float)
    return value


def fault(spec: RuleReward, completion: str = "x", **columns: Any) -> str:
    with pytest.raises(RewardError) as caught:
        scored(spec, completion, **columns)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("answer", "right", "ignore_case", "expected"),
    [
        ("Paris", "Paris", True, 1),
        (" paris. \n", "Paris", True, 1),
        ("Paris", "PARIS.", True, 1),
        ("Paris .", "paris", True, 1),
        ("STRASSE", "straße", True, 1),  # case is folded, not only lowered
        ("Paris, France", "Paris", True, 0),
        ("", "Paris", True, 0),
        ("paris", "Paris", False, 0),
        ("Paris ", "Paris", False, 0),
        ("Paris.", "Paris", False, 0),
        ("Paris", "Paris", False, 1),
        ("42", 42, True, 1),
        ("4.5", 4.5, True, 1),
        ("42.0", 42, True, 0),
    ],
)
def test_exact(answer: str, right: Any, ignore_case: bool, expected: int) -> None:
    spec = ExactReward(rule="exact", ignore_case=ignore_case)
    assert scored(spec, answer, answer=right) == expected


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234.50", "1234.5"),
        ("$18", "18"),
        ("-3", "-3"),
        ("so the sum is 72.", "72"),
        ("72.50.", "72.5"),
        ("first 5, then 7", "7"),
        ("He has 3 apples and 12 pears!", "12"),
        ("1,234,567", "1234567"),
        ("1,2,3", "3"),  # a list, not 123
        ("12,3456", "3456"),
        ("1234,567", "567"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("−4 °C", "-4"),  # the minus sign of typesetting
        ("10-20", "20"),  # a range
        ("10 - 20", "20"),
        ("x-3", "3"),
        ("(8)-2", "2"),
        ("x = -3", "-3"),
        ("\\boxed{-3}", "-3"),
        ("**-3**", "-3"),
        (".5", "0.5"),
        ("0.10", "0.1"),
        ("50%", "50"),
        ("1e-05", "0.00001"),
        ("2E3", "2000"),
        ("3 eggs", "3"),
        ("3e", "3"),
        ("3/4", "4"),
        ("no number", None),
        ("", None),
        ("...", None),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        ("2 + 2 = 4", "He adds 2 and 2: <<2+2=4>>4\n#### 4", 1),
        ("It costs $1,234.50.", "#### 1234.5", 1),
        ("#### 18", "#### 18", 1),
        ("18 dollars, of which 3 are tax", "#### 18", 0),
        ("none", "#### 0", 0),  # no number is not 0
        ("the answer is 5", "3 and then 5", 1),
        ("5", "#### 5 of 9", 0),  # the last number behind the mark
        ("7", 7, 1),
        ("0.1", 0.1, 1),
        ("0.3", 0.1 + 0.2, 0),  # the column holds 0.30000000000000004, and nothing is rounded
        ("10000000000000000000000000001", "10000000000000000000000000000", 0),
        ("-3", "3", 0),
    ],
)
def test_numeric(answer: str, right: Any, expected: int) -> None:
    assert scored(NumericReward(rule="numeric"), answer, answer=right) == expected


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        ("101", "100", 1),  # |101 - 100| = 0.01 · 100: the limit itself counts
        ("99", "100", 1),
        ("101.01", "100", 0),
        ("-101", "-100", 1),
        ("0.001", "0", 0),  # relative to 0 nothing but 0 is near
    ],
)
def test_numeric_tolerance(answer: str, right: str, expected: int) -> None:
    spec = NumericReward(rule="numeric", column="gold", tolerance=0.01)
    assert scored(spec, answer, gold=right) == expected


def test_patterns() -> None:
    anywhere = RegexReward(rule="regex", pattern=r"\bcat.+dog")
    assert scored(anywhere, "a cat and a dog") == 1
    assert scored(anywhere, "a cat\nand a dog") == 1  # the dot matches line breaks
    assert scored(anywhere, "a Cat and a dog") == 0
    assert scored(anywhere, "concat a dog") == 0
    whole = FormatReward(rule="format", pattern=r"<think>.*</think>\s*<answer>.*</answer>")
    assert scored(whole, " <think>a\nb</think>\n<answer>4</answer>\n") == 1
    assert scored(whole, "Well: <think>a</think><answer>4</answer>") == 0
    assert scored(whole, "<think>a</think><answer>4</answer> there") == 0
    either = FormatReward(rule="format", pattern="yes|no")  # the whole of either
    assert (scored(either, "no"), scored(either, "nobody")) == (1, 0)


@pytest.mark.parametrize("kind", [RegexReward, FormatReward])
def test_a_pattern_that_never_comes_to_an_end(kind: type[RegexReward] | type[FormatReward]) -> None:
    rule: Any = "regex" if kind is RegexReward else "format"
    spec = kind(rule=rule, pattern="(a+)+$", timeout=0.5)
    assert scored(spec, "aaa") == 1
    said = fault(spec, "a" * 64 + "b")
    assert f"the pattern of the reward rule `{rule}` takes more than 0.5 seconds" in said
    assert "hint: repeats inside repeats, as in (a+)+, can be tried in too many ways" in said
    assert scored(spec, "aaa") == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    # from 4 to 10 words earn 1; below, n / 4; above, 1 - (n - 10) / 10
    [(0, 0), (1, 0.25), (3, 0.75), (4, 1), (10, 1), (11, 0.9), (15, 0.5), (20, 0), (50, 0)],
)
def test_length_in_words(words: int, expected: float) -> None:
    spec = LengthReward(rule="length", min=4, max=10)
    assert scored(spec, "  word\n" * words) == pytest.approx(expected, abs=1e-12)


def test_length_in_characters_and_without_a_lower_end() -> None:
    spec = LengthReward(rule="length", max=4, unit="characters")
    assert [scored(spec, text) for text in ("", "abcd", "ab cd", "abcdefg")] == [1, 1, 0.75, 0.25]


@pytest.mark.parametrize(
    ("answer", "keys", "expected"),
    [
        ('{"a": 1}', (), 1),
        (" [1, 2]\n", (), 1),
        ("3", (), 1),
        ('```json\n{"a": 1}\n```', ("a",), 1),
        ('```\n{"a": 1}\n```\n', ("a",), 1),
        ('Here it is:\n```json\n{"a": 1}\n```', (), 0),
        ('{"a": 1} and more', (), 0),
        ('{"a": 1', (), 0),
        ("{'a': 1}", (), 0),
        ("", (), 0),
        ("NaN", (), 0),  # Python reads these two, JSON has neither
        ('{"a": Infinity}', ("a",), 0),
        ('{"a": 1, "b": null}', ("a", "b"), 1),
        ('{"a": 1}', ("a", "b"), 0),
        ('["a", "b"]', ("a",), 0),
        ("9" * 5000, (), 1),  # more digits than Python turns into a number
        ("[" * 100_000, (), 0),
    ],
)
def test_json(answer: str, keys: tuple[str, ...], expected: int) -> None:
    assert scored(JsonReward(rule="json", keys=keys), answer) == expected


def test_sentiment() -> None:
    spec = SentimentReward(rule="sentiment")
    # VADER: a word's valence v gives v / sqrt(v² + 15); good has 1.9, and unknown words 0.
    assert scored(spec, "good") == pytest.approx(1.9 / (1.9**2 + 15) ** 0.5, abs=5e-5)
    assert scored(spec, "the table") == 0
    assert scored(spec, "This is a horrible, ugly, terrible day.") < -0.5


def test_sentiment_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(RewardError) as caught:
        build_score(SentimentReward(rule="sentiment"))  # at the start, not after a rollout
    assert str(caught.value) == (
        "the reward rule `sentiment` needs the package vaderSentiment, which is not installed\n"
        "hint: pip install 'alignkit[sentiment]'"
    )


def test_several_responses_keep_their_order() -> None:
    score = build_score(ExactReward(rule="exact"))
    rows = [response("a", answer="a"), response("a", answer="b"), response("b", answer="b")]
    assert score(rows).values == [1.0, 0.0, 1.0]
    assert score([]).values == []


def test_rows_that_a_rule_cannot_use() -> None:
    exact, numeric = ExactReward(rule="exact"), NumericReward(rule="numeric", column="gold")
    assert fault(exact, prompt="Why?", solution="x") == (
        "rows.jsonl:7: the row has no column 'answer', which the reward rule `exact` "
        "compares with\nhint: its columns are prompt, solution; name one with reward.column"
    )
    assert fault(numeric, answer="x").startswith("rows.jsonl:7: the row has no column 'gold', ")
    for value, shown in ((None, "null"), (True, "True"), (["a"], "['a']")):
        assert fault(exact, answer=value) == (
            "rows.jsonl:7: the reward rule `exact` compares with text or a number, and 'answer' "
            f"is {shown}\nhint: name another column with reward.column, or remove the row"
        )
    assert fault(numeric, gold="none of " + 60 * "these") == (
        "rows.jsonl:7: the reward rule `numeric` finds no number in 'gold': 'none of "
        f"{'these' * 9}the...\n"
        "hint: name another column with reward.column, or remove the row"
    )
    assert "finds no number in 'gold': nan" in fault(numeric, gold=float("nan"))
    assert "finds no number in 'gold': '5 ####'" in fault(numeric, gold="5 ####")
