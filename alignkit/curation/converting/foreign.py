"""Rows as other programs write them -> rows that `data.formats` and `data.pairs` know."""

from __future__ import annotations

from dataclasses import replace

from alignkit.data.sources import Row


def known_row(row: Row) -> Row:
    """A pair of OpenAI's preference fine-tuning as prompt, chosen and rejected; others as they are.

    Args:
        row: of any format.
    """
    given = row.values.get("input")
    keys = ("preferred_output", "non_preferred_output")
    if not isinstance(given, dict) or not all(key in row.values for key in keys):
        return row
    others = {key: v for key, v in row.values.items() if key not in ("input", *keys)}
    tools = {"tools": given["tools"]} if given.get("tools") else {}
    pair = {"prompt": given.get("messages"), **tools}
    chosen, rejected = (row.values[key] for key in keys)
    return replace(row, values={**others, **pair, "chosen": chosen, "rejected": rejected})
