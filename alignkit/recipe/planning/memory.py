"""Estimates the peak memory of a run. `alignkit plan` shows every term.

Activations are counted as the tensors that autograd keeps for the backward pass of one decoder
layer; the widths come from the model's configuration. Constants were fitted to measured peaks.
"""

from __future__ import annotations

from dataclasses import dataclass

from alignkit.recipe.adapters import has_adapter, is_remade, takes_from_base
from alignkit.recipe.facts import HardwareFacts, ModelFacts, logits_bytes
from alignkit.recipe.stages.base import MemoryTerms, Recipe

ROOM = 0.85
"""Share of the free memory that a plan may fill."""

_MERGED_FILE = 5_000_000_000
"""Bytes of the largest file of weights that transformers writes."""

_MERGE_ROOM = 400_000_000
"""Bytes of a merge besides its files: one layer, logits to compare. Fitted to measured peaks."""

_QUANTIZED_BYTES = {"nf4": 0.516, "int8": 1.01}
"""Bytes of a quantized weight with its share of a scale: nf4 has 8 bits for every 64 weights, int8
float32 for every row of about 500 weights or more."""

_MOMENT_BYTES = {
    "adamw": 8.0,
    "adamw_8bit": 2 + 8 / 256,
    "paged_adamw_8bit": 2 + 8 / 256,
    "lion": 4.0,
    "lion_8bit": 1 + 4 / 256,
}
"""Bytes of optimizer state per trained weight: two moments, of Lion one, in float32, or in 8 bits
with a float32 scale for every 256. Paged ones may leave the device but are counted anyway."""

_KERNELS = 500_000_000
"""Bytes of kernels that a CPU compiles for 16 bits and rows of many lengths. Fitted to SFT runs."""

_HEAP = 1.5
"""Factor on activations on a CPU: what a layer keeps lies between what it frees, more so in glibc's
heap than in CUDA's caching allocator. Fitted to SFT runs of 1,100 to 3,300 tokens."""

_BRANCHES = 1.2
"""Factor on activations if prompts are shared: each branch has its own copy of their keys and
values. Fitted to runs of 2,800 and 4,000 tokens."""

_SMALLEST = 512
"""Smallest token budget of a plan."""

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process at its peak.

    Args:
        libraries: Python, torch and transformers themselves.
        weights: the trained model's weights.
        reference: other models: reference, value and reward models.
        training_state: gradients and optimizer moments.
        activations: kept for the backward pass of one micro-batch.
        workspace: logits of a chunk, temporary gradients, keys and values for sampling, kernels.
        merging: for verifying the merged model after training, in addition to `libraries`.
        peak: on the device; merging always runs on the CPU.
    """

    libraries: int
    weights: int
    reference: int
    training_state: int
    activations: int
    workspace: int
    merging: int
    peak: int


def estimate_memory(
    recipe: Recipe,
    model: ModelFacts,
    hardware: HardwareFacts,
    tokens: int,
    checkpointing: bool,
    reference: str | None = None,
    reward_models: int = 0,
    documents: int = 0,
) -> MemoryEstimate:
    """Estimate the peak of a process that reads `tokens` tokens in one pass.

    Args:
        recipe: gives precision, adapter and optimizer.
        model: sizes of the model.
        hardware: the device.
        tokens: tokens of the largest micro-batch.
        checkpointing: whether activations are recomputed layer by layer.
        reference: kind of the reference; None without one.
        reward_models: number of separately loaded reward models.
        documents: number of documents in `tokens`; a trained prefix precedes each.

    Returns:
        The estimate, term by term.
    """
    wide, adapted = _BYTES[recipe.model.dtype], has_adapter(recipe.adapter)
    on_cpu, libraries = hardware.device == "cpu", 600_000_000
    trained = _kept_as_trained(recipe, model)
    if adapted:
        weights = _base_bytes(recipe, model, wide) + trained * 4
    else:
        # Trained weights are float32; autocast keeps narrow copies of them as well.
        weights = model.parameters * (4 if wide == 4 else 4 + wide)
    per_weight = 4 + _moment_bytes(recipe, model)  # gradient and moments
    state = round(trained * per_weight)
    layer = tokens * _layer_bytes(recipe, model, wide, on_cpu=on_cpu)
    layer += _prefix_bytes(model, wide, tokens, documents)
    if checkpointing:
        activations = tokens * model.layers * model.hidden * 4 + layer
    else:
        activations = model.layers * layer
    activations += tokens * model.hidden * (wide + 4)
    activations = round(activations * (_HEAP if on_cpu else 1.1))
    if recipe.shares_prompts:
        activations = round(activations * _BRANCHES)
    # PEFT makes a changed copy of each stack and its gradient; copies stay for the backward pass.
    copies = 1 if checkpointing else model.layers
    activations += (copies + 1) * (model.changed_experts // model.layers) * wide
    workspace = _workspace_bytes(recipe, model, hardware.device, tokens, wide)
    workspace += _KERNELS * (on_cpu and wide == 2)
    merging = _merging_bytes(model, wide) if recipe.merge and adapted else 0
    second = 0
    if reference == "frozen_copy":  # stored like the policy's base weights
        second = _base_bytes(recipe, model, wide) if adapted else model.parameters * 4
    further = recipe.further_memory(MemoryTerms(model, wide, weights, per_weight, reward_models))
    second += further.models
    state += further.training_state
    workspace += further.workspace
    training = libraries + weights + second + state + activations + workspace
    return MemoryEstimate(
        libraries=libraries,
        weights=weights,
        reference=second,
        training_state=state,
        activations=activations,
        workspace=workspace,
        merging=merging,
        peak=max(training, libraries + merging) if on_cpu else training,
    )


def fits(recipe: Recipe, model: ModelFacts, hardware: HardwareFacts) -> bool:
    """Whether the smallest micro-batches of a run fit.

    Args:
        recipe: with its dtype chosen.
        model: sizes of the model.
        hardware: the device and its free memory.
    """
    kind = getattr(getattr(recipe, "reference", None), "kind", None)
    memory = estimate_memory(
        recipe,
        model,
        hardware,
        tokens=max(recipe.data.max_length, _SMALLEST),
        checkpointing=recipe.training.gradient_checkpointing is not False,
        reference=kind,
        documents=1,
    )
    return memory.peak <= ROOM * hardware.memory


def _kept_as_trained(recipe: Recipe, model: ModelFacts) -> int:
    """Weights with gradient and moments, including the frozen half of a start from the base."""
    return model.trainable * (2 if takes_from_base(recipe.adapter) else 1)


def _moment_bytes(recipe: Recipe, model: ModelFacts) -> float:
    """Bytes of optimizer state per trained weight. Adafactor keeps a row and a column of float32:
    of an adapter's matrix with `rank` rows a `rank`-th of its size, of a layer next to nothing."""
    if recipe.training.optimizer != "adafactor":
        return _MOMENT_BYTES[recipe.training.optimizer]
    return 4 / getattr(recipe.adapter, "rank", model.hidden / 2)


