"""Random faults of a seed: drawn, made one after another, and counted by their kind."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from faults.kinds import KINDS, can_mount
from faults.works import WORKS
from faults.workshop import Workshop

DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"
START, END = "<!-- faults: start -->", "<!-- faults: end -->"
"""Marks in the document between which the table stands."""


@dataclass(frozen=True)
class Drawn:
    """A fault that is to be made.

    Args:
        kind: key of `KINDS`.
        work: key of `WORKS`.
        seed: of its own random numbers, which make it again.
    """

    kind: str
    work: str
    seed: int


@dataclass
class Outcome:
    """What became of a fault.

    Args:
        drawn: the fault.
        wrong: what was wrong; empty if the work survived.
        lost: steps that were done again.
        story: what was done.
        seconds: that it took.
    """

    drawn: Drawn
    wrong: str = ""
    lost: int = 0
    story: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def line(self) -> str:
        """One line about it."""
        verdict = f"WRONG: {self.wrong}" if self.wrong else "survived"
        what = f"{self.drawn.kind}, {self.drawn.work}, seed {self.drawn.seed}"
        return f"{what}: {'; '.join(self.story)}: {verdict} ({self.seconds:.1f} s)"


def draw(count: int, seed: int, *, disks: bool = True) -> list[Drawn]:
    """Faults of a seed; every kind once before any comes twice, if there are enough.

    Args:
        count: how many.
        seed: draws them.
        disks: whether small disks can be mounted.
    """
    rng = random.Random(seed)
    names = [name for name in KINDS if disks or name != "disk full"]
    chances = [KINDS[name][2] for name in names]
    kinds = rng.sample(names, min(count, len(names)))
    kinds += rng.choices(names, chances, k=count - len(kinds))
    works = {name: _in_turn(KINDS[name][1], rng) for name in names}
    return [Drawn(kind, next(works[kind]), rng.randrange(2**31)) for kind in kinds]


def _in_turn(works: Iterable[str], rng: random.Random) -> Iterable[str]:
    """Works without end, each once in every round."""
    works = list(works)
    while True:
        rng.shuffle(works)
        yield from works


def make(shop: Workshop, drawn: Drawn) -> Outcome:
    """Make one fault and see what becomes of the work."""
    outcome, started = Outcome(drawn), time.monotonic()
    fault = KINDS[drawn.kind][0]
    try:
        outcome.lost = fault(shop, random.Random(drawn.seed), WORKS[drawn.work], outcome.story)
    except AssertionError as error:
        outcome.wrong = " ".join(str(error).split("\nassert ")[0].split())[:500]
    outcome.seconds = time.monotonic() - started
    return outcome


def make_all(
    shop: Workshop, count: int, seed: int, say: Callable[[str], None] = print
) -> list[Outcome]:
    """Make random faults one after another.

    Args:
        shop: where.
        count: how many.
        seed: draws them.
        say: gets a line about each.
    """
    disks = can_mount(shop.home)
    say(f"seed {seed}" + ("" if disks else "; no disk can be mounted, so none is filled"))
    outcomes = []
    for number, drawn in enumerate(draw(count, seed, disks=disks), start=1):
        outcomes.append(make(shop, drawn))
        say(f"{number}/{count} {outcomes[-1].line()}")
    return outcomes


def table(outcomes: list[Outcome], seed: int) -> str:
    """The outcomes as a table in Markdown, a row a kind."""
    lines = [
        f"{len(outcomes)} random faults of seed {seed} on tiny models:",
        "",
        "| fault | tried | survived | steps done again, at most |",
        "|---|---|---|---|",
    ]
    for kind in KINDS:
        mine = [outcome for outcome in outcomes if outcome.drawn.kind == kind]
        if mine:
            survived = sum(not outcome.wrong for outcome in mine)
            lost = max(outcome.lost for outcome in mine)
            lines.append(f"| {kind} | {len(mine)} | {survived} | {lost} |")
    survived = sum(not outcome.wrong for outcome in outcomes)
    lost = max((outcome.lost for outcome in outcomes), default=0)
    lines.append(f"| **all** | **{len(outcomes)}** | **{survived}** | **{lost}** |")
    return "\n".join(lines) + "\n"


def write_table(text: str, document: Path = DOCUMENT) -> None:
    """Put a table between the marks of a document."""
    whole = document.read_text(encoding="utf-8")
    before, rest = whole.split(START)
    document.write_text(f"{before}{START}\n\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")
