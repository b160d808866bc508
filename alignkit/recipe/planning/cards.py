"""GPUs that are not here: their published memory and speed."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from alignkit.errors import AlignkitError
from alignkit.recipe.facts import HardwareFacts
from alignkit.recipe.planning.duration import SHARE

MFU = 0.4
"""Share of a card's published speed that training usually reaches, where nobody has measured."""


@dataclass(frozen=True)
class Card:
    """A GPU as its maker describes it.

    Args:
        name: as people say it.
        gigabytes: of memory.
        teraflops: of dense products in half precision, summed in float32.
        bfloat16: multiplied in hardware.
    """

    name: str
    gigabytes: float
    teraflops: float
    bfloat16: bool = True


CARDS = {
    "t4": Card("T4", 16, 65, bfloat16=False),
    "v100": Card("V100 16 GB", 16, 125, bfloat16=False),
    "v100-32": Card("V100 32 GB", 32, 125, bfloat16=False),
    "3060": Card("RTX 3060", 12, 25),
    "3090": Card("RTX 3090", 24, 71),
    "4090": Card("RTX 4090", 24, 165),
    "5090": Card("RTX 5090", 32, 209),
    "a10": Card("A10", 24, 125),
    "l4": Card("L4", 24, 121),
    "a6000": Card("RTX A6000", 48, 155),
    "l40s": Card("L40S", 48, 362),
    "a100": Card("A100 40 GB", 40, 312),
    "a100-80": Card("A100 80 GB", 80, 312),
    "h100": Card("H100 SXM", 80, 989),
    "h200": Card("H200", 141, 989),
    "b200": Card("B200", 180, 2250),
    "mi300x": Card("MI300X", 192, 1307),
}
"""Name on the command line -> the card."""


def read_gpu(text: str) -> tuple[Card, int]:
    """A card and how many of it.

    Args:
        text: `NAME` or `NAME:COUNT`, as in `h100:8`.

    Raises:
        AlignkitError: an unknown card, or no count.
    """
    name, _, count = text.partition(":")
    card = CARDS.get(name.lower().removeprefix("rtx").strip("- "))
    if card is None:
        known = ", ".join(CARDS)
        raise AlignkitError(
            f"--gpu {text}: no card called {name!r} is known",
            hint=f"one of {known}; another one's memory goes into --memory",
        )
    if count and not (count.isdigit() and int(count)):
        raise AlignkitError(f"--gpu {text}: {count!r} is no number of cards", hint="as in h100:8")
    return card, int(count or 1)


def read_size(text: str) -> int:
    """Bytes of a size.

    Args:
        text: as in `24GB`, `80GiB` or `512MB`.

    Raises:
        AlignkitError: no size.
    """
    units = {"GB": 10**9, "G": 10**9, "MB": 10**6, "GIB": 2**30, "MIB": 2**20}
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if found is None or found[2].upper() not in units or not float(found[1]):
        raise AlignkitError(f"--memory {text} is no size", hint="as in 24GB or 80GiB")
    return round(float(found[1]) * units[found[2].upper()])


def with_card(here: HardwareFacts, card: Card, count: int) -> HardwareFacts:
    """A machine with other cards.

    Args:
        here: this machine.
        card: in its place.
        count: one process each.
    """
    return replace(
        here,
        device="cuda",
        name=f"{count} × {card.name}" if count > 1 else card.name,
        memory=round(card.gigabytes * 1e9),
        processes=count,
        speed=card.teraflops * 1e12 * MFU / SHARE,
        sampling_speed=0.0,
        cards=count,
        attention="chosen there",
        multiplies_bfloat16=card.bfloat16,
    )
