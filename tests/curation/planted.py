"""Rows in which every kind of fault was planted, and as many that only look like it."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

NOUNS = [
    "river",
    "lamp",
    "garden",
    "train",
    "letter",
    "window",
    "bridge",
    "market",
    "forest",
    "engine",
    "island",
    "recipe",
]
VERBS = [
    "paints",
    "repairs",
    "studies",
    "follows",
    "carries",
    "builds",
    "measures",
    "forgets",
    "describes",
    "visits",
]
PLACES = [
    "harbour",
    "valley",
    "kitchen",
    "library",
    "station",
    "village",
    "workshop",
    "orchard",
    "museum",
    "square",
]
MORE = [
    "early",
    "late",
    "twice",
    "alone",
    "slowly",
    "today",
    "often",
    "gladly",
    "quietly",
    "again",
    "nearby",
    "together",
]


def sentence(rng: random.Random, words: int) -> str:
    """Made of common words; no two long ones are alike."""
    made = [rng.choice(rng.choice([NOUNS, VERBS, PLACES, MORE])) for _ in range(words)]
    return " ".join(made).capitalize() + f" {rng.randint(1000, 9999)}."


def plant(count: int, seed: int = 0) -> tuple[list[dict[str, Any]], dict[str, set[int]]]:
    """Rows, and the numbers of those with each fault; all others have none of it.

    Args:
        count: of plain rows, to which the planted ones are added.
        seed: of the random numbers.
    """
    rng = random.Random(seed)
    rows = [
        {"prompt": sentence(rng, 12), "completion": sentence(rng, rng.randint(20, 40))}
        for _ in range(count)
    ]
    wanted: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for _ in range(20):
        plain = rng.choice(rows)
        wanted["equal rows"].append(dict(plain, prompt=f"  {plain['prompt'].upper()} "))
        wanted["near-duplicates"].append(_touched(rng, rng.choice(rows), 1))
        wanted["near"].append(_touched(rng, rng.choice(rows), 12))  # below 0.8
        wanted["placeholders"].append(_with(rng, rng.choice(["Dear {{ name }},", "[Your Name]"])))
        wanted["braces"].append(_with(rng, "Use f'{x}' or a[0] and <b> tags."))
        copied = sentence(rng, 9)
        row = {"prompt": f"{sentence(rng, 8)} {copied} Repeat it.", "completion": copied}
        wanted["answers that stand in their prompt"].append(row)
        wanted["short"].append({"prompt": f"{sentence(rng, 9)} Yes or no?", "completion": "yes"})
        refusal = rng.choice(["I'm sorry, but I can't help with that.", "As an AI language model,"])
        wanted["refusals and talk of being a model"].append(
            {"prompt": sentence(rng, 9), "completion": f"{refusal} {sentence(rng, 12)}"}
        )
        sorry = f"{sentence(rng, 9)} I said I was sorry that I could not help, and left."
        wanted["sorry"].append({"prompt": sentence(rng, 9), "completion": sorry})
        again = f"{sentence(rng, 6)} " * 8
        wanted["repetitive answers"].append({"prompt": sentence(rng, 9), "completion": again})
        wanted["personal data"].append(_with(rng, _personal(rng)))
        wanted["numbers"].append(_with(rng, _impersonal(rng)))
    return _planted(rows, wanted)


def plant_more(count: int, seed: int = 0) -> tuple[list[dict[str, Any]], dict[str, set[int]]]:
    """As `plant`, with rows that no stage reads, and texts of bad lines."""
    rng = random.Random(seed)
    rows = [{"prompt": sentence(rng, 12), "completion": sentence(rng, 30)} for _ in range(count)]
    wanted: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for _ in range(20):
        asked = {"prompt": sentence(rng, 9)}
        wanted["unreadable rows"].append({"question": sentence(rng, 9)})
        wanted["rows without an answer"].append(dict(asked))
        wanted["one word"].append({"prompt": sentence(rng, 9), "completion": rng.choice(VERBS)})
        lines = [sentence(rng, 5) for _ in range(6)]
        twice = "\n".join([*lines[:3], *lines[:2]])
        wanted["answers whose lines repeat"].append({**asked, "completion": twice})
        once = "\n".join([*lines, lines[0]])
        wanted["a line twice"].append({"prompt": sentence(rng, 9), "completion": once})
        dots = "\n".join(f"{line} ..." for line in lines)
        wanted["answers of unfinished lines"].append({**asked, "completion": dots})
        dot = "\n".join([*lines, "and so on ..."])
        wanted["an ellipsis"].append({"prompt": sentence(rng, 9), "completion": dot})
    return _planted(rows, wanted)


def plant_pairs(count: int, seed: int = 0) -> tuple[list[dict[str, Any]], dict[str, set[int]]]:
    """As `plant`, with pairs in which there is little to prefer, or that contradict each other."""
    rng = random.Random(seed)

    def pair(chosen: str, rejected: str) -> dict[str, Any]:
        return {"prompt": sentence(rng, 9), "chosen": chosen, "rejected": rejected}

    rows = [pair(sentence(rng, 20), sentence(rng, 20)) for _ in range(count)]
    wanted: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for plain in rng.sample(rows, 20):
        answer = sentence(rng, 30)
        words = answer.split()
        wanted["pairs that differ only in length"].append(
            pair(f"{answer} {sentence(rng, 9)}", answer)
        )
        wanted["much longer"].append(pair(sentence(rng, 60), sentence(rng, 6)))
        wanted["pairs whose answers hardly differ"].append(
            pair(answer, " ".join([*words[1:], "zebra"]))
        )
        half = " ".join([*words[:15], *sentence(rng, 15).split()])
        wanted["half of the words"].append(pair(answer, half))
        turned = {"chosen": plain["rejected"], "rejected": plain["chosen"]}
        wanted["rows that contradict one before them"].append(plain | turned)
        wanted["another answer"].append(plain | {"rejected": sentence(rng, 20)})
    return _planted(rows, wanted)


def _planted(
    rows: list[dict[str, Any]], wanted: dict[str, list[dict[str, Any]]]
) -> tuple[list[dict[str, Any]], dict[str, set[int]]]:
    faults: dict[str, set[int]] = {}
    for name, planted in wanted.items():
        faults[name] = set(range(len(rows), len(rows) + len(planted)))
        rows += planted
    return rows, faults


def _with(rng: random.Random, text: str) -> dict[str, Any]:
    answer = f"{sentence(rng, 10)} {text} {sentence(rng, 10)}"
    return {"prompt": sentence(rng, 9), "completion": answer}


def _touched(rng: random.Random, row: dict[str, Any], changes: int) -> dict[str, Any]:
    """The row with some words of its answer replaced."""
    words = row["completion"].split()
    for place in rng.sample(range(len(words)), min(changes, len(words))):
        words[place] = rng.choice(["zebra", "quartz", "jigsaw", "vortex"])
    return {**row, "completion": " ".join(words)}


def _personal(rng: random.Random) -> str:
    return rng.choice(
        [
            "Write to anna.miller@example.org for more.",
            "Call +44 20 7946 0958 or (555) 123-4567.",
            "Card 4111 1111 1111 1111, please.",
            "IBAN DE89 3704 0044 0532 0130 00.",
            "From 8.8.8.8, SSN 078-05-1120.",
        ]
    )


def _impersonal(rng: random.Random) -> str:
    return rng.choice(
        [
            "The ratio is 3.1415926535 at @home, version 10.2.3.",
            "Order 4111 1111 1111 1112 arrived in 2024-11-30.",
            "IBAN DE00 3704 0044 0532 0130 00 has wrong digits.",
            "See 192.168.0.1 and 999.1.1.1 and page 555-12.",
            "It took 1234567890123 nanoseconds.",
        ]
    )
