"""GGUF: the file is the model, as another reader understands it, or there is no file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file, save_file
from tiny import MODELS, TOKENIZER_OF, TOKENIZERS, save_tiny, tiny_tokenizer
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from alignkit.errors import ModelError
from alignkit.models.base.loading import BaseModel
from alignkit.models.export import gguf as exporting
from alignkit.models.export import gguf_check, gguf_files, gguf_names
from alignkit.models.export.gguf import GgufReport, export_gguf
from alignkit.models.export.gguf_settings import settings_of
from alignkit.models.export.gguf_tokens import tokenizer_from, vocabulary_of

TEXTS = [
    "It's 12345 o'clock, they'll come.  Two  spaces,\ttabs\n\n\nand lines\r\n",
    "naïve Ünïcödé 漢字かな 한국어 العربية 🙂👩‍👩‍👧",
    "def f(x):\n    return x**2  # 100%",
    " leading and trailing ",
    "x",
]


def rows_of(family: str) -> list[np.ndarray]:
    tokenizer = tiny_tokenizer(TOKENIZER_OF[family])
    return [np.asarray(tokenizer(text * 2)["input_ids"], np.int64) for text in TEXTS]


def export(folder: Path, family: str = "llama", kind: str = "f32", **options: Any) -> GgufReport:
    """Export folder/base to folder/model.gguf."""
    fields: dict[str, Any] = {"kind": kind, "rows": rows_of(family), "title": "a tiny model"}
    base = BaseModel(str(folder / "base"))
    return export_gguf(base, folder / "model.gguf", **{**fields, **options})


def tensors_in(path: Path) -> dict[str, np.ndarray]:
    return {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(str(path)).tensors}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("family", MODELS)
def test_every_family(family: str, kind: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", family)
    report = export(tmp_path, family, kind)
    assert names_in(tmp_path) == ["base", "model.gguf"]
    source = load_file(tmp_path / "base/model.safetensors")
    assert sum(report.tensors.values()) == len(source) == len(tensors_in(tmp_path / "model.gguf"))
    # Vectors stay f32; hidden and intermediate sizes, 64 and 96, divide by 32.
    vectors = sum(weight.dim() == 1 for weight in source.values())
    expected = {"f32": len(source)} if kind == "f32" else {kind: 0, "f32": vectors}
    assert report.tensors == {**expected, kind: len(source) - (kind != "f32") * vectors}
    if family == "gemma":
        assert report.logits is None
        assert "only tensors, settings and tokenizer were compared" in report.lines()[3]
        return
    assert report.logits is not None
    # float32 arithmetic on both sides; logits go up to 30.
    limit = {"f32": 1e-4, "f16": 0.1, "q8_0": 2.0}[kind]
    assert report.logits.max_logit_difference < limit
    assert report.logits.mean_kl < {"f32": 1e-8, "f16": 1e-5, "q8_0": 5e-3}[kind]
    assert (report.logits.mean_kl > 0) == (kind != "f32")


def test_qwen3(tmp_path: Path) -> None:
    """Norms of queries and keys, and heads wider than the hidden size says."""
    tokenizer = tiny_tokenizer("qwen")
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.15,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    report = export(tmp_path, "qwen2", "q8_0")
    assert report.architecture == "qwen3"
    assert report.tensors == {"q8_0": 16, "f32": 9}
    assert report.logits is not None
    assert 0 < report.logits.mean_kl < 5e-3


def test_a_model_called_mistral(tmp_path: Path) -> None:
    # transformers looks at the name: this one alone would send it to another loader.
    save_tiny(tmp_path / "base", "mistral")
    assert export(tmp_path, "mistral", title="mistral").logits is not None


def test_rows_of_queries_and_keys_in_closed_form(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", attention_bias=True)
    export(tmp_path)
    found = tensors_in(tmp_path / "model.gguf")
    source = load_file(tmp_path / "base/model.safetensors")
    # Heads of 16 rows: row i of the first half becomes row 2i, row i of the second 2i + 1.
    order = [16 * head + half * 8 + i for head in range(4) for i in range(8) for half in range(2)]
    layer = "model.layers.1.self_attn"
    for name, rows in (("q", order), ("k", order[:32])):
        for end in ("weight", "bias"):
            wanted = source[f"{layer}.{name}_proj.{end}"][rows].numpy()
            np.testing.assert_array_equal(found[f"blk.1.attn_{name}.{end}"], wanted)
    for here, there in (("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output")):
        wanted = source[f"model.layers.1.{here}.weight"].numpy()
        np.testing.assert_array_equal(found[f"blk.1.{there}.weight"], wanted)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_gemma_norms_are_factors(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", family)
    export(tmp_path, family)
    found = tensors_in(tmp_path / "model.gguf")
    source = load_file(tmp_path / "base/model.safetensors")
    norms = {"output_norm.weight": "model.norm.weight"}
    norms["blk.0.attn_norm.weight"] = "model.layers.0.input_layernorm.weight"
    if family == "gemma3":
        norms["blk.0.attn_q_norm.weight"] = "model.layers.0.self_attn.q_norm.weight"
    for there, here in norms.items():
        np.testing.assert_array_equal(found[there], source[here].numpy() + 1)
    embedding = source["model.embed_tokens.weight"].numpy()
    np.testing.assert_array_equal(found["token_embd.weight"], embedding)
    assert "output.weight" not in found


def test_rows_that_turn_wrongly_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Writer and tensor check share the layout: only the other reader's logits can tell.
    save_tiny(tmp_path / "base")
    monkeypatch.setattr(gguf_names, "turn_rows", lambda weight, heads: weight)
    with pytest.raises(ModelError, match="the file is not the model: KL"):
        export(tmp_path)
    assert names_in(tmp_path) == ["base"]


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_a_file_that_does_not_hold_what_was_written(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "base")
    right = exporting.write_file

    def spoil(path: Path, *rest: Any) -> None:
        right(path, *rest)
        place = next(
            t.data_offset for t in GGUFReader(str(path)).tensors if t.name == "blk.1.ffn_up.weight"
        )
        with open(path, "r+b") as file:
            file.seek(place + 2)  # behind the scale of a q8_0 block
            byte = file.read(1)[0]
            file.seek(place + 2)
            file.write(bytes([byte ^ 0b100]))

    monkeypatch.setattr(exporting, "write_file", spoil)
    with pytest.raises(ModelError, match=r"was written: blk\.1\.ffn_up\.weight differs"):
        export(tmp_path, kind=kind)
    assert names_in(tmp_path) == ["base"]


def test_q8_is_held_to_half_a_step() -> None:
    exact = torch.linspace(-1.27, 1.27, 64).reshape(2, 32)
    step = exact.abs().amax(1, keepdim=True) / 127
    assert gguf_check._within(exact + 0.49 * step, exact, "q8_0")
    # A step kept as f16 moves 127 of them by at most 127/2048 of a step: 0.562 in all.
    assert not gguf_check._within(exact + 0.57 * step, exact, "q8_0")


def test_rows_that_are_no_whole_blocks_stay_f16(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", intermediate_size=80)
    report = export(tmp_path, kind="q8_0")
    # down_proj of both layers has rows of 80; up and gate have rows of 64.
    assert report.tensors == {"q8_0": 14, "f16": 2, "f32": 5}
    assert "2 tensors are f16: their row length is not a multiple of 32" in report.lines()


def test_bfloat16_is_kept_bit_for_bit(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", dtype=torch.bfloat16)
    report = export(tmp_path, kind="bf16")
    assert report.logits is not None
    assert report.logits.max_logit_difference == 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_transformers_reads_it_alone(family: str, tmp_path: Path) -> None:
    """Settings, weights and tokenizer from nothing but the file."""
    save_tiny(tmp_path / "base", family)
    export(tmp_path, family)
    options = {"gguf_file": "model.gguf"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **options)
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    ids = torch.as_tensor(rows_of(family)[0][:8])[None]  # within the window
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, source(ids).logits, rtol=1e-5, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, **options)
    own = tiny_tokenizer(TOKENIZER_OF[family])
    assert tokenizer.chat_template == own.chat_template
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == own(text)["input_ids"]


# tokenizers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TOKENIZERS)
def test_tokenizers(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    vocabulary = vocabulary_of(tokenizer, len(tokenizer) + 3, [tokenizer.eos_token_id])
    assert len(vocabulary.tokens) == len(tokenizer) + 3
    assert vocabulary.types[-3:] == [5, 5, 5]  # unused
    spaced = family in ("mistral-sentencepiece", "gemma")
    assert vocabulary.kind == ("llama" if spaced else "gpt2")
    cuts = {"llama3": "llama-bpe", "qwen": "qwen2"}
    assert vocabulary.cut == ("default" if spaced else cuts.get(family, "gpt-2"))
    assert vocabulary.add_bos == (family not in ("chatml", "qwen"))
    assert vocabulary.add_space == (family == "mistral-sentencepiece")
    built = tokenizer_from(vocabulary)
    texts = [text for text in TEXTS if vocabulary.space_after_special or text[0] != " "]
    if vocabulary.space_after_special:
        turns = [{"role": "user", "content": "Hi  there"}]
        texts.append(tokenizer.apply_chat_template(turns, tokenize=False))
    for text in texts:
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert built.encode(text, add_special_tokens=False).ids == own


def test_what_readers_do_otherwise_is_said() -> None:
    def notes(family: str) -> str:
        tokenizer = tiny_tokenizer(family)
        return " ".join(vocabulary_of(tokenizer, len(tokenizer), []).notes)

    assert "decomposed Unicode gets other tokens" in notes("qwen")
    assert "see one space more" in notes("mistral-sentencepiece")
    assert notes("gemma") == notes("chatml") == ""


def test_digits_one_by_one() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    vocabulary = vocabulary_of(tokenizer, len(tokenizer), [])
    assert vocabulary.cut == "smollm"
    text = "in 1984, 2001 and 31415"
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer_from(vocabulary).encode(text).ids == own


def test_the_turns_end_is_no_eos() -> None:
    tokenizer = tiny_tokenizer("gemma")
    stop = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    found = vocabulary_of(tokenizer, len(tokenizer), [tokenizer.eos_token_id, stop]).special
    assert (found["eos"], found["eot"]) == (tokenizer.eos_token_id, stop)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Split(Regex(r"\w+"), "isolated")),
            r"splits words in a way that has no name there: \\w\+",
        ),
        (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace()), "splits text with"),
        (lambda t: setattr(t, "normalizer", normalizers.Lowercase()), "changes text first"),
    ],
)
def test_unknown_tokenizers(change: Any, sentence: str) -> None:
    tokenizer = tiny_tokenizer()
    change(tokenizer.backend_tokenizer)
    with pytest.raises(ModelError, match=sentence) as raised:
        vocabulary_of(tokenizer, len(tokenizer), [])
    assert raised.value.hint.startswith("serve the folder itself; the format has byte-level")


def test_merges_that_do_not_follow_scores(tmp_path: Path) -> None:
    # The reader merges whatever makes a token; this tokenizer has the token but not the merge.
    save_tiny(tmp_path / "base", "gemma")
    path = tmp_path / "base/tokenizer.json"
    about = json.loads(path.read_text(encoding="utf-8"))
    about["model"]["merges"] = about["model"]["merges"][:50]
    path.write_text(json.dumps(about), encoding="utf-8")
    with pytest.raises(ModelError, match="would split text differently from this"):
        export(tmp_path, "gemma")
    assert names_in(tmp_path) == ["base"]


def test_more_tokens_than_embeddings() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ModelError, match=r"ids up to \d+, but the model's embedding has 9 rows"):
        vocabulary_of(tokenizer, 9, [])


# settings ----------------------------------------------------------------------------------------


def settings(folder: Path, family: str = "llama", **overrides: Any) -> Any:
    save_tiny(folder, family, **overrides)
    return settings_of(AutoConfig.from_pretrained(folder))


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **more}


def test_rope_settings(tmp_path: Path) -> None:
    linear = settings(tmp_path / "a", rope_parameters=rope("linear", factor=4.0)).values
    assert (linear["rope.scaling.type"], linear["rope.scaling.factor"]) == ("linear", 4.0)
    told = rope("yarn", factor=4.0, original_max_position_embeddings=512, beta_fast=16.0)
    yarn = settings(tmp_path / "b", rope_parameters=told).values
    assert yarn["rope.scaling.type"] == "yarn"
    assert yarn["rope.scaling.original_context_length"] == 512
    assert yarn["rope.scaling.yarn_beta_fast"] == 16.0
    gemma = settings(tmp_path / "c", "gemma3").values
    assert gemma["rope.freq_base"] == 1e6
    assert gemma["rope.freq_base_swa"] == 1e4
    assert gemma["attention.sliding_window_pattern"] == 2


def test_llama3_factors_in_closed_form(tmp_path: Path) -> None:
    fields = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    told = rope("llama3", factor=8.0, original_max_position_embeddings=64, **fields)
    save_tiny(tmp_path / "base", rope_parameters=told)
    export(tmp_path)
    found = tensors_in(tmp_path / "model.gguf")["rope_freqs.weight"]
    # Wave lengths 2π · 10000^(2i/16) of heads of 16. Below 64/4 nothing changes, above 64/1 the
    # frequency is divided by 8; between, by 8 / (1 + 7 s) with s = (64 / length - 1) / 3.
    expected = []
    for i in range(8):
        length = 2 * np.pi * 10000 ** (2 * i / 16)
        share = min(max((64 / length - 1) / 3, 0), 1)
        expected.append(8 / (1 + 7 * share))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found[0] == 1
    assert 1 < found[1] < 8
    assert found[-1] == pytest.approx(8)


def test_gemma2_settings(tmp_path: Path) -> None:
    found = settings(tmp_path, "gemma2").values
    assert found["attn_logit_softcapping"] == 5.0
    assert found["final_logit_softcapping"] == 3.0
    assert found["attention.sliding_window"] == 8
    assert "attention.sliding_window_pattern" not in found  # one of two is what readers expect


def test_a_window_that_readers_do_not_know(tmp_path: Path) -> None:
    found = settings(tmp_path / "a", "mistral")
    assert found.values["context_length"] == 8
    assert "the window, 8 tokens, instead of 2,048" in found.notes[0]
    assert settings(tmp_path / "b", "mistral", sliding_window=None).notes == []


@pytest.mark.parametrize(
    ("family", "overrides", "sentence"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'.*readers of the format expect silu"),
        ("llama", {"rope_parameters": rope("dynamic", factor=2.0)}, "rope_type = 'dynamic'"),
        ("gemma2", {"query_pre_attn_scalar": 32}, "query_pre_attn_scalar = 32.*expect 16"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping = None"),
        ("gemma3", {"final_logit_softcapping": 3.0}, "final_logit_softcapping = 3.0"),
        ("gemma", {"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        (
            "gemma3",
            {"layer_types": ["full_attention", *["sliding_attention"] * 3]},
            "layer_types = 'an irregular pattern'",
        ),
    ],
)
def test_what_the_format_cannot_say(
    family: str, overrides: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=sentence):
        settings(tmp_path, family, **overrides)


# what is refused ---------------------------------------------------------------------------------


def test_another_architecture(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=700)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match="gpt2 models cannot be exported to GGUF here") as raised:
        export(tmp_path)
    assert raised.value.hint.startswith("supported: Llama, Mistral, Qwen2, Qwen3, Gemma")


def change_weights(folder: Path, change: Any) -> None:
    path = folder / "base/model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


NORM = "model.layers.0.input_layernorm.weight"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "kind", "sentence"),
    [
        (lambda w: w.pop(NORM), "f32", f"{NORM} must be .*found nothing"),
        (lambda w: w.update({NORM: torch.ones(63)}), "f32", f"{NORM} must be .*found .63"),
        (lambda w: w.update({"lora": torch.ones(2)}), "f32", "1 tensors that Llama has no place"),
        (lambda w: w[UP].fill_(float("nan")), "f32", f"{UP} holds values that are not finite"),
        (lambda w: w[UP].fill_(7e4), "f16", f"{UP} holds 7e.04, more than f16 can"),
    ],
    ids=["missing", "shape", "extra", "nan", "large"],
)
def test_damaged_weights(change: Any, kind: str, sentence: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    change_weights(tmp_path, change)
    with pytest.raises(ModelError, match=sentence):
        export(tmp_path, kind=kind)
    assert names_in(tmp_path) == ["base"]


def test_a_cut_file(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    path = tmp_path / "base/model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be read"):
        export(tmp_path)


def test_an_existing_output_is_kept(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    output = tmp_path / "model.gguf"
    output.write_text("mine", encoding="utf-8")
    with pytest.raises(ModelError, match="already exists"):
        export(tmp_path)
    with pytest.raises(ModelError, match="--type cannot be 'q4'"):
        export(tmp_path, kind="q4", overwrite=True)
    assert output.read_text(encoding="utf-8") == "mine"
    export(tmp_path, overwrite=True)
    assert output.read_bytes()[:4] == b"GGUF"


def test_a_limit_on_kl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "base")
    monkeypatch.setitem(gguf_check.MAX_KL, "q8_0", 1e-9)
    with pytest.raises(ModelError, match="more than 1e-09, the limit of q8_0"):
        export(tmp_path, kind="q8_0")
    assert names_in(tmp_path) == ["base"]


def test_models_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "base")
    export(tmp_path)
    with pytest.raises(ModelError, match="is a GGUF file already"):
        exporting.exportable_config(BaseModel(str(tmp_path), "model.gguf"), "f16")
    config = tmp_path / "base/config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**values, "architectures": ["LlamaForSequenceClassification"]}))
    with pytest.raises(ModelError, match="is a reward model, not a language model"):
        export(tmp_path, overwrite=True)
    monkeypatch.setattr(gguf_files, "gguf", None)
    with pytest.raises(ModelError, match="gguf package is not installed") as raised:
        export(tmp_path, overwrite=True)
    assert raised.value.hint == "pip install 'alignkit[gguf]'"


def test_shards(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    whole = export(tmp_path)
    first = (tmp_path / "model.gguf").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    (tmp_path / "base/model.safetensors").unlink()
    model.save_pretrained(tmp_path / "base", max_shard_size="200KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    assert export(tmp_path, overwrite=True).tensors == whole.tensors
    assert (tmp_path / "model.gguf").read_bytes() == first
