"""What a model needs, whatever it is trained on: weights, optimizer, cache, operations."""

from __future__ import annotations

from dataclasses import dataclass

from alignkit.recipe.facts import ModelFacts

BITS = (32, 16, 8, 4)
"""Widths of a weight that are told."""


def weight_bytes(parameters: float, bits: int) -> float:
    """Bytes of weights, without the scales of quantized ones: parameters · bits / 8.

    Args:
        parameters: number of weights.
        bits: of each.
    """
    return parameters * bits / 8


def cache_bytes(model: ModelFacts, tokens: int, sequences: int = 1, wide: int = 2) -> int:
    """Bytes of keys and values: 2 · layers · key heads · head size · tokens · sequences · bytes.

    Args:
        model: its sizes.
        tokens: of each sequence.
        sequences: held at once.
        wide: bytes of a value; 2 in half precision.
    """
    return 2 * model.layers * model.key_value_width * tokens * sequences * wide


def training_operations(parameters: float, tokens: float) -> float:
    """6 · N · D: two operations for a weight and a token forward, four backward (Kaplan et al.,
    arXiv:2001.08361).

    Args:
        parameters: N, number of weights.
        tokens: D, that are read.
    """
    return 6.0 * parameters * tokens


def full_training_bytes(parameters: float) -> float:
    """Bytes of training all weights with AdamW in mixed precision, without activations: 16 each.

    A float32 copy, its gradient and two moments; a half-precision copy comes and goes with them.

    Args:
        parameters: number of weights.
    """
    return 16.0 * parameters


@dataclass(frozen=True)
class Sizes:
    """What a model needs.

    Args:
        model: its sizes.
        tokens: of each sequence of the cache.
        sequences: held at once.
        read: tokens of a training.
    """

    model: ModelFacts
    tokens: int
    sequences: int
    read: float

    def to_json(self) -> dict[str, float | str]:
        """Plain values, in bytes and operations."""
        model = self.model
        return {
            "architecture": model.architecture,
            "parameters": model.parameters,
            **{f"weights_{b}_bit": weight_bytes(model.parameters, b) for b in BITS},
            "cache_a_token": cache_bytes(model, 1),
            "cache": cache_bytes(model, self.tokens, self.sequences),
            "full_training": full_training_bytes(model.parameters),
            "operations": training_operations(model.parameters, self.read),
        }

    def lines(self) -> list[tuple[str, str]]:
        """For a person."""
        model = self.model
        widths = ", ".join(
            f"{weight_bytes(model.parameters, bits) / 1e9:.3g} at {bits}" for bits in BITS
        )
        cache = cache_bytes(model, self.tokens, self.sequences)
        return [
            ("model", f"{model.architecture}, {model.parameters / 1e6:,.1f} M weights"),
            ("weights", f"GB by bits: {widths}"),
            (
                "cache",
                f"{cache / 1e9:.3g} GB of keys and values for {self.sequences:,} × "
                f"{self.tokens:,} tokens in half precision, {cache_bytes(model, 1) / 1e3:.3g} kB a "
                "token",
            ),
            (
                "all weights",
                f"{full_training_bytes(model.parameters) / 1e9:.3g} GB to train them with AdamW, "
                "without activations",
            ),
            (
                "operations",
                f"{training_operations(model.parameters, self.read):.3g} for {self.read:,.0f} "
                "tokens (6 · weights · tokens)",
            ),
        ]
