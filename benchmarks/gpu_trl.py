"""The steps of benchmarks/gpu.py as TRL's own trainers make them: padded, on the same rows."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from typing import Any

import datasets
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, SFTConfig, SFTTrainer  # type: ignore[attr-defined]  # exported lazily

from alignkit.data.documents import Document
from alignkit.peers.trl import Recorder, TokenizedDPO, peer_row

TRAINERS: dict[str, tuple[Any, Any]] = {
    "sft": (SFTTrainer, SFTConfig),
    "dpo": (TokenizedDPO, DPOConfig),
}


def time_steps(
    model: Any, stage: str, rows: Sequence[Document], steps: int, warm: int
) -> dict[str, float]:
    """Median seconds of a step over all rows, and the most that was allocated.

    Args:
        model: with its adapter, on the card.
        stage: `sft` or `dpo`.
        rows: of one step.
        steps: that are timed.
        warm: steps before them.
    """
    trainer, config = TRAINERS[stage]
    recorder, total = Recorder(), steps + warm
    datasets.disable_progress_bars()
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        arguments = config(
            output_dir=folder,
            per_device_train_batch_size=len(rows),
            max_steps=total,
            learning_rate=1e-4,
            bf16=True,
            gradient_checkpointing=False,
            train_sampling_strategy="sequential",
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            max_length=None,
        )
        trainer(
            model=model,
            args=arguments,
            train_dataset=datasets.Dataset.from_list([peer_row(stage, r) for r in rows] * total),
            processing_class=_tokenizer(),
            callbacks=[recorder],
        ).train()
    tokens = sum(row.num_tokens for row in rows)
    seconds = statistics.median(recorder.seconds[warm:])
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens a second": tokens / seconds,
        "peak GB": torch.cuda.max_memory_allocated() / 1e9,
    }


def _tokenizer() -> PreTrainedTokenizerFast:
    """For padding alone: the rows are token ids."""
    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )
