"""Reward model -> a sequence classifier with one label that plain transformers loads, verified.

transformers reads the reward at the last token that is not padding. Two things follow, and both
are settled here: the padding token must be one that no completion ends with, and the chat template
that is saved with the classifier must end where the reward was learned, at the end-of-turn token.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from alignkit.errors import ModelError, RoundingError
from alignkit.models.base.loading import BaseModel, load_tokenizer
from alignkit.models.merging.dense import MergedWeights, Onto, read_merged
from alignkit.models.merging.report import Drift, QuantizedReport
from alignkit.models.quiet import quiet_transformers
from alignkit.models.rewards.chat import choose_padding, end_at_turn, missing_end
from alignkit.models.rewards.head import read_head, read_statistics
from alignkit.models.scoring.scorer import causal_model
from alignkit.models.transformers_parts import has_classifier
from alignkit.models.weights.streaming import build_without_weights
from alignkit.models.weights.writing import (
    replace_model,
    require_free,
    write_and_read,
    write_settings,
)
from alignkit.packed import IntArray

CHECK_ROWS = 8
"""Rows whose rewards are compared."""

MAX_SHIFT = 0.1
"""Largest accepted difference of a reward, as a share of the rewards' spread."""

MIN_SHIFT = 0.02
"""Accepted whatever the spread: it moves the probability that one completion is preferred to
another, σ(r_w - r_l), by half a percentage point at most. Rounding a 135M model's update to
bfloat16 comes near it: 0.018 in one run, 0.023 in another."""


@dataclass(frozen=True)
class ClassifierReport:
    """How faithful the written classifier is.

    Args:
        output: its folder.
        dtype: of the written weights; the head stays as exact as that allows.
        modules: adapted layers that were merged; 0 for full weights.
        survived: projection of the rounded update onto the exact one; 1.0 is all of it.
        max_difference: largest |difference| of a reward to the trained model's, both in float32
            arithmetic; the classifier reads the rows as one padded batch.
        spread: standard deviation of the trained model's rewards on these rows.
        rows: that were compared.
        pad_token: the padding token of the classifier; None if the tokenizer has none to spare, so
            that rows must be scored one at a time.
        quantized: for an adapter that was trained over quantized weights.
    """

    output: str
    dtype: str
    modules: int
    survived: float
    max_difference: float
    spread: float
    rows: int
    pad_token: str | None
    quantized: QuantizedReport | None = None

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """The report in sentences."""
        what = f"merged {self.modules} layers and the head" if self.modules else "wrote all weights"
        kept = f"; {self.survived:.1%} of the update survived rounding" if self.modules else ""
        lines = [
            f"{what} into {self.output} ({self.dtype}), a sequence classifier with one label",
            f"against the trained model on {self.rows} rows: largest reward difference "
            f"{self.max_difference:.2g} (their spread is {self.spread:.2g}){kept}",
        ]
        if self.pad_token is None:
            lines.append("the tokenizer has no token to pad with: score one row at a time")
        return [*lines, *([self.quantized.line()] if self.quantized else [])]


def merge_reward(
    base: BaseModel,
    adapter: Path,
    output: Path,
    *,
    rows: Sequence[IntArray],
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stop_tokens: Sequence[int] = (),
    overwrite: bool = False,
    onto: Onto = "auto",
) -> ClassifierReport:
    """Write adapter and head of a reward model as a sequence classifier, and verify it.

    Args:
        base: the model the adapter was trained on.
        adapter: PEFT folder with a scalar head.
        output: folder to write; it appears only once it is verified.
        rows: token ids of real rows, each ending where its reward is read.
        dtype: of the written weights.
        tokenizer: saved with the weights; None takes the base's.
        stop_tokens: ids that end a completion.
        overwrite: replace an existing output.
        onto: see `merge_adapter`; `auto` avoids the original weights if a reward differs by more
            than rounding may change it.

    Returns:
        The measured differences.

    Raises:
        ModelError: the output exists or the adapter does not fit.
        RoundingError: the rewards differ.
    """
    require_free(output, overwrite=overwrite)
    head = read_head(adapter)
    merge = MergedWeights(base, adapter, dtype)
    samples = [torch.as_tensor(row) for row in rows[:CHECK_ROWS]]
    exact, quantized = merge.choose(
        lambda model: _rewards(model, head, samples), onto, _reward_drift
    )
    config = classifier_config(merge.config)
    kind, trust = AutoModelForSequenceClassification, base.trust_remote_code
    tokenizer, pad = _prepare(config, tokenizer or load_tokenizer(base), stop_tokens)
    classifier = build_without_weights(kind, config, trust_remote_code=trust)
    with replace_model(output) as written:
        names = [name for name in merge.stored if name in classifier.state_dict()]
        merge.write(written, names, {"score.weight": head.weight.detach().to(dtype)})
        write_settings(base, classifier, dtype, tokenizer, written)
        rewards = read_merged(
            written, kind, config, lambda model: _classify(model, samples), trust_remote_code=trust
        )
        report = _compare(output, dtype, pad, exact, rewards)
        report = dataclasses.replace(
            report, survived=merge.survived, modules=merge.modules, quantized=quantized
        )
        statistics = read_statistics(adapter)
        if statistics is not None:
            statistics.save(written)
    return report


