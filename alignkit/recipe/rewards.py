"""The `reward` section: models, functions, servers, judges and rules."""

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
    field_serializer,
)

from alignkit.recipe.addresses import without_query
from alignkit.recipe.rules import (
    CodeReward,
    ExactReward,
    FormatReward,
    JsonReward,
    JsonSchemaReward,
    LengthReward,
    MathReward,
    Name,
    NumericReward,
    RegexReward,
    SentimentReward,
    Timeout,
    Weight,
)
from alignkit.recipe.section import PositiveInt, Section

_FUNCTION = r"^.+\.py:[A-Za-z_]\w*$"
_URL = r"^https?://[^/]"

OnFailure = Literal["stop", "zero", "skip"]
"""What becomes of a response that a source could not score."""


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


class ModelReward(Section):
    """A reward model."""

    model: Annotated[str, Field(min_length=1)]
    """Run of the reward stage, or its adapter/ or merged/ folder."""
    weight: Weight = 1.0
    """Factor in the sum of all rewards."""
    name: Name = None
    """`reward/<name>` in the metrics."""
    normalize: bool = True
    """Subtract the mean and divide by the standard deviation, as measured by the reward run."""
    separate: bool = False
    """Load it as a separate model, for one trained over another base with the same tokenizer."""


class FunctionReward(Section):
    """A Python function."""

    function: Annotated[
        str, AfterValidator(_function), Field(json_schema_extra={"pattern": _FUNCTION})
    ]
    """`file.py:name`, called as name(prompts, completions, completion_ids, **columns) -> list of
    numbers, or None where it does not apply. It may be async; log_metric and log_extra are given if
    it names them, as in TRL."""
    messages: bool = False
    """Give the completion of a chat row as TRL does, [{role: assistant, content: ...}], not as
    text."""
    weight: Weight = 1.0
    """Factor in the sum of all rewards."""
    name: Name = None
    """`reward/<name>` in the metrics."""
    timeout: Timeout = 600.0
    """Seconds that one call may take; it runs in a process of its own."""
    on_failure: OnFailure = "stop"
    """If a call fails: `stop` ends the run; `zero` and `skip` find the responses that it fails for
    by calls with fewer, and give 0, or leave this source out of their reward."""


class UrlReward(Section):
    """A server."""

    url: Annotated[str, AfterValidator(_url), Field(json_schema_extra={"pattern": _URL})]
    """Receives {"prompts", "completions", "columns"} as JSON and returns {"scores": [...]}. Its
    query is not stored with the run."""
    weight: Weight = 1.0
    """Factor in the sum of all rewards."""
    name: Name = None
    """`reward/<name>` in the metrics."""
    timeout: Timeout = 60.0
    """Seconds that one call may take, from the first try to the last byte of the answer."""
    on_failure: OnFailure = "stop"
    """If a call fails: `stop` ends the run; `zero` and `skip` find the responses that it fails for
    by calls with fewer, and give 0, or leave this source out of their reward."""

    @field_serializer("url")
    def _stored(self, value: str) -> str:
        return without_query(value)


class JudgeReward(Section):
    """A language model that judges by a rubric, behind an OpenAI-compatible server."""

    judge: Annotated[str, AfterValidator(_url), Field(json_schema_extra={"pattern": _URL})]
    """Address of the server's API, as in http://localhost:8000/v1; `/chat/completions` is asked.
    Every reply is kept in samples.jsonl."""
    model: Annotated[str, Field(min_length=1)]
    """Name of the judging model, as the server knows it."""
    rubric: Annotated[str, Field(min_length=1)]
    """What a good response is, in words; or a text file that says so."""
    scale: PositiveInt = 10
    """The judge gives whole or decimal numbers from 0 to this; the score is divided by it."""
    api_key: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")] | None = None
    """Environment variable that holds the key; its value is never stored."""
    at_once: PositiveInt = 8
    """Requests under way at the same time."""
    weight: Weight = 1.0
    """Factor in the sum of all rewards."""
    name: Name = None
    """`reward/<name>` in the metrics."""
    timeout: Timeout = 120.0
    """Seconds that one response may take; a failed request is tried once more within them."""
    on_failure: OnFailure = "skip"
    """A reply without a score, or none: `stop` ends the run, `zero` gives 0, `skip` leaves the
    judge out of the response's reward."""

    @field_serializer("judge")
    def _stored(self, value: str) -> str:
        return without_query(value)


