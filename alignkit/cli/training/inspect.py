"""`alignkit inspect`: rows as tokens, with the trained ones marked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.text import Text

from alignkit.cli.output import print_json, print_pairs, stdout
from alignkit.cli.training.plan import name_foreign
from alignkit.cli.training.train import OverridesArgument, RecipeArgument

_MOST_SHARED = 16
"""Tokens that are shown as one piece at most, if the text itself holds signs for broken ones."""


def inspect(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    rows: Annotated[int, typer.Option("--rows", "-n", help="Rows to show.", min=0)] = 3,
    held_out: Annotated[bool, typer.Option("--eval", help="Show held-out rows.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print ids and labels as JSON.")] = False,
) -> None:
    """Show rows as the model will read them, and what happened to the others."""
    from alignkit.recipe.reading.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    from alignkit.data.templates import ChatTemplate
    from alignkit.errors import DataError
    from alignkit.stages.inputs.base import start_model
    from alignkit.stages.inputs.rows import read_rows

    foreign = name_foreign(loaded.recipe)
    parts = read_rows(loaded.recipe, start_model(loaded.recipe.model, merge=False))
    dataset = parts.held_out if held_out else parts.train
    if dataset is None:
        raise DataError(
            f"{loaded.name}: the recipe holds out no rows",
            hint="set data.eval or data.eval_fraction",
        )
    shown = [_row(dataset, item, parts.tokenizer) for item in range(min(rows, len(dataset)))]
    chats = parts.tokenizer.chat_template
    doubts = ChatTemplate(parts.tokenizer).doubts() if chats else []
    if as_json:
        about = {"report": dataset.report.to_json(), "template": doubts, "foreign": foreign}
        print_json({**about, "rows": shown})
        return
    for row in shown:
        stdout.print(
            Text(f"{row['place']}: {len(row['ids'])} tokens, ", style="bold")
            + Text(f"{row['trained']} trained", style="bold green")
        )
        for part in row["parts"]:
            if len(row["parts"]) > 1:
                note = ", scored and not trained" if part["name"] == "mismatched" else ""
                head = f"[{part['name']}, {part['length']} tokens{note}]"
                stdout.print(Text(head, style="bold cyan"))
            stdout.print(_paint(row, part, parts.tokenizer, stdout.is_terminal))
        stdout.print()
    report = dataset.report
    lengths = ", ".join(f"{name} {value}" for name, value in report.percentiles().items())
    stops = ", ".join(repr(parts.tokenizer.decode([token])) for token in report.stop_tokens)
    pairs = [("rows", line) for line in report.lines()]
    pairs += [("template", line) for line in doubts]
    pairs += [("lengths", lengths), ("tokens", f"{report.tokens:,}")]
    if report.prompts:
        print_pairs([*pairs, ("answers", "are sampled in training")])
        return
    pairs += [
        ("trained", f"{report.trained_tokens:,} ({report.trained_tokens / report.tokens:.0%})")
    ]
    pairs += [("answers end with", stops or "nothing: the model will not learn to stop")]
    print_pairs(pairs)
    if not stdout.is_terminal:
        stdout.print(Text("  trained tokens stand between « and »"))


def _row(dataset: Any, item: int, tokenizer: Any) -> dict[str, Any]:
    """One row: its prompt and its completions side by side, as the model reads them."""
    document = dataset[item]
    pieces = [("prompt", document.prompt.tolist(), [False] * len(document.prompt))]
    pieces += [
        (branch.role.name.lower(), branch.ids.tolist(), branch.trained.tolist())
        for branch in document.branches
    ]
    parts: list[dict[str, Any]] = []
    ids: list[int] = []
    labels: list[int] = []
    for name, piece, trained in pieces:
        if piece:
            parts.append({"name": name, "start": len(ids), "length": len(piece)})
        ids += piece
        labels += [i if on else -100 for i, on in zip(piece, trained, strict=True)]
    return {
        "place": dataset.places[document.row],
        "trained": sum(
            int(branch.trained.sum()) for branch in document.branches if _is_own(branch)
        ),
        "parts": parts,
        "ids": ids,
        "labels": labels,
        "tokens": [tokenizer.decode([i]) for i in ids],
    }


def _is_own(branch: Any) -> bool:
    """Whether a completion is the row's own: KTO scores a mismatched one without training it."""
    return bool(branch.role.name != "MISMATCHED")


def _paint(row: dict[str, Any], part: dict[str, Any], tokenizer: Any, colour: bool) -> Text:
    """Trained tokens in bold green, every other one underlined; without colour between « and »."""
    text = Text()
    inside = False
    span = slice(part["start"], part["start"] + part["length"])
    marks = [label != -100 for label in row["labels"][span]]
    for number, (piece, trained) in enumerate(_pieces(row["ids"][span], marks, tokenizer)):
        if not colour and trained != inside:
            text.append("«" if trained else "»")
        inside = trained
        shade = "bold green" if trained else "dim"
        text.append(piece, style=f"{shade} underline" if trained and number % 2 else shade)
    if inside and not colour:
        text.append("»")
    return text


def _pieces(ids: list[int], marks: list[bool], tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """The text of each token with its mark; tokens that share a character are one piece.

    Each is decoded behind the one before it, because many decoders drop the first blank.
    """
    before = start = 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[before:end])
        open_end = text.endswith("\N{REPLACEMENT CHARACTER}") and end - start < _MOST_SHARED
        if open_end and end < len(ids) and marks[end] == marks[start]:
            continue
        head = tokenizer.decode(ids[before:start])
        known = text.startswith(head)
        yield text[len(head) :] if known else tokenizer.decode(ids[start:end]), marks[start]
        before, start = start, end
