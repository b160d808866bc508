"""What the commands print: data on stdout, everything else on stderr."""

from __future__ import annotations

import sys
from typing import Any

from rich.text import Text

from alignkit.terminal import cut, print_line, stderr, stdout

__all__ = ["print_error", "print_json", "print_pairs", "say", "stderr", "stdout"]


def print_json(value: Any) -> None:
    """One JSON document on stdout, also where the encoding lacks some of its characters."""
    import json  # not for `--help`

    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
    escaped = encoding.replace("_", "-") not in ("utf-8", "utf8")
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=escaped, default=str) + "\n")


def say(text: str) -> None:
    """A line for the person at the terminal."""
    print_line(text)


def print_error(text: str) -> None:
    """An error with its hint, each problem on its own lines."""
    for line in map(cut, text.split("\n")):
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
