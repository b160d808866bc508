"""More kinds of personal data, by the pattern recognizers of presidio, which is an extra.

Those are used that need no language model and no network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from alignkit.curation.patterns import Recognize, personal_data, without_overlaps
from alignkit.errors import DataError

LEAST_SCORE = 0.5
"""Of a hit. Patterns that hold digits alone, and have no check digit, stay below it."""

ASKING = {"EMAIL_ADDRESS", "URL"}
"""Entities whose recognizers ask the network for a list of domains."""


def with_entities(entities: Sequence[str]) -> Recognize:
    """What recognizes personal data, those entities included.

    Args:
        entities: presidio's names, as in `UK_NHS`; none of them is the patterns alone.

    Raises:
        DataError: the package is not installed, or there is no such entity.
    """
    if not entities:
        return personal_data
    known = _recognizers()
    for entity in entities:
        if entity not in known:
            raise DataError(
                f"--entity {entity} is not known", hint=f"one of {', '.join(sorted(known))}"
            )

    def recognize(text: str) -> Iterator[tuple[str, int, int]]:
        hits = [*personal_data(text)]
        for entity in entities:
            for found in known[entity].analyze(text, [entity], None):
                if found.score >= LEAST_SCORE:
                    hits.append((entity.lower().replace("_", " "), found.start, found.end))
        return without_overlaps(hits)

    return recognize


def _recognizers() -> dict[str, Any]:
    """Entity -> what recognizes it."""
    try:
        from presidio_analyzer import PatternRecognizer, predefined_recognizers
    except ImportError:
        raise DataError(
            "--entity needs the package presidio-analyzer, which is not installed",
            hint="pip install 'alignkit[pii]', or leave out --entity",
        ) from None
    kinds = [
        kind
        for kind in vars(predefined_recognizers).values()
        if isinstance(kind, type)
        and issubclass(kind, PatternRecognizer)
        and kind is not PatternRecognizer
    ]
    made = [kind() for kind in kinds]
    known = {entity: one for one in made for entity in one.supported_entities}
    return {entity: one for entity, one in known.items() if entity not in ASKING}
