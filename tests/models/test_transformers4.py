"""What transformers 4 reads in a written folder, and that transformers 5 reads the same as before.

The second half needs an interpreter with transformers 4.57 and torch, named in
ALIGNKIT_TRANSFORMERS4.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MODELS, save_tiny
from transformers import AutoConfig, AutoTokenizer

from alignkit.models.base.loading import BaseModel, load_model
from alignkit.models.base.transformers4 import SAME_LOGITS, add_older_names, reader_line


def scaled(kind: str, **fields: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5e5, **fields}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in MODELS},
    "theta": ("llama", scaled("default")),
    "linear": ("qwen2", scaled("linear", factor=4.0)),
    "yarn": ("llama", scaled("yarn", factor=4.0, original_max_position_embeddings=512)),
    "llama3": (
        "llama",
        scaled(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_transformers5_reads_what_it_wrote(case: str, tmp_path: Path) -> None:
    family, fields = CASES[case]
    save_tiny(tmp_path, family, **fields)
    config, tokenizer = (kind.from_pretrained(tmp_path) for kind in (AutoConfig, AutoTokenizer))
    add_older_names(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(tokenizer)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.special_tokens_map == tokenizer.special_tokens_map
    values = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    assert values["rope_theta"] == rope["rope_theta"]
    assert (values["rope_scaling"] is None) == (rope["rope_type"] == "default")
    stored = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert stored["tokenizer_class"] != "TokenizersBackend"


def test_lists_of_special_tokens_have_their_older_name(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({"extra_special_tokens": ["<a>"]}), encoding="utf-8")
    add_older_names(tmp_path)
    assert json.loads(file.read_text(encoding="utf-8")) == {"additional_special_tokens": ["<a>"]}


def test_the_card_says_which_transformers() -> None:
    assert {load for load in SAME_LOGITS if "4.57 reads it" in reader_line(load)} == {*SAME_LOGITS}
    assert reader_line("gpt_oss").startswith("Read it with transformers 5: gpt_oss models were not")


READ = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype=torch.float32, attn_implementation="eager"
)
ids = AutoTokenizer.from_pretrained(sys.argv[1])(sys.argv[2])["input_ids"]
torch.save([ids, model(torch.tensor([ids])).logits], sys.argv[3])
"""


@pytest.mark.skipif("ALIGNKIT_TRANSFORMERS4" not in os.environ, reason="no transformers 4.57")
@pytest.mark.parametrize("case", CASES)
def test_transformers4_gives_the_same_logits(case: str, tmp_path: Path) -> None:
    family, fields = CASES[case]
    save_tiny(tmp_path, family, **fields)
    add_older_names(tmp_path)
    text, file = "Name three colours, and say why you like each of them.", tmp_path / "read.pt"
    old = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [os.environ["ALIGNKIT_TRANSFORMERS4"], "-c", READ, str(tmp_path), text, str(file)]
    subprocess.run(command, check=True, env=old, capture_output=True)
    ids, logits = torch.load(file)
    assert ids == AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    model = load_model(BaseModel(str(tmp_path)), torch.float32)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(torch.tensor([ids])).logits, logits, rtol=0, atol=1e-5)