SOURCE_TAGS: dict[type[BaseModel], str] = {
    ModelReward: "reward:model",
    FunctionReward: "reward:function",
    UrlReward: "reward:url",
    JudgeReward: "reward:judge",
    ExactReward: "reward:exact",
    NumericReward: "reward:numeric",
    RegexReward: "reward:regex",
    FormatReward: "reward:format",
    LengthReward: "reward:length",
    JsonReward: "reward:json",
    SentimentReward: "reward:sentiment",
    MathReward: "reward:math",
    CodeReward: "reward:code",
    JsonSchemaReward: "reward:json_schema",
}
"""Section -> its tag in pydantic's locations; recipe keys contain no colon."""

SOURCE_KEYS = ("model", "function", "url", "judge", "rule")
"""A reward source has exactly one of these keys; beside `judge`, `model` is the judging one."""

RULES = tuple(
    tag.removeprefix("reward:") for kind, tag in SOURCE_TAGS.items() if "rule" in kind.model_fields
)
"""Names of the rules."""


def source_keys(value: dict[Any, Any]) -> list[str]:
    """Those of a mapping's keys that name a source."""
    if "judge" in value:
        return [key for key in SOURCE_KEYS if key in value and key != "model"]
    return [key for key in SOURCE_KEYS if key in value]


def _source_tag(value: Any) -> str | None:
    """Tag of the source that a mapping describes; None if it is not exactly one."""
    if not isinstance(value, dict):
        return SOURCE_TAGS.get(type(value))
    named = source_keys(value)
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
    | Annotated[JudgeReward, Tag("reward:judge")]
    | Annotated[ExactReward, Tag("reward:exact")]
    | Annotated[NumericReward, Tag("reward:numeric")]
    | Annotated[RegexReward, Tag("reward:regex")]
    | Annotated[FormatReward, Tag("reward:format")]
    | Annotated[LengthReward, Tag("reward:length")]
    | Annotated[JsonReward, Tag("reward:json")]
    | Annotated[SentimentReward, Tag("reward:sentiment")]
    | Annotated[MathReward, Tag("reward:math")]
    | Annotated[CodeReward, Tag("reward:code")]
    | Annotated[JsonSchemaReward, Tag("reward:json_schema")],
    Discriminator(
        _source_tag,
        custom_error_type="reward_source",
        custom_error_message="must be a mapping with one of model, function, url, judge or rule",
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


SOURCE_FILES = ("function", "file", "rubric")
"""Keys of a source that may name a file."""


def file_of(key: str, value: str) -> str:
    """The file that one of `SOURCE_FILES` names; empty if it names none.

    Args:
        key: of a reward source.
        value: of the key.
    """
    if key == "function":
        file, _, name = value.rpartition(":")
        return file if file.endswith(".py") and name.isidentifier() else ""
    if key == "rubric" and ("\n" in value or not value.endswith((".md", ".txt"))):
        return ""  # the rubric itself
    return value


def reward_name(source: RewardSource) -> str:
    """Short name of a source for metrics: `reward/<name>`."""
    if source.name is not None:
        return source.name
    if isinstance(source, ModelReward):
        return "model"
    if isinstance(source, FunctionReward):
        return source.function.rpartition(":")[2]
    if isinstance(source, JudgeReward):
        return "judge"
    return "url" if isinstance(source, UrlReward) else source.rule
