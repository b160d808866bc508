"""Real rows to check a merged model on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from alignkit.data.dataset import TokenDataset, load_dataset
from alignkit.data.examples import RowKind
from alignkit.data.sources import load_source
from alignkit.data.tokenize import TokenizeSettings
from alignkit.packed import IntArray
from alignkit.recipe.assets import alignkit_home
from alignkit.recipe.rows import SourceSpec

SHIPPED_ROWS = "data_templates/sft/messages_eval.jsonl"


def check_rows(dataset: TokenDataset) -> Sequence[IntArray]:
    """Token ids of the first eight rows of a dataset, each with its first completion."""
    documents = [dataset[item] for item in range(min(8, len(dataset)))]
    pieces = [(document.prompt, document.branches[0].ids) for document in documents]
    return [np.concatenate(piece).astype(np.int64) for piece in pieces]


def file_rows(
    path: str | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[Sequence[IntArray], list[int]]:
    """Rows from a file, of any format but prompts.

    Args:
        path: of the file; None takes shipped ones, or plain text if the tokenizer
            has no chat template.
        tokenizer: of the model.

    Returns:
        Token ids, and the tokens that end the answers.
    """
    if path is None and tokenizer.chat_template is None:
        text = Path(__file__).read_text(encoding="utf-8")
        return [np.asarray(tokenizer(text)["input_ids"], np.int64)], []
    source = SourceSpec(path=path or SHIPPED_ROWS)
    settings = TokenizeSettings(1024, "truncate_right", rows=kind_of_rows(source))
    cache = alignkit_home() / "cache" / "tokens"
    dataset = load_dataset([source], tokenizer, settings, 0, cache)
    return check_rows(dataset), dataset.report.stop_tokens


def kind_of_rows(source: SourceSpec) -> RowKind:
    """What the first row of a source looks like."""
    first = load_source(source.model_copy(update={"take": 1})).rows[0].values
    keys = {key for key, value in first.items() if value is not None}
    if keys & {"chosen", "rejected"}:
        return "pairs"
    return "labelled" if "label" in keys else "answers"
