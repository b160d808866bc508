"""The licence of a model's weights, as far as its files say it."""

from __future__ import annotations

from pathlib import Path

import yaml

from alignkit.models.base.known import KNOWN_MODELS, model_folder
from alignkit.models.base.loading import BaseModel


def licence_of(base: BaseModel) -> str | None:
    """Identifier such as `apache-2.0`; None where nothing says it.

    Args:
        base: its model card is read, or the table of models that alignkit fetches.
    """
    folder = Path(base.location)
    stated = front_matter(folder / "README.md").get("license")
    if isinstance(stated, str) and stated:
        return stated
    for name, known in KNOWN_MODELS.items():
        if folder.is_dir() and folder.resolve() == model_folder(name).resolve():
            return known.licence.lower()
    return None


def front_matter(card: Path) -> dict[str, object]:
    """The YAML between the first two lines of `---` of a model card; empty if there is none."""
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    lines = text.splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    end = next((n for n, line in enumerate(lines[1:], 1) if line.strip() == "---"), None)
    if end is None:
        return {}
    try:
        found = yaml.safe_load("\n".join(lines[1:end]))
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}
