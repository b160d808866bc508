"""Real rows to check a merged model on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from alignkit.data.dataset import TokenDataset, load_dataset
from alignkit.data.tokenize import TokenizeSettings
from alignkit.packed import IntArray
from alignkit.recipe.assets import alignkit_home
from alignkit.recipe.rows import SourceSpec

SHIPPED_ROWS = "data_templates/sft/messages_eval.jsonl"

CHECK_SETTINGS = TokenizeSettings(1024, "truncate_right", "completions")


def check_rows(dataset: TokenDataset) -> Sequence[IntArray]:
    """Token ids of the first eight rows of a dataset, each with its first completion."""
    documents = [dataset[item] for item in range(min(8, len(dataset)))]
    pieces = [(document.prompt, document.branches[0].ids) for document in documents]
    return [np.concatenate(piece).astype(np.int64) for piece in pieces]


def file_rows(path: str | None, tokenizer: PreTrainedTokenizerBase) -> Sequence[IntArray]:
    """Token ids of rows from a file.

    Args:
        path: rows of single completions; None takes shipped ones, or plain text if the tokenizer
            has no chat template.
        tokenizer: of the model.
    """
    if path is None and tokenizer.chat_template is None:
        text = Path(__file__).read_text(encoding="utf-8")
        return [np.asarray(tokenizer(text)["input_ids"], np.int64)]
    source = SourceSpec(path=path or SHIPPED_ROWS)
    cache = alignkit_home() / "cache" / "tokens"
    return check_rows(load_dataset([source], tokenizer, CHECK_SETTINGS, 0, cache))
