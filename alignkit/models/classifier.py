"""Reward model -> a sequence classifier with one label that plain transformers loads, verified.

transformers reads the reward at the last token that is not padding. Two things follow, and both
are settled here: the padding token must be one that no answer ends with, and the chat template
that is saved with the classifier must end where the reward was learned, at the end-of-turn token.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from alignkit.errors import ModelError, RoundingError
from alignkit.models.adapter_files import load_adapter
from alignkit.models.loading import BaseModel, load_model, load_tokenizer, quiet_transformers
from alignkit.models.merging import merge_layers
from alignkit.models.reward_head import read_head, read_statistics
from alignkit.models.scorer import causal_model
from alignkit.models.writing import beside, write_and_read
from alignkit.packed import IntArray

CHECK_ROWS = 8
"""Rows whose rewards are compared."""

MAX_SHIFT = 0.1
"""Largest accepted difference of a reward, as a share of the rewards' spread."""

MIN_SHIFT = 0.02
"""Accepted whatever the spread: it moves the probability that one answer is preferred to another,
σ(r_w - r_l), by half a percentage point at most. Rounding a 135M model's update to bfloat16 comes
near it: 0.018 in one run, 0.023 in another."""


@dataclass(frozen=True)
class ClassifierReport:
    """How faithful the written classifier is.

    Args:
        output: its folder.
        dtype: of the written weights; the head stays as exact as that allows.
        modules: adapted layers that were merged; 0 for full weights.
        survived: projection of the rounded update on the exact one; 1.0 is all of it.
        max_difference: largest |difference| of a reward to the trained model's, both in float32
            arithmetic; the classifier reads the rows as one padded batch.
        spread: standard deviation of the trained model's rewards on these rows.
        rows: that were compared.
        pad_token: the padding token of the classifier; None if the tokenizer has none to spare,
            and then rows must be scored one at a time.
    """

    output: str
    dtype: str
    modules: int
    survived: float
    max_difference: float
    spread: float
    rows: int
    pad_token: str | None

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
        return lines


def merge_reward(
    base: BaseModel,
    adapter: Path,
    output: Path,
    *,
    rows: Sequence[IntArray],
    dtype: torch.dtype,
    tokenizer: Any = None,
    stop_tokens: Sequence[int] = (),
    overwrite: bool = False,
) -> ClassifierReport:
    """Write adapter and head of a reward model as a sequence classifier, and verify it.

    Args:
        base: the model the adapter was trained on.
        adapter: PEFT folder with a scalar head.
        output: folder to write; stands there only once it is verified.
        rows: token ids of real rows, each ending where its reward is read.
        dtype: of the written weights.
        tokenizer: saved beside the weights; None takes the base's.
        stop_tokens: ids that end an answer.
        overwrite: replace an existing output.

    Returns:
        The measured differences.

    Raises:
        ModelError: the output exists or the adapter does not fit.
        RoundingError: the rewards differ.
    """
    if output.exists() and not overwrite:
        raise ModelError(
            f"{output} already exists", hint="add --overwrite, or name another --output"
        )
    head = read_head(adapter)
    model = load_adapter(load_model(base, torch.float32), adapter)
    samples = [torch.as_tensor(row) for row in rows[:CHECK_ROWS]]
    exact = _rewards(model, head, samples)
    survived, _, modules = merge_layers(model, dtype)
    with quiet_transformers():
        merged = model.merge_and_unload()
    del model
    classifier = build_classifier(merged, head)
    tokenizer = tokenizer or load_tokenizer(base)
    report = _write(classifier, tokenizer, output, dtype, samples, exact, stop_tokens)
    statistics = read_statistics(adapter)
    if statistics is not None:
        statistics.save(output)
    return dataclasses.replace(report, survived=survived, modules=modules)