def _merging_bytes(model: ModelFacts, wide: int) -> int:
    """Three files of at most 5 GB each, and embeddings and vocabulary head in float32."""
    merging = 3 * min(_MERGED_FILE, model.parameters * wide) + _MERGE_ROOM
    merging += 2 * 4 * model.vocabulary * model.hidden
    if model.experts:  # the base and the merged model are loaded whole
        merging += 2 * model.parameters * wide
    return merging


def _base_bytes(recipe: Recipe, model: ModelFacts, wide: int) -> int:
    """Bytes of the frozen base; embeddings, vocabulary head and experts are never quantized."""
    kind = recipe.model.quantization
    if kind == "none":
        return model.parameters * wide
    narrow = model.layers * (
        2 * model.hidden * (model.attention_width + model.key_value_width)
        + 3 * model.hidden * model.intermediate
    )
    if model.experts:
        narrow = model.layers * 2 * model.hidden * (model.attention_width + model.key_value_width)
    narrow = min(narrow, model.parameters)
    return round(narrow * _QUANTIZED_BYTES[kind]) + (model.parameters - narrow) * wide


def _workspace_bytes(recipe: Recipe, model: ModelFacts, device: str, tokens: int, wide: int) -> int:
    """Temporary bytes of a pass, besides what it keeps for the backward pass."""
    rows = min(tokens * 4 * model.vocabulary, logits_bytes(device))
    workspace = 3 * max(rows, 16 * 4 * model.vocabulary)  # logits of a chunk
    workspace += tokens * (4 * model.intermediate + 4 * model.hidden) * wide
    if recipe.model.quantization != "none":  # the largest layer, dequantized for its product
        workspace += model.hidden * model.intermediate * (4 + wide)
    return workspace


def _prefix_bytes(model: ModelFacts, wide: int, tokens: int, documents: int) -> int:
    """Bytes that attention keeps per layer for a prefix: its output, from which the rows' output is
    copied, and queries, keys, values and output of the prefix before each document."""
    if not model.prefix:
        return 0
    a, k = model.attention_width, model.key_value_width
    return (tokens * a + documents * model.prefix * (2 * a + 2 * k)) * wide


def _layer_bytes(recipe: Recipe, model: ModelFacts, wide: int, *, on_cpu: bool) -> int:
    """Bytes that one decoder layer keeps for one token."""
    h, i = model.hidden, model.intermediate
    a, k = model.attention_width, model.key_value_width
    norms = 2 * h * (wide if on_cpu else 4)  # each norm's input
    attention = (2 * a + 2 * k) * wide  # queries, keys, values, output
    feed_forward = 2 * i * wide  # gate and up
    # Inputs of products, each kept once, however many linear layers read it; those of frozen
    # layers and the attention's output need nothing more.
    if model.prefix:
        inputs = 0
    elif not is_remade(recipe.adapter):
        inputs = (2 * h + i) * wide
    else:
        inputs = 0 if on_cpu and wide == 4 else 2 * h * wide
    return norms + attention + feed_forward + inputs
