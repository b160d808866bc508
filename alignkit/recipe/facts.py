"""Inputs of the planner: sizes of the model, the data and the machine, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass


def logits_bytes(device: str) -> int:
    """Bytes of float32 logits that are held at once.

    On two CPU cores 8 to 64 MiB were equally fast. A GPU reads the whole vocabulary head for each
    chunk, so that small ones cost more than they save.

    Args:
        device: `cpu`, `cuda` or `mps`.
    """
    return 16 * 2**20 if device == "cpu" else 256 * 2**20


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a model.

    Args:
        architecture: class name of the model.
        parameters: number of weights; shared ones count once.
        trainable: trained weights.
        layers: decoder layers.
        hidden: width of the residual stream.
        intermediate: width of the feed-forward layer.
        attention_width: query heads × head dimension.
        key_value_width: key heads × head dimension.
        vocabulary: rows of the output head.
        context: longest sequence the model was made for; 0 if unknown.
        prefix: tokens of a trained prefix, which precede every row.
        at_most: whether `trainable` is an upper bound, because ranks are chosen from the rows.
        experts: weights in stacks of experts.
        changed_experts: of these, the ones in stacks that an adapter changes.
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
        tokens: tokens of these items.
        trained_tokens: of these, the ones that carry loss.
        longest: tokens of the longest row.
        step: tokens of the largest step, of one process.
        eval_rows: held-out rows.
        eval_tokens: tokens of the held-out rows.
        overlap: held-out rows that also appear in the training rows.
        chosen: training items whose first completion is desirable.
        rejected: training items whose first completion is undesirable; 0 except in KTO.
    """

    rows: int
    tokens: int
    trained_tokens: int
    longest: int
    step: int
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
        name: of the processor or GPU.
        memory: bytes that a process on the device can use now.
        cores: processor cores that torch uses.
        processes: training processes.
        speed: operations a second in products of the model's layers; 0 if it was not measured.
        sampling_speed: the same for as few rows as responses are sampled at once.
        cards: GPUs that this process sees, used or not; 0 without CUDA.
        attention: how packed rows are attended to in the recipe's precision.
        multiplies_bfloat16: whether the card does, rather than imitate it; True elsewhere.
    """

    device: str
    name: str
    memory: int
    cores: int
    processes: int
    speed: float = 0.0
    sampling_speed: float = 0.0
    cards: int = 0
    attention: str = ""
    multiplies_bfloat16: bool = True
