"""Decoding settings, seeded."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from alignkit.errors import AlignkitError
from alignkit.recipe.section import COLDEST


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is chosen.

    Args:
        max_new_tokens: longest answer in tokens; at least 1.
        temperature: 0 takes the likeliest token; above, logits are divided by it.
        top_p: sample from the smallest set of tokens with this probability, in (0, 1].
        top_k: sample from this many of the likeliest tokens; 0 from all.
        repetition_penalty: above 1 makes repeated tokens less likely.
        seed: of the sampling.
        min_p: sample from tokens with at least this share of the likeliest one's probability, in
            [0, 1) (arXiv:2407.01082); 0 from all.
        typical_p: sample from the tokens of this probability whose information is nearest to the
            entropy, in (0, 1] (arXiv:2202.00666); 1 from all.
        beams: answers that are followed at once, of which the likeliest is taken; at temperature 0.
        stop: texts at whose first occurrence an answer ends, without it.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    beams: int = 1
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens": self.max_new_tokens >= 1,
            "temperature": self.temperature == 0 or COLDEST <= self.temperature < math.inf,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "repetition_penalty": 0 < self.repetition_penalty < math.inf,
            "seed": 0 <= self.seed < 2**63,
            "min_p": 0 <= self.min_p < 1,
            "typical_p": 0 < self.typical_p <= 1,
            "beams": self.beams >= 1 and (self.beams == 1 or self.temperature == 0),
            "stop": all(self.stop),
        }
        for name, holds in rules.items():
            if not holds:
                value = getattr(self, name)
                raise AlignkitError(f"{name} cannot be {value}", hint=_RANGES[name])

    def changed(self, name: str, text: str) -> SamplingSettings:
        """The settings with one value, given as text, replaced.

        Raises:
            AlignkitError: no such setting, or a value that does not fit it.
        """
        kinds = {field.name: type(getattr(self, field.name)) for field in dataclasses.fields(self)}
        if name not in kinds:
            raise AlignkitError(
                f"there is no setting {name!r}", hint=f"settings: {', '.join(kinds)}"
            )
        try:
            value: Any = kinds[name](text) if name != "stop" else (text,) * bool(text)
        except ValueError:
            hint = _RANGES.get(name, "a whole number")
            raise AlignkitError(f"{name} cannot be {text!r}", hint=hint) from None
        return dataclasses.replace(self, **{name: value})

    def options(self) -> dict[str, Any]:
        """Arguments of transformers' `generate`."""
        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.temperature > 0,
            "repetition_penalty": self.repetition_penalty,
        }
        if self.temperature > 0:
            names = ("temperature", "top_p", "top_k", "typical_p")
            options |= {name: getattr(self, name) for name in names}
            options |= {"min_p": self.min_p} if self.min_p else {}
        return options | ({"num_beams": self.beams} if self.beams > 1 else {})

    def cut(self, answer: str) -> str:
        """The answer up to the first of the texts that end it.

        Args:
            answer: that may hold one.
        """
        ends = [place for text in self.stop if (place := answer.find(text)) >= 0]
        return answer[: min(ends)] if ends else answer


_RANGES = {
    "max_new_tokens": "a whole number from 1",
    "temperature": "0 for the likeliest token; 0.7 to 1 for variety",
    "top_p": "above 0, at most 1",
    "top_k": "a whole number from 0",
    "seed": "a whole number from 0, below 2^63",
    "repetition_penalty": "above 0; 1 is none",
    "min_p": "from 0, below 1",
    "typical_p": "above 0, at most 1",
    "beams": "a whole number from 1; above 1 only at temperature 0",
    "stop": "texts that are not empty",
}
