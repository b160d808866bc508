"""The `data` section of a recipe: where rows come from and how they are read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from alignkit.recipe.section import Fraction, PositiveInt, Section

RowFormat = Literal[
    "auto",
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "text",
    "preference",
    "sharegpt_preference",
    "hh",
]


class SourceSpec(Section):
    """One data source."""

    path: str | None = None
    """A .json, .jsonl, .jsonl.gz, .parquet or .csv file."""
    hub: str | None = None
    """A dataset on the Hugging Face hub, instead of `path`."""
    name: str | None = None
    """Configuration (subset) of the hub dataset."""
    split: str = "train"
    """Split of the hub dataset."""
    format: RowFormat = "auto"
    """Row format; `auto` finds it from the keys of the first row."""
    take: PositiveInt | None = None
    """Use only this many rows, from the start."""
    weight: Annotated[float, Field(gt=0.0, le=10_000)] = 1.0
    """How often the rows count: 2.0 repeats each row twice an epoch, 0.5 draws half of them."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Renames: the format's key -> the file's column, as in `{prompt: question}`."""

    @field_validator("columns")
    @classmethod
    def _each_once(cls, columns: dict[str, str]) -> dict[str, str]:
        named = list(columns.values())
        for column in named:
            if named.count(column) > 1:
                raise ValueError(f"names the column {column} twice")
        return columns

    @model_validator(mode="after")
    def _one_place(self) -> SourceSpec:
        if (self.path is None) == (self.hub is None):
            raise ValueError("must have exactly one of `path` and `hub`")
        return self

    @property
    def label(self) -> str:
        """The source's name in messages."""
        return self.path or f"hub:{self.hub}"


class DataSpec(Section):
    """Rows to train on and rows to hold out."""

    train: Annotated[tuple[SourceSpec, ...], Field(min_length=1)]
    """Sources to train on."""
    eval: tuple[SourceSpec, ...] = ()
    """Held-out sources. Rows that also appear in `train` are counted and reported."""
    eval_fraction: Fraction | None = None
    """Instead of `eval`: hold out this share of the training rows, drawn with the seed."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Longest row, in tokens."""
    too_long: Literal["drop", "truncate_left", "truncate_right", "error"] = "drop"
    """What happens to rows longer than max_length. They are always counted and reported."""

    @model_validator(mode="after")
    def _one_eval(self) -> DataSpec:
        if self.eval and self.eval_fraction is not None:
            raise ValueError("must have only one of `eval` and `eval_fraction`")
        return self


class SftDataSpec(DataSpec):
    """Rows to train on and rows to hold out, and which of their tokens carry loss."""

    train_on: Literal["completions", "last_turn", "everything"] = "completions"
    """Tokens that carry loss: every assistant turn, the last one, or the whole row."""
