"""What the planner is told: sizes of the model, the data and the machine. Plain numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a model.

    Args:
        architecture: class name.
        parameters: all weights, shared ones once.
        trainable: weights that are trained.
        layers: decoder layers.
        hidden: width of the residual stream.
        intermediate: width of the feed-forward layer.
        attention_width: query heads × head dimension.
        key_value_width: key heads × head dimension.
        vocabulary: rows of the output head.
        context: longest sequence the model was made for; 0 if it does not say.
        prefix: tokens of a trained prefix, which stand before every row.
        at_most: whether `trainable` is a bound, because the rows decide the adapter's ranks.
        experts: weights in stacks of experts.
        changed_experts: of these, in the stacks that an adapter changes.
    """

    architecture: str
    parameters: int
    trainable: int
    layers: int
    hidden: int
    intermediate: int
    attention_width: int
    key_value_width: int
    vocabulary: int
    context: int
    prefix: int = 0
    at_most: bool = False
    experts: int = 0
    changed_experts: int = 0


@dataclass(frozen=True)
class DataFacts:
    """Sizes of the tokenized rows.

    Args:
        rows: training items of one epoch.
        tokens: their tokens.
        trained_tokens: of these, the ones that carry loss.
        longest: tokens of the longest row.
        eval_rows: held-out rows.
        eval_tokens: their tokens.
        overlap: held-out rows that also stand in the training rows.
        chosen: training items whose first answer is a desirable one.
        rejected: training items whose first answer is an undesirable one; 0 but for KTO.
    """

    rows: int
    tokens: int
    trained_tokens: int
    longest: int
    eval_rows: int
    eval_tokens: int
    overlap: int
    chosen: int = 0
    rejected: int = 0


@dataclass(frozen=True)
class HardwareFacts:
    """The machine.

    Args:
        device: `cpu`, `cuda` or `mps`.
        name: of the processor or card.
        memory: bytes that a process on the device can use now.
        cores: processor cores that torch uses.
        processes: training processes.
    """

    device: str
    name: str
    memory: int
    cores: int
    processes: int