def write_reward(
    model: PreTrainedModel,
    head: nn.Linear,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    dtype: torch.dtype,
    rows: Sequence[IntArray],
    stop_tokens: Sequence[int],
) -> ClassifierReport:
    """Write a reward model whose weights were all trained; see `merge_reward`.

    Args:
        model: causal language model; cast in place.
        head: its scalar head.
        tokenizer: saved with it.
        output: folder to write, replaced if it exists.
        dtype: of the written weights.
        rows: token ids of real rows.
        stop_tokens: ids that end a completion.
    """
    samples = [torch.as_tensor(row) for row in rows[:CHECK_ROWS]]
    inner = causal_model(model).cpu().float().eval()
    with quiet_transformers():  # packed attention cannot read plain rows
        inner.set_attn_implementation("eager")
    head = head.cpu()
    exact = _rewards(inner, head, samples)
    classifier = build_classifier(inner, head)
    tokenizer, pad = _prepare(classifier.config, tokenizer, stop_tokens)
    kind = AutoModelForSequenceClassification
    read = partial(kind.from_pretrained, dtype=dtype, use_safetensors=True)
    with replace_model(output) as written:
        stored = write_and_read(classifier.to(dtype), tokenizer, written, read)
        return _compare(output, dtype, pad, exact, _classify(stored.float(), samples))


def require_classifier(config: PreTrainedConfig) -> None:
    """Refuse an architecture that transformers has no sequence classifier for.

    Raises:
        ModelError: there is none, so that no merged reward model could be loaded.
    """
    if not has_classifier(config):
        raise ModelError(
            f"transformers has no sequence classifier for {config.model_type!r}, so there is no "
            "merged/ that it could load",
            hint="train an adapter with merge=false, and use adapter/, which holds it and the head",
        )


def classifier_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of a language model as that of a classifier with one label.

    Raises:
        ModelError: transformers has no sequence classifier for this architecture.
    """
    config = copy.deepcopy(config)
    config.num_labels = 1
    require_classifier(config)
    return config


def build_classifier(model: PreTrainedModel, head: nn.Linear) -> PreTrainedModel:
    """The language model's decoder with a classification head with one label.

    Args:
        model: causal language model; the decoder is shared, not copied.
        head: `[1, H]`.

    Raises:
        ModelError: transformers has no sequence classifier for this architecture.
    """
    config = classifier_config(model.config)
    with quiet_transformers(), torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config)
    setattr(classifier, classifier.base_model_prefix, model.get_decoder())
    classifier.score = nn.Linear(head.in_features, 1, bias=False)
    classifier.score.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    return classifier


def _prepare(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, stop_tokens: Sequence[int]
) -> tuple[Any, str | None]:
    """The tokenizer of a classifier and its padding token, also set in the configuration."""
    tokenizer = copy.deepcopy(tokenizer)
    pad = choose_padding(tokenizer, stop_tokens)
    config.pad_token_id = None if pad is None else tokenizer.convert_tokens_to_ids(pad)
    if pad is not None:
        tokenizer.pad_token = pad
    tail = missing_end(tokenizer, stop_tokens)
    tokenizer.chat_template = end_at_turn(tokenizer.chat_template, tail)
    return tokenizer, pad


def _limit(exact: torch.Tensor) -> float:
    return max(MIN_SHIFT, MAX_SHIFT * float(exact.std(correction=0)))


def _reward_drift(trained: torch.Tensor, original: torch.Tensor) -> Drift:
    furthest, limit = float((original - trained).abs().max()), _limit(trained)
    distance = f"a reward differs by {furthest:.2g}"
    means = float(trained.mean()), float(original.mean())
    return Drift("mean reward", *means, distance, limit, furthest > limit)


def _compare(
    output: Path,
    dtype: torch.dtype,
    pad: str | None,
    exact: torch.Tensor,
    rewards: torch.Tensor,
) -> ClassifierReport:
    report = ClassifierReport(
        output=str(output),
        dtype=str(dtype).removeprefix("torch."),
        modules=0,
        survived=1.0,
        max_difference=float((rewards - exact).abs().max()),
        spread=float(exact.std(correction=0)),
        rows=len(exact),
        pad_token=pad,
    )
    limit = _limit(exact)
    if not report.max_difference <= limit:
        raise RoundingError(
            f"the merged reward model is not faithful: a reward differs by "
            f"{report.max_difference:.3g}, and rounding may change it by at most {limit:.3g}",
            hint="merge into wider weights with --dtype float32; nothing was written",
        )
    return report


@torch.no_grad()
def _rewards(model: Any, head: nn.Linear, samples: list[torch.Tensor]) -> torch.Tensor:
    """`[S]` rewards of the trained model, in one pass: padding after a row does not reach it."""
    decoder = causal_model(model).get_decoder()
    ids = nn.utils.rnn.pad_sequence(samples, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in samples], batch_first=True)
    hidden = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    last = hidden[torch.arange(len(samples)), torch.tensor([len(one) - 1 for one in samples])]
    rewards: torch.Tensor = head(last.float())
    return rewards[:, 0]


@torch.no_grad()
def _classify(model: Any, samples: list[torch.Tensor]) -> torch.Tensor:
    """`[S]` rewards as a user of plain transformers gets them."""
    pad = model.config.get_text_config().pad_token_id
    if pad is None:
        return torch.cat([model(input_ids=ids[None]).logits[:, 0] for ids in samples])
    padded = nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=pad)
    ones = [torch.ones_like(ids) for ids in samples]  # a row may hold the token as text
    mask = nn.utils.rnn.pad_sequence(ones, batch_first=True)
    rewards: torch.Tensor = model(input_ids=padded, attention_mask=mask).logits[:, 0]
    return rewards
