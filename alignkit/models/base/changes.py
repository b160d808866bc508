"""What a recipe changes in a base before it is trained: longer context, more tokens.

The changes belong to the base as an adapter sees it, so they are stored with the adapter and made
again whenever it is read, merged or continued.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import AddedToken, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from alignkit.errors import ModelError
from alignkit.recipe.rope import RopeSpec


@dataclass(frozen=True)
class BaseChanges:
    """Changes of a base.

    Args:
        rope: scaled positions; None changes nothing.
        tokens: texts that become one token each.
        rows: of embedding and output head, where an adapter holds all of them and has another
            number of them than the base; 0 keeps the base's.
    """

    rope: RopeSpec | None = None
    tokens: tuple[str, ...] = ()
    rows: int = field(default=0, repr=False)  # its repr is part of hashes that older versions kept

    @property
    def resizes(self) -> bool:
        """Whether embedding and output head have another number of rows than the base's."""
        return bool(self.tokens or self.rows)


UNCHANGED = BaseChanges()


def scale_positions(config: PreTrainedConfig, rope: RopeSpec) -> None:
    """Put scaled positions into a configuration, as transformers and vLLM read them.

    Args:
        config: changed in place.
        rope: kind and factor of the scaling.

    Raises:
        ModelError: the model has no rotary positions, or they are scaled already.
    """
    text = config.get_text_config()
    stored = getattr(text, "rope_parameters", None)
    if not stored:
        raise ModelError(
            f"model.rope_scaling has no use: a {text.model_type!r} model has no rotary positions",
            hint="remove model.rope_scaling",
        )
    per_kind = "rope_theta" not in stored
    own = dict(stored["full_attention"] if per_kind else stored)
    if own.get("rope_type", "default") != "default":
        raise ModelError(
            f"the base's positions are scaled already: {own['rope_type']}",
            hint="remove model.rope_scaling, or choose a base without it",
        )
    original = rope.original_context or int(text.max_position_embeddings)
    own |= {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "yarn":
        own["original_max_position_embeddings"] = original
    # Dynamic scaling starts where this ends, so it stays the original context.
    longest = original if rope.kind == "dynamic" else round(original * rope.factor)
    text.max_position_embeddings = longest
    text.rope_parameters = {**stored, "full_attention": own} if per_kind else own


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[list[int]]:
    """Make each text one token.

    Args:
        tokenizer: changed in place.
        tokens: the texts; none may be a token already.

    Returns:
        For each text the ids it was split into before.

    Raises:
        ModelError: a text is a token already.
    """
    pieces = []
    twice = sorted({text for text in tokens if list(tokens).count(text) > 1})
    if twice:
        raise ModelError(
            f"model.add_tokens names {twice[0]!r} more than once", hint="name each token once"
        )
    for text in tokens:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) == 1 and tokenizer.decode(ids) == text:
            raise ModelError(
                f"model.add_tokens names {text!r}, which is a token already: {ids[0]}",
                hint="remove it",
            )
        pieces.append(ids)
    # Not special: they are part of responses, and decoding leaves special tokens out.
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in tokens])
    return pieces


def new_ids(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Ids of added tokens."""
    return [int(index) for index in tokenizer.convert_tokens_to_ids(list(tokens))]


def grow(
    weight: torch.Tensor, ids: Sequence[int], pieces: Sequence[Sequence[int]], rows: int = 0
) -> torch.Tensor:
    """An embedding or output matrix with rows for new tokens.

    Args:
        weight: `[V, H]`, or `[V]` for a bias.
        ids: of the new tokens.
        pieces: what each was split into before; its row starts as their mean.
        rows: to end up with, perhaps fewer; 0 for as many as there are and the ids ask for.

    Returns:
        The matrix; other new rows are zero.
    """
    rows = rows or max(len(weight), max(ids) + 1)
    grown = weight.new_zeros(rows, *weight.shape[1:])
    grown[: len(weight)] = weight[:rows]
    for index, parts in zip(ids, pieces, strict=True):
        grown[index] = weight[list(parts)].float().mean(0).to(weight.dtype)
    return grown


def grow_model(
    model: PreTrainedModel, ids: Sequence[int], pieces: Sequence[Sequence[int]], rows: int = 0
) -> None:
    """Give a model's embedding and output head another number of rows; see `grow`."""

    def _parameter(weight: torch.Tensor) -> nn.Parameter:
        data = grow(weight.data, ids, pieces, rows)
        return nn.Parameter(data, requires_grad=weight.requires_grad)

    with torch.no_grad():
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        tied = head is not None and head.weight is embedding.weight
        embedding.weight = _parameter(embedding.weight)
        embedding.num_embeddings = len(embedding.weight)
        if head is not None:
            head.weight = embedding.weight if tied else _parameter(head.weight)
            head.out_features = len(head.weight)
            if getattr(head, "bias", None) is not None:
                head.bias = _parameter(head.bias)
    model.config.get_text_config().vocab_size = len(embedding.weight)


def grown(
    weight: Callable[[str], torch.Tensor],
    names: Sequence[str],
    ids: Sequence[int],
    pieces: Sequence[Sequence[int]],
    rows: int = 0,
) -> Callable[[str], torch.Tensor]:
    """Stored weights as those of a model that has another number of rows.

    Args:
        weight: gives a stored weight by its name.
        names: of embedding and head.
        ids: of the new tokens.
        pieces: see `grow`.
        rows: see `grow`.
    """

    def grown_weight(name: str) -> torch.Tensor:
        stored = weight(name)
        return grow(stored, ids, pieces, rows) if name in names else stored

    return grown_weight
