"""Options of decoding, which commands that answer have in common."""

from __future__ import annotations

from typing import Annotated

import typer

MaxNewTokensOption = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
TopPOption = Annotated[float, typer.Option(help="Nucleus sampling.")]
TopKOption = Annotated[int, typer.Option(help="Sample from this many tokens; 0 is all.")]
MinPOption = Annotated[
    float, typer.Option(help="Sample from tokens with this share of the likeliest's odds.")
]
TypicalPOption = Annotated[float, typer.Option(help="Locally typical sampling.")]
PenaltyOption = Annotated[float, typer.Option(help="Above 1 repeats less.")]
BeamsOption = Annotated[int, typer.Option(help="Beam search, at temperature 0.")]
StopOption = Annotated[list[str] | None, typer.Option(help="Text that ends an answer; repeatable.")]
DraftOption = Annotated[
    str | None, typer.Option(help="A smaller model that guesses ahead; the same answers.")
]
SeedOption = Annotated[int, typer.Option(help="Random seed.")]