def write_reward(
    model: Any,
    head: nn.Linear,
    tokenizer: Any,
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
        stop_tokens: ids that end an answer.
    """
    samples = [torch.as_tensor(row) for row in rows[:CHECK_ROWS]]
    inner = causal_model(model).cpu().float().eval()
    with quiet_transformers():  # packed attention reads no plain rows
        inner.set_attn_implementation("eager")
    head = head.cpu()
    exact = _rewards(inner, head, samples)
    return _write(
        build_classifier(inner, head), tokenizer, output, dtype, samples, exact, stop_tokens
    )


def require_classifier(config: Any) -> None:
    """Refuse an architecture that transformers has no sequence classifier for.

    Raises:
        ModelError: there is none, so that no merged reward model could be loaded.
    """
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise ModelError(
            f"transformers has no sequence classifier for {config.model_type!r}, so there is no "
            "merged/ that it could load",
            hint="set merge=false and use adapter/, which holds adapter and head; all weights "
            "cannot be trained",
        )


def build_classifier(model: Any, head: nn.Linear) -> Any:
    """The language model's decoder under a classification head with one label.

    Args:
        model: causal language model; the decoder is shared, not copied.
        head: `[1, H]`.

    Raises:
        ModelError: transformers has no sequence classifier of this architecture.
    """
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    require_classifier(config)
    with quiet_transformers(), torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config)
    setattr(classifier, classifier.base_model_prefix, model.get_decoder())
    classifier.score = nn.Linear(head.in_features, 1, bias=False)
    classifier.score.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    return classifier


def _write(
    classifier: Any,
    tokenizer: Any,
    output: Path,
    dtype: torch.dtype,
    samples: list[torch.Tensor],
    exact: torch.Tensor,
    stop_tokens: Sequence[int],
) -> ClassifierReport:
    tokenizer = copy.deepcopy(tokenizer)
    pad = choose_padding(tokenizer, stop_tokens)
    classifier.config.pad_token_id = None if pad is None else tokenizer.convert_tokens_to_ids(pad)
    if pad is not None:
        tokenizer.pad_token = pad
    tail = missing_end(tokenizer, stop_tokens)
    tokenizer.chat_template = end_at_turn(tokenizer.chat_template, tail)
    with beside(output) as written:
        found = write_and_read(
            classifier.to(dtype), tokenizer, written, AutoModelForSequenceClassification
        )
        rewards = _classify(found.float(), samples)
        report = ClassifierReport(
            output=str(output),
            dtype=str(dtype).removeprefix("torch."),
            modules=0,
            survived=1.0,
            max_difference=float((rewards - exact).abs().max()),
            spread=float(exact.std(correction=0)),
            rows=len(samples),
            pad_token=pad,
        )
        limit = max(MIN_SHIFT, MAX_SHIFT * report.spread)
        if not report.max_difference <= limit:
            raise RoundingError(
                f"the merged reward model is not faithful: a reward differs by "
                f"{report.max_difference:.3g}, and {limit:.3g} is the most that rounding may do",
                hint="merge into wider weights with --dtype float32; nothing was written",
            )
    return report


def choose_padding(tokenizer: Any, stop_tokens: Sequence[int]) -> str | None:
    """A special token that ends no answer and stands in no chat.

    Args:
        tokenizer: with its chat template.
        stop_tokens: ids that end an answer.
    """
    used = {tokenizer.eos_token, tokenizer.bos_token, *tokenizer.convert_ids_to_tokens(stop_tokens)}
    template = str(tokenizer.chat_template or "")
    own = [tokenizer.pad_token, tokenizer.unk_token]
    others = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    for token in [*own, *others]:
        if token is not None and token not in used and token not in template:
            return str(token)
    return None


def missing_end(tokenizer: Any, stop_tokens: Sequence[int]) -> str:
    """EOS, where answers were trained to end with it and the chat template does not write it."""
    stops = tokenizer.convert_ids_to_tokens(list(stop_tokens))
    if not tokenizer.chat_template or tokenizer.eos_token not in stops:
        return ""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip()
    return "" if text.endswith(tuple(stops)) else str(tokenizer.eos_token)


def end_at_turn(template: str | dict[str, str] | None, tail: str = "") -> Any:
    """A chat template whose text ends with the last turn's last token, not with a line break.

    Args:
        template: Jinja source, or several by name; None if there is none.
        tail: written after that.
    """
    if template is None:
        return None
    if isinstance(template, dict):
        return {name: end_at_turn(text, tail) for name, text in template.items()}
    end = f" ~ {json.dumps(tail)}" if tail else ""
    return f"{{%- set whole -%}}{template}{{%- endset -%}}{{{{- whole.rstrip(){end} -}}}}"


@torch.no_grad()
def _rewards(model: Any, head: nn.Linear, samples: list[torch.Tensor]) -> torch.Tensor:
    """`[S]` rewards of the trained model, row by row."""
    decoder = causal_model(model).get_decoder()
    last = [decoder(input_ids=ids[None]).last_hidden_state[0, -1] for ids in samples]
    return head(torch.stack(last).float())[:, 0]


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
