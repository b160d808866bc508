"""What a person sees: foreign text can neither steer the terminal nor flood it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

LONGEST = 2000
"""Characters of a line that are shown."""

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    """The text with visible signs for control characters, except line breaks and tabs.

    Args:
        text: from anywhere. An escape sequence in it would move the cursor, set the title or hide
            what follows; a change of direction would show it in another order than it is read.
    """
    return _CONTROL.sub(lambda match: _sign(ord(match[0])), text)


def _sign(code: int) -> str:
    return chr(0x2400 + code) if code < 0x20 else "\N{SYMBOL FOR DELETE}" if code == 0x7F else "�"


def cut(text: str) -> str:
    """A line with its middle left out if it is longer than a person would read."""
    left_out = len(text) - LONGEST
    if left_out <= 0:
        return text
    half = LONGEST // 2
    return f"{text[:half]} … {left_out:,} characters left out … {text[-half:]}"


class PlainConsole(Console):
    """A console that styles and lays out text, and passes no control characters of it to a person.

    Data for another program, on a standard output that is no terminal, stays as it is.
    """

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """The segments of anything that rich shows; only rich's own control codes stay."""
        data = not self.stderr and not self.is_terminal
        for segment in super().render(renderable, options):
            yield (
                segment if data or segment.control else Segment(plain(segment.text), segment.style)
            )


def _console(**options: Any) -> PlainConsole:
    return PlainConsole(highlight=False, soft_wrap=True, **options)


stdout = _console()
stderr = _console(stderr=True)


def print_line(text: str, label: str = "") -> None:
    """One line on stderr after a coloured label; brackets in the text stay as they are."""
    shown = Text("\n".join(map(cut, text.split("\n"))))
    stderr.print(Text(f"{label}: ", style="yellow") + shown if label else shown)
