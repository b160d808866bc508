"""The tables of foreign keys as Markdown, for the pages about coming from another toolkit."""

from __future__ import annotations

from collections.abc import Iterator

from alignkit.recipe.importing.fields import Field, Settings, Toolkit


def tables(toolkit: Toolkit) -> str:
    """Three tables: keys with a counterpart, their defaults, and keys without.

    Args:
        toolkit: whose keys.
    """
    return "\n\n".join(
        (
            "## Keys that are translated",
            "\n".join(_translated(toolkit)),
            "## Keys without counterpart",
            "\n".join(_without(toolkit)),
        )
    )


def _translated(toolkit: Toolkit) -> Iterator[str]:
    yield f"| {toolkit.title} | here | |"
    yield "|---|---|---|"
    for row in toolkit.table:
        if row.rule is not None:
            stages = f"{', '.join(row.stages)}: " if row.stages else ""
            says = f"{stages}{row.says}".removesuffix(": ")
            yield f"| `{row.key}` | {_ours(row)} | {says} |"


def _ours(row: Field) -> str:
    return ", ".join(f"`{ours}`" for ours in row.ours) or "none"


def _without(toolkit: Toolkit) -> Iterator[str]:
    """Rows of keys that have the same reason."""
    reasons: dict[str, list[Field]] = {}
    for row in toolkit.table:
        if row.rule is None:
            reasons.setdefault(row.says, []).append(row)
    yield f"| {toolkit.title} | |"
    yield "|---|---|"
    for says, rows in reasons.items():
        yield f"| {', '.join(f'`{row.key}`' for row in rows)} | {says} |"


def defaults_table(toolkit: Toolkit, defaults: dict[str, Settings]) -> str:
    """The toolkit's defaults, which are written into a recipe where they change the result.

    Args:
        toolkit: whose.
        defaults: stage -> key -> value.
    """
    lines = [f"| {toolkit.title} | if left out |", "|---|---|"]
    for key in dict.fromkeys(row.key for row in toolkit.table if row.rule is not None):
        found: dict[str, list[str]] = {}
        for stage, values in defaults.items():
            if values.get(key) is not None and _applies(toolkit, key, stage):
                found.setdefault(_shown(values[key]), []).append(stage)
        parts = [
            value if len(found) == 1 else f"{value} ({', '.join(names)})"
            for value, names in found.items()
        ]
        if parts:
            lines.append(f"| `{key}` | {', '.join(parts)} |")
    return "\n".join(lines)


def _applies(toolkit: Toolkit, key: str, stage: str) -> bool:
    rows = [row for row in toolkit.table if row.key == key and row.rule is not None]
    return any(not row.stages or stage in row.stages for row in rows)


def _shown(value: object) -> str:
    words = {"None": "", "True": "true", "False": "false"}
    return words.get(str(value), str(value))
