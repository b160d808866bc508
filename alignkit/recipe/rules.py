"""Rewards that a rule computes from the response and its row; evaluation measures by them too."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from alignkit.recipe.section import PositiveInt, Section


def _pattern(value: str) -> str:
    try:
        re.compile(value, re.DOTALL)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is not a regular expression ({error})") from None
    return value


Pattern = Annotated[str, Field(min_length=1), AfterValidator(_pattern)]
Column = Annotated[str, Field(min_length=1)]
Weight = Annotated[float, Field(allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z][\w-]{0,39}$")] | None
Timeout = Annotated[float, Field(gt=0.0, le=86400.0)]


class ExactReward(Section):
    """1 if the response is the answer in a column."""

    rule: Literal["exact"]
    """`exact`: 1 if the response is the text in `column`, else 0."""
    column: Column = "answer"
    """Column of the row that holds the correct answer."""
    ignore_case: bool = True
    """Ignore case, surrounding spaces and a full stop at the end."""
    weight: Weight = 1.0
    """Factor in the sum of all rewards."""
    name: Name = None
    """`reward/<name>` in the metrics."""


class NumericReward(Section):
    """1 if the response's last number is the correct one, as in GSM8K."""

    rule: Literal["numeric"]
    """`numeric`: 1 if the last number of the response equals that of `column`, else 0."""
    column: Column = "answer"
    """Column that holds the correct answer; if it contains `####`, only what follows counts."""
    tolerance: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    """Accepted difference, relative to the correct number."""
    weight: Weight = 1.0
    """Factor in the sum of all rewards."""
    name: Name = None
    """`reward/<name>` in the metrics."""


class RegexReward(Section):
    """1 if a pattern is found in the response."""

    rule: Literal["regex"]
    """`regex`: 1 if `pattern` is found anywhere in the response, else 0."""
    pattern: Pattern
    """Python regular expression; the dot matches line breaks."""
    weight: Weight = 1.0
    """Factor in the sum of all rewards."""
    name: Name = None
    """`reward/<name>` in the metrics."""
    timeout: Timeout = 60.0
    """Seconds that the responses of one call may take."""


class FormatReward(Section):
    """1 if the whole response matches a pattern."""

    rule: Literal["format"]
    """`format`: 1 if the whole response, without surrounding spaces, matches `pattern`, else 0."""
    pattern: Pattern
    """Python regular expression; the dot matches line breaks."""
    weight: Weight = 1.0
    """Factor in the sum of all rewards."""
    name: Name = None
    """`reward/<name>` in the metrics."""
    timeout: Timeout = 60.0
    """Seconds that the responses of one call may take."""


class LengthReward(Section):
    """1 within a range of lengths, falling to 0 outside."""

    rule: Literal["length"]
    """`length`: 1 from `min` to `max`; outside, 1 minus the relative distance, at least 0."""
    min: Annotated[int, Field(ge=0)] = 0
    """Shortest length that scores 1."""
    max: PositiveInt
    """Longest length that scores 1."""
    unit: Literal["words", "characters"] = "words"
    """Unit of the length."""
    weight: Weight = 1.0
    """Factor in the sum of all rewards."""
    name: Name = None
    """`reward/<name>` in the metrics."""

    @field_validator("max")
    @classmethod
    def _ordered(cls, value: int, info: ValidationInfo) -> int:
        if value < info.data.get("min", 0):
            raise ValueError(f"must be at least min = {info.data['min']}")
        return value


class JsonReward(Section):
    """1 if the response is valid JSON."""

    rule: Literal["json"]
    """`json`: 1 if the response is one JSON value, else 0; a code fence around it is allowed."""
    keys: tuple[str, ...] = ()
    """The value must be an object with these keys."""
    weight: Weight = 1.0
    """Factor in the sum of all rewards."""
    name: Name = None
    """`reward/<name>` in the metrics."""


class SentimentReward(Section):
    """How positive the response is, from -1 to 1."""

    rule: Literal["sentiment"]
    """`sentiment`: the compound score of the VADER lexicon for English
    (https://ojs.aaai.org/index.php/ICWSM/article/view/14550); needs `alignkit[sentiment]`."""
    weight: Weight = 1.0
    """Factor in the sum of all rewards; a negative one asks for negative responses."""
    name: Name = None
    """`reward/<name>` in the metrics."""


class MathReward(Section):
    """1 if the response's last expression is the correct one, whatever its form."""

    rule: Literal["math"]
    """`math`: 1 if the last expression of the response equals that of `column`, else 0; fractions,
    LaTeX and sets are compared as such. Needs `alignkit[math]`."""
    column: Column = "answer"
    """Column that holds the correct answer: an expression, LaTeX, or text that ends in one."""
    weight: Weight = 1.0
    """Factor in the sum of all rewards."""
    name: Name = None
    """`reward/<name>` in the metrics."""
    timeout: Timeout = 5.0
    """Seconds that one response may take; one that takes longer is wrong."""


class CodeReward(Section):
    """1 if the response's program passes the row's tests."""

    rule: Literal["code"]
    """`code`: 1 if the last Python block of the response, or all of it, passes the tests of
    `column`, else 0."""
    column: Column = "tests"
    """Column that holds the tests: Python statements, or a list of them, as in MBPP."""
    weight: Weight = 1.0
    """Factor in the sum of all rewards."""
    name: Name = None
    """`reward/<name>` in the metrics."""
    timeout: Timeout = 10.0
    """Seconds that one program with its tests may take."""
    memory: Annotated[float, Field(ge=0.1, le=1024.0)] = 1.0
    """GB that one program and all that it starts may take."""
    confined: bool = True
    """Run programs without network, with all files read-only and without your environment, as Linux
    can; false bounds only time, memory and processes, for a machine that may be lost."""


class JsonSchemaReward(Section):
    """1 if the response is JSON that a schema allows."""

    rule: Literal["json_schema"]
    """`json_schema`: 1 if the response is one JSON value that the schema allows, else 0; a code
    fence around it is allowed. Needs `alignkit[json]`."""
    file: Annotated[str, Field(min_length=1)] | None = None
    """A JSON file with the schema of all rows."""
    column: Column | None = None
    """Column that holds the schema of the row, as an object or as JSON text."""
    weight: Weight = 1.0
    """Factor in the sum of all rewards."""
    name: Name = None
    """`reward/<name>` in the metrics."""
    timeout: Timeout = 60.0
    """Seconds that the responses of one call may take."""

    @model_validator(mode="after")
    def _one_schema(self) -> Self:
        if (self.file is None) == (self.column is None):
            raise ValueError("needs exactly one of file and column")
        return self


RuleReward = (
    ExactReward
    | NumericReward
    | RegexReward
    | FormatReward
    | LengthReward
    | JsonReward
    | SentimentReward
    | MathReward
    | CodeReward
    | JsonSchemaReward
)
"""A reward computed by one of alignkit's rules, which `rule` names."""
