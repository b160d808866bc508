"""The `reward` section of PPO recipes: models, functions, servers and rules."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    Discriminator,
    Field,
    GetPydanticSchema,
    Tag,
    ValidationInfo,
    field_serializer,
    field_validator,
)

from alignkit.recipe.addresses import without_query
from alignkit.recipe.section import PositiveInt, Section

_FUNCTION = r"^.+\.py:[A-Za-z_]\w*$"
_URL = r"^https?://[^/]"


def _function(value: str) -> str:
    if not re.match(_FUNCTION, value):
        raise ValueError("must name a Python file and a function in it, as in rewards.py:score")
    return value


def _url(value: str) -> str:
    try:
        parts = urlsplit(value)
        known = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is not a number, an unclosed bracket
        known = False
    if not known or not re.match(_URL, value) or re.search(r"\s", value):
        raise ValueError("must be an address, as in http://localhost:8000/score")
    if parts.username is not None:
        raise ValueError("must not hold a user name or password")
    return value


def _pattern(value: str) -> str:
    try:
        re.compile(value, re.DOTALL)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is not a regular expression ({error})") from None
    return value


Pattern = Annotated[str, Field(min_length=1), AfterValidator(_pattern)]
Column = Annotated[str, Field(min_length=1)]
Weight = Annotated[float, Field(allow_inf_nan=False)]
Timeout = Annotated[float, Field(gt=0.0, le=86400.0)]


class ModelReward(Section):
    """A reward model."""

    model: Annotated[str, Field(min_length=1)]
    """Run of the reward stage, or its adapter/ or merged/ folder."""
    weight: Weight = 1.0
    """Factor in the sum of all rewards."""
    normalize: bool = True
    """Subtract the mean and divide by the standard deviation, as measured by the reward run."""
    separate: bool = False
    """Load it as a separate model, for one trained over another base with the same tokenizer."""


class FunctionReward(Section):
    """A Python function."""

    function: Annotated[
        str, AfterValidator(_function), Field(json_schema_extra={"pattern": _FUNCTION})
    ]
    """`file.py:name`, called as name(prompts, completions, **columns) -> list of numbers."""
    weight: Weight = 1.0
    """Factor in the sum of all rewards."""
    timeout: Timeout = 600.0
    """Seconds that one call may take; it runs in a process of its own."""


class UrlReward(Section):
    """A server."""

    url: Annotated[str, AfterValidator(_url), Field(json_schema_extra={"pattern": _URL})]
    """Receives {"prompts", "completions", "columns"} as JSON and returns {"scores": [...]}. Its
    query is not stored with the run."""
    weight: Weight = 1.0
    """Factor in the sum of all rewards."""
    timeout: Timeout = 60.0
    """Seconds that one call may take, from the first try to the last byte of the answer."""

    @field_serializer("url")
    def _stored(self, value: str) -> str:
        return without_query(value)


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


class RegexReward(Section):
    """1 if a pattern is found in the response."""

    rule: Literal["regex"]
    """`regex`: 1 if `pattern` is found anywhere in the response, else 0."""
    pattern: Pattern
    """Python regular expression; the dot matches line breaks."""
    weight: Weight = 1.0
    """Factor in the sum of all rewards."""
    timeout: Timeout = 60.0
    """Seconds that the responses of one call may take; it runs in a process of its own."""


class FormatReward(Section):
    """1 if the whole response matches a pattern."""

    rule: Literal["format"]
    """`format`: 1 if the whole response, without surrounding spaces, matches `pattern`, else 0."""
    pattern: Pattern
    """Python regular expression; the dot matches line breaks."""
    weight: Weight = 1.0
    """Factor in the sum of all rewards."""
    timeout: Timeout = 60.0
    """Seconds that the responses of one call may take; it runs in a process of its own."""


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


class SentimentReward(Section):
    """How positive the response is, from -1 to 1."""

    rule: Literal["sentiment"]
    """`sentiment`: the compound score of the VADER lexicon for English
    (https://ojs.aaai.org/index.php/ICWSM/article/view/14550); needs `alignkit[sentiment]`."""
    weight: Weight = 1.0
    """Factor in the sum of all rewards; a negative one asks for negative responses."""


RuleReward = (
    ExactReward
    | NumericReward
    | RegexReward
    | FormatReward
    | LengthReward
    | JsonReward
    | SentimentReward
)
"""A reward computed by one of alignkit's rules, which `rule` names."""

SOURCE_TAGS: dict[type[BaseModel], str] = {
    ModelReward: "reward:model",
    FunctionReward: "reward:function",
    UrlReward: "reward:url",
    ExactReward: "reward:exact",
    NumericReward: "reward:numeric",
    RegexReward: "reward:regex",
    FormatReward: "reward:format",
    LengthReward: "reward:length",
    JsonReward: "reward:json",
    SentimentReward: "reward:sentiment",
}
"""Section -> its tag in pydantic's locations; recipe keys contain no colon."""

SOURCE_KEYS = ("model", "function", "url", "rule")
"""A reward source has exactly one of these keys."""

RULES = tuple(
    tag.removeprefix("reward:") for kind, tag in SOURCE_TAGS.items() if "rule" in kind.model_fields
)
"""Names of the rules."""


def _source_tag(value: Any) -> str | None:
    """Tag of the source that a mapping describes; None if it is not exactly one."""
    if not isinstance(value, dict):
        return SOURCE_TAGS.get(type(value))
    named = [key for key in SOURCE_KEYS if key in value]
    if named == ["rule"]:
        return f"reward:{value['rule']}" if value["rule"] in RULES else None
    return f"reward:{named[0]}" if len(named) == 1 else None


def _shape_tag(value: Any) -> str | None:
    if isinstance(value, dict | Section):
        return "reward:one"
    return "reward:list" if isinstance(value, list | tuple) else None


RewardSource = Annotated[
    Annotated[ModelReward, Tag("reward:model")]
    | Annotated[FunctionReward, Tag("reward:function")]
    | Annotated[UrlReward, Tag("reward:url")]
    | Annotated[ExactReward, Tag("reward:exact")]
    | Annotated[NumericReward, Tag("reward:numeric")]
    | Annotated[RegexReward, Tag("reward:regex")]
    | Annotated[FormatReward, Tag("reward:format")]
    | Annotated[LengthReward, Tag("reward:length")]
    | Annotated[JsonReward, Tag("reward:json")]
    | Annotated[SentimentReward, Tag("reward:sentiment")],
    Discriminator(
        _source_tag,
        custom_error_type="reward_source",
        custom_error_message="must be a mapping with one of model, function, url or rule",
    ),
]

_OneOrMore = Annotated[
    Annotated[RewardSource, Tag("reward:one")]
    | Annotated[tuple[RewardSource, ...], Field(min_length=1), Tag("reward:list")],
    Discriminator(
        _shape_tag,
        custom_error_type="reward_sources",
        custom_error_message="must be a mapping or a list of mappings",
    ),
    AfterValidator(lambda value: value if isinstance(value, tuple) else (value,)),
]

RewardSources = Annotated[
    tuple[RewardSource, ...],
    # a union instead of a before-validator, whose Python output strict mode would refuse
    GetPydanticSchema(lambda _, handler: handler.generate_schema(_OneOrMore)),
]
"""One source, or a list whose weighted scores are added up; a tuple after validation."""


def reward_name(source: RewardSource) -> str:
    """Short name of a source for metrics: `reward/<name>`."""
    if isinstance(source, ModelReward):
        return "model"
    if isinstance(source, FunctionReward):
        return source.function.rpartition(":")[2]
    return "url" if isinstance(source, UrlReward) else source.rule
