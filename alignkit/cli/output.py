"""What the commands print: data on stdout, everything else on stderr."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.text import Text

stdout = Console(highlight=False, soft_wrap=True)
stderr = Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    import json  # not for `--help`

    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def say(text: str) -> None:
    """A line for the person at the terminal."""
    stderr.print(Text(text))


def print_error(text: str) -> None:
    """An error with its hint, each problem on its own lines."""
    for line in text.split("\n"):
        if line.startswith("hint:"):
            stderr.print(Text(line, style="cyan"))
        else:
            stderr.print(Text("error: ", style="bold red") + Text(line))


def print_pairs(pairs: list[tuple[str, str]], title: str = "") -> None:
    """Aligned `name  value` lines on stdout."""
    if title:
        stdout.print(Text(title, style="bold"))
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        stdout.print(Text(f"  {name:<{width}}  ") + Text(value))
