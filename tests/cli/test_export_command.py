"""`alignkit export`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commandline import CommandLine, refused
from peft import LoraConfig, get_peft_model
from tiny import save_tiny, tiny_model
from transformers import AutoModelForCausalLM


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_gguf_and_modelfile(alignkit: CommandLine, tiny_base: Path, tmp_path: Path) -> None:
    done = alignkit("export", "gguf", tiny_base, cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert names_in(tmp_path) == ["tiny-llama-f16.Modelfile", "tiny-llama-f16.gguf"]
    assert done.stdout.splitlines() == [
        "ollama create tiny-llama -f tiny-llama-f16.Modelfile",
        "ollama run tiny-llama",
    ]
    assert "all 21 tensors read back and compared with the source: 16 f16, 5 f32" in done.stderr
    assert "KL" in done.stderr
    text = (tmp_path / "tiny-llama-f16.Modelfile").read_text(encoding="utf-8")
    assert text.startswith("FROM ./tiny-llama-f16.gguf\nTEMPLATE ")
    assert text.endswith('PARAMETER stop "<|im_end|>"\n')
    again = alignkit("export", "gguf", tiny_base, cwd=tmp_path)
    refused(again, "tiny-llama-f16.Modelfile already exists", "add --overwrite, or name")
    answer = alignkit("generate", "tiny-llama-f16.gguf", "the cat", "--json", cwd=tmp_path)
    assert answer.code == 0, answer.stderr


def test_gguf_as_json(alignkit: CommandLine, tmp_path: Path) -> None:
    save_tiny(tmp_path / "run/merged", "mistral")
    options = ("--type", "q8_0", "--output", "out/m.gguf", "--json")
    done = alignkit("export", "gguf", "run", *options, cwd=tmp_path)
    assert done.code == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["output"], report["type"]) == ("out/m.gguf", "q8_0")
    assert report["tensors"] == {"q8_0": 16, "f32": 5}
    assert 0 < report["logits"]["mean_kl"] < 1e-2
    assert report["modelfile"] == "out/m.Modelfile"
    assert report["commands"][0] == "ollama create run -f out/m.Modelfile"
    assert any("the window, 8 tokens" in note for note in report["notes"])
    assert names_in(tmp_path / "out") == ["m.Modelfile", "m.gguf"]


def test_an_unknown_template_is_said(alignkit: CommandLine, tmp_path: Path) -> None:
    save_tiny(tmp_path / "m")
    path = tmp_path / "m/chat_template.jinja"
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}"
    path.write_text(template, encoding="utf-8")
    done = alignkit("export", "gguf", "m", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert "the Modelfile has no TEMPLATE" in done.stderr
    text = (tmp_path / "m-f16.Modelfile").read_text(encoding="utf-8")
    assert text == 'FROM ./m-f16.gguf\nPARAMETER stop "<|im_end|>"\n'


@pytest.mark.parametrize("bits", [8, 4])
def test_bnb(bits: int, alignkit: CommandLine, tiny_base: Path, tmp_path: Path) -> None:
    done = alignkit("export", "bnb", tiny_base, "--bits", bits, cwd=tmp_path)
    assert done.code == 0, done.stderr
    name = f"tiny-llama-{'int8' if bits == 8 else 'nf4'}"
    assert names_in(tmp_path) == [name]
    assert done.stdout == f"vllm serve {name}\n"
    assert "14 layers in" in done.stderr
    card = (tmp_path / name / "README.md").read_text(encoding="utf-8")
    assert "Made from tiny-llama by quantizing it with alignkit" in card
    assert "every tensor read back bit for bit" in card
    AutoModelForCausalLM.from_pretrained(tmp_path / name)
    report = json.loads(
        alignkit(
            "export", "bnb", tiny_base, "--bits", bits, "--overwrite", "--json", cwd=tmp_path
        ).stdout
    )
    assert (report["output"], report["layers"]) == (name, 14)


def test_what_is_refused(alignkit: CommandLine, tiny_base: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny_model(), config).save_pretrained(tmp_path / "adapter")
    save_tiny(tmp_path / "rm")
    about = tmp_path / "rm/config.json"
    values = json.loads(about.read_text(encoding="utf-8"))
    about.write_text(json.dumps({**values, "architectures": ["LlamaForSequenceClassification"]}))
    for command in (("gguf",), ("bnb", "--bits", "8")):
        done = alignkit("export", *command, "adapter", cwd=tmp_path)
        refused(done, "holds an adapter, not a whole model", "run `alignkit merge-lora")
        done = alignkit("export", *command, "rm", cwd=tmp_path)
        refused(done, "rm is a reward model, not a language model", "name the model it was")
    done = alignkit("export", "gguf", tiny_base, "--type", "q4", cwd=tmp_path)
    refused(done, "--type cannot be 'q4'", "choose one of f16, q8_0, bf16, f32")
    done = alignkit("export", "bnb", tiny_base, "--bits", "3", cwd=tmp_path)
    refused(done, "--bits cannot be 3", "8 or 4")
    done = alignkit("export", "gguf", tiny_base, "--output", "m.bin", cwd=tmp_path)
    refused(done, "--output must end in .gguf", "for example")
    assert names_in(tmp_path) == ["adapter", "rm"]
