"""The shipped quickstart on the real 135M model, with a few short rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import CommandLine
from peft import PeftModel
from running import losses, steps_of, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

TURNS = [
    ["Name a fruit.", "An apple."],
    ["What is 2 + 2?", "4.", "And 3 + 3?", "6."],
    ["Say hello.", "Hello, my friend!"],
]
FEW = ["data.train=[{path: rows.jsonl}]", "training.batch_size=3", "data.eval=[]"]


def rows() -> list[dict[str, Any]]:
    """Chats behind a short system message, which takes the place of the template's long one."""
    system = {"role": "system", "content": "Be brief."}
    return [
        {
            "messages": [
                system,
                *(
                    {"role": ("user", "assistant")[number % 2], "content": text}
                    for number, text in enumerate(turns)
                ),
            ]
        }
        for turns in TURNS
    ]


@pytest.fixture(scope="module")
def run(
    alignkit: CommandLine,
    real_base: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("real")
    write_rows(folder / "rows.jsonl", rows())
    options = [*FEW, "training.max_steps=3", "output=run"]
    done = alignkit("sft", "quickstart/sft.yaml", *options, cwd=folder)
    assert done.code == 0, done.stderr
    return folder / "run"


def test_the_loss_falls(run: Path) -> None:
    # The same rows in each step, and a rate of 1e-3: after two steps it is clearly lower.
    found = losses(run)
    assert len(found) == 3
    assert all(0 < loss < 10 for loss in found)
    assert found[2] < found[0] - 0.1


@torch.no_grad()
def test_merged_is_base_and_adapter(run: Path, real_base: Path) -> None:
    # The merged weights are rounded to bfloat16, as the base's are.
    tokenizer = AutoTokenizer.from_pretrained(run / "merged")
    base = AutoModelForCausalLM.from_pretrained(real_base, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)
    text = tokenizer.apply_chat_template(rows()[1]["messages"], tokenize=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]

    def logprobs(model: Any) -> torch.Tensor:
        return model.eval()(input_ids=ids).logits[0].log_softmax(-1)  # [T, V]

    before, after = logprobs(base), logprobs(merged)
    adapted = logprobs(PeftModel.from_pretrained(base, str(run / "adapter")))
    rounded, trained = (
        float((adapted.exp() * (adapted - other)).sum(-1).mean()) for other in (after, before)
    )
    assert trained > 0.1
    assert rounded < 1e-3 * trained


def test_the_mask_decodes_to_the_completions(
    alignkit: CommandLine, real_base: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path / "rows.jsonl", rows())
    options = [*FEW, "--json", "--rows", str(len(TURNS))]
    done = alignkit("inspect", "quickstart/sft.yaml", *options, cwd=tmp_path)
    found = json.loads(done.stdout)
    tokenizer = AutoTokenizer.from_pretrained(real_base)
    for row, shown in zip(rows(), found["rows"], strict=True):
        trained = [i for i, label in zip(shown["ids"], shown["labels"], strict=True) if label > -1]
        answers = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
        assert tokenizer.decode(trained) == "".join(f"{text}<|im_end|>" for text in answers)


@torch.no_grad()
def test_the_first_loss_is_plain_transformers(
    alignkit: CommandLine, real_base: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path / "rows.jsonl", rows())
    options = [*FEW, "training.max_steps=1", "output=run", "model.dtype=float32", "merge=false"]
    done = alignkit("sft", "quickstart/sft.yaml", *options, cwd=tmp_path)
    assert done.code == 0, done.stderr
    (step,) = steps_of(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(real_base)
    model = AutoModelForCausalLM.from_pretrained(real_base, dtype=torch.float32)
    total, count = 0.0, 0
    for row in rows():
        turns = row["messages"]
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        labels = [-100] * len(ids)
        for number, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            head = tokenizer.apply_chat_template(
                turns[:number], tokenize=False, add_generation_prompt=True
            )
            answer = f"{head}{turn['content']}<|im_end|>"
            assert whole.startswith(answer)
            begin, end = (
                len(tokenizer(text, add_special_tokens=False)["input_ids"])
                for text in (head, answer)
            )
            labels[begin:end] = ids[begin:end]
        trained = sum(label > -1 for label in labels)
        loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        total += float(loss) * trained
        count += trained
    assert step["loss"] == pytest.approx(total / count, abs=1e-4)
