"""`alignkit data`: looking at data sets, and making them."""

from __future__ import annotations

import typer

from alignkit.cli.rows.label import label
from alignkit.cli.rows.look import check, diff, sample
from alignkit.cli.rows.write import clean, convert, split

data = typer.Typer(no_args_is_help=True)
for command in (check, clean, convert, split, sample, diff, label):
    data.command(command.__name__)(command)
