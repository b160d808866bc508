"""Adapters that TRL's trainers wrote are merged and checked like our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from alignkit.jobs.merge import MergeOptions, merge_run
from alignkit.models.opening import open_model

IDS = torch.arange(50, 80)[None]
SHARED: dict[str, Any] = {
    "max_steps": 2,
    "learning_rate": 5e-2,
    "per_device_train_batch_size": 2,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "gradient_checkpointing": False,
}
PAIRS = [
    {"prompt": f"Say {n}", "chosen": f"the number is {n}", "rejected": f"no, {n + 1}"}
    for n in range(8)
]


def train(stage: str, base: Path, folder: Path) -> Path:
    """Two steps of a TRL trainer; the folder that its `save_model` wrote."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    tokenizer = AutoTokenizer.from_pretrained(base)
    common: dict[str, Any] = {"processing_class": tokenizer, "peft_config": config}
    options = {"output_dir": str(folder), **SHARED}
    trainer: Any
    if stage == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=1, dtype=torch.float32
        )
        model.config.pad_token_id = tokenizer.pad_token_id
        rows = [
            {key: f"{row['prompt']} {row[key]}" for key in ("chosen", "rejected")} for row in PAIRS
        ]
        common["peft_config"] = LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS"
        )
        trainer = RewardTrainer(
            model, args=RewardConfig(**options), train_dataset=Dataset.from_list(rows), **common
        )
    else:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if stage == "sft":
            rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
            make: Any = SFTTrainer, SFTConfig
        else:
            rows, make = PAIRS, (DPOTrainer, DPOConfig)
        trainer = make[0](
            model, args=make[1](**options), train_dataset=Dataset.from_list(rows), **common
        )
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    return folder / "adapter"


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_language_models(stage: str, tiny_base: Path, tmp_path: Path) -> None:
    adapter = train(stage, tiny_base, tmp_path)
    report = merge_run([str(adapter)], MergeOptions(base=str(tiny_base), dtype="float32"))
    assert report.modules == 14
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    untouched = base(IDS).logits.detach()
    exact = PeftModel.from_pretrained(base, str(adapter)).eval()(IDS).logits.detach()
    merged = AutoModelForCausalLM.from_pretrained(adapter / "merged", dtype=torch.float32)
    torch.testing.assert_close(merged(IDS).logits.detach(), exact, rtol=1e-5, atol=3e-4)
    assert (exact - untouched).abs().max() > 1e-2


def test_reward_models(tiny_base: Path, tmp_path: Path) -> None:
    adapter = train("reward", tiny_base, tmp_path)
    report = merge_run([str(adapter)], MergeOptions(base=str(tiny_base), dtype="float32"))
    assert report.modules == 4
    opened = open_model(str(adapter), dtype=torch.float32, base=str(tiny_base))
    assert opened.head is not None
    decoder = opened.model.get_base_model().get_decoder()
    with torch.no_grad():
        exact = opened.head(decoder(input_ids=IDS).last_hidden_state[:, -1])
        merged = AutoModelForSequenceClassification.from_pretrained(
            adapter / "merged", dtype=torch.float32
        )
        found = merged(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-4)
