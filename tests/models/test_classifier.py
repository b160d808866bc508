"""Reward models as sequence classifiers: what plain transformers computes is what was trained."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    END_OF_TURN,
    TOKENIZER_OF,
    TOKENIZERS,
    chat_template,
    save_tiny,
    tiny_model,
    tiny_tokenizer,
    trained_model,
)
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from alignkit.errors import ModelError
from alignkit.models.adapters.attach import attach_adapter
from alignkit.models.adapters.files import save_adapter
from alignkit.models.base.loading import BaseModel
from alignkit.models.rewards import classifier
from alignkit.models.rewards.chat import choose_padding, end_at_turn, missing_end
from alignkit.models.rewards.classifier import ClassifierReport, merge_reward, write_reward
from alignkit.models.rewards.head import RewardStatistics, new_head, read_head, read_statistics
from alignkit.models.scoring.scorer import causal_model
from alignkit.models.weights import shards
from alignkit.recipe.adapters import LoraSpec
from alignkit.recipe.assets import assets_root

FAMILIES = ("llama", "qwen2", "mistral", "gemma")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TEMPLATES = sorted(p.stem for p in (assets_root() / "data_templates/chat").glob("*.jinja"))

CHAT = [
    {"role": "user", "content": "What is 7 times 6?"},
    {"role": "assistant", "content": "Seven times six is 42."},
    {"role": "user", "content": "And how do you know?  "},
    {"role": "assistant", "content": "I counted:\n\n- six\n- twelve\n"},
]
CHATS = [CHAT, CHAT[:2], CHAT[:3], [{"role": "system", "content": "Be brief."}, *CHAT[:2]]]


def turn_end(family: str) -> int:
    tokenizer = TOKENIZER_OF[family]
    return int(tiny_tokenizer(tokenizer).convert_tokens_to_ids(END_OF_TURN[tokenizer]))


def rows_of(family: str) -> list[np.ndarray]:
    """Rows of different lengths that end as an answer does: with the end-of-turn token."""
    return rows_ending(turn_end(family))


def rows_ending(token: int) -> list[np.ndarray]:
    rng = np.random.default_rng(4)
    ids = [rng.integers(300, 600, length) for length in (9, 30, 17, 4)]
    return [np.append(row, token) for row in ids]


def write_adapter(folder: Path, family: str, scale: float = 1.0) -> tuple[Any, nn.Linear]:
    """The adapter and head of a reward model in a folder, and the same in memory."""
    model = trained_model(family, "lora")
    head = new_head(model, seed=5)
    head.weight.data *= scale
    save_adapter(model, folder, "the/base", head)
    return model, head


@torch.no_grad()
def trained_rewards(model: Any, head: nn.Linear, rows: list[np.ndarray]) -> torch.Tensor:
    """`[S]` rewards as the trained model gives them, row by row."""
    decoder = causal_model(model).eval().get_decoder()
    ids = [torch.as_tensor(row)[None] for row in rows]
    return torch.stack([head(decoder(input_ids=x).last_hidden_state[0, -1])[0] for x in ids])


@torch.no_grad()
def plain_rewards(folder: Path, rows: list[np.ndarray], side: str = "right") -> torch.Tensor:
    """`[S]` rewards of one padded batch, as any user of transformers computes them."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    assert model.num_labels == 1
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    batch = tokenizer.pad({"input_ids": [row.tolist() for row in rows]}, return_tensors="pt")
    assert batch["attention_mask"].min() == 0
    found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert found.shape == (len(rows), 1)
    return found[:, 0]


def merge(base: Path, adapter: Path, output: Path, family: str, **options: Any) -> ClassifierReport:
    fields = {"rows": rows_of(family), "dtype": torch.float32, "stop_tokens": [turn_end(family)]}
    return merge_reward(BaseModel(str(base)), adapter, output, **{**fields, **options})


def folder_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def llama(tiny_base: Path, tmp_path: Path) -> Callable[..., ClassifierReport]:
    """Merges a reward adapter on the tiny Llama from tmp_path/adapter to tmp_path/merged."""
    write_adapter(tmp_path / "adapter", "llama")

    def run(**options: Any) -> ClassifierReport:
        return merge(tiny_base, tmp_path / "adapter", tmp_path / "merged", "llama", **options)

    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_rewards_are_the_adapters(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", family)
    model, head = write_adapter(tmp_path / "adapter", family)
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", family)
    rows = rows_of(family)
    exact = trained_rewards(model, head, rows)
    untrained = trained_rewards(tiny_model(family), head, rows)
    assert (exact - untrained).abs().max() > 0.1  # the adapter says something
    for side in ("right", "left"):
        torch.testing.assert_close(plain_rewards(tmp_path / "merged", rows, side), exact, **CLOSE)
    assert torch.equal(read_head(tmp_path / "merged").weight, head.weight)
    config = json.loads((tmp_path / "merged/config.json").read_text(encoding="utf-8"))
    assert config["architectures"][0].endswith("ForSequenceClassification")
    assert not any(
        "lora" in name or "lm_head" in name
        for name in load_file(tmp_path / "merged/model.safetensors")
    )
    assert folder_names(tmp_path) == ["adapter", "base", "merged"]

    assert report.modules == 14
    assert report.max_difference < 1e-5
    assert report.survived == pytest.approx(1.0, abs=1e-3)
    assert report.spread == pytest.approx(float(exact.std(correction=0)), rel=1e-4)
    assert (report.rows, report.dtype) == (4, "float32")
    assert report.to_json()["pad_token"] == report.pad_token
    assert report.pad_token == AutoTokenizer.from_pretrained(tmp_path / "merged").pad_token


@pytest.mark.parametrize("family", FAMILIES)
def test_written_rewards_are_those_of_full_weights(family: str, tmp_path: Path) -> None:
    model = trained_model(family, "full")
    head = new_head(model, seed=5)
    rows, stops = rows_of(family), [turn_end(family)]
    exact = trained_rewards(model, head, rows)
    tokenizer = tiny_tokenizer(TOKENIZER_OF[family])
    before = (tokenizer.pad_token, tokenizer.chat_template)
    report = write_reward(model, head, tokenizer, tmp_path / "out", torch.float32, rows, stops)
    torch.testing.assert_close(plain_rewards(tmp_path / "out", rows), exact, **CLOSE)
    assert (report.modules, report.rows) == (0, 4)
    assert (tokenizer.pad_token, tokenizer.chat_template) == before  # the caller's is left alone
    # It replaces what stands there.
    (tmp_path / "out" / "old.txt").write_text("old", encoding="utf-8")
    write_reward(model, head, tokenizer, tmp_path / "out", torch.float32, rows, stops)
    assert "old.txt" not in folder_names(tmp_path / "out")


def test_bfloat16_stays_near(tmp_path: Path) -> None:
    # bfloat16 keeps 8 bits of each weight: rewards that spread by about 1 move by some 0.01.
    save_tiny(tmp_path / "base", dtype=torch.bfloat16)
    model = attach_adapter(tiny_model(dtype=torch.bfloat16), LoraSpec(rank=4), 0)
    save_adapter(model, tmp_path / "adapter", "the/base", new_head(model, 5))
    report = merge(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", "llama", dtype=torch.bfloat16
    )
    assert report.dtype == "bfloat16"
    assert 0 < report.max_difference < 0.1 * report.spread
    stored = load_file(tmp_path / "merged/model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}


def test_a_padding_token_that_ends_answers_is_replaced(
    llama: Callable[..., ClassifierReport], tmp_path: Path
) -> None:
    # The trap: SmolLM2 pads with its end-of-turn token. transformers looks for the last token that
    # is not padding, and would read the reward one token early.
    tokenizer = tiny_tokenizer("chatml")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == turn_end("llama")
    assert llama().pad_token == "<|endoftext|>"
    rows = rows_of("llama")
    right = plain_rewards(tmp_path / "merged", rows)
    trapped = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    trapped.config.pad_token_id = tokenizer.eos_token_id
    with torch.no_grad():
        wrong = trapped(input_ids=torch.as_tensor(rows[0])[None]).logits[0, 0]
    assert abs(wrong - right[0]) > 0.1


def test_padding_within_a_row_is_text(
    llama: Callable[..., ClassifierReport], tmp_path: Path
) -> None:
    # A padding token in the middle of a real row, such as <unk>, is a token like any other.
    pad = tiny_tokenizer("chatml").convert_tokens_to_ids("<|endoftext|>")
    rows = rows_of("llama")
    rows[0][3] = rows[1][0] = pad
    assert llama(rows=rows).max_difference < 1e-5


def test_no_token_to_spare(llama: Callable[..., ClassifierReport], tmp_path: Path) -> None:
    specials = tiny_tokenizer("chatml").all_special_ids
    report = llama(stop_tokens=specials)
    assert report.pad_token is None
    assert report.max_difference < 1e-5
    assert report.lines()[-1] == "the tokenizer has no token to pad with: score one row at a time"
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert model.config.pad_token_id is None
    ids = torch.as_tensor(np.stack([rows_of("llama")[0]] * 2))
    with pytest.raises(ValueError, match="no padding token"):
        model(input_ids=ids)


@pytest.mark.parametrize("family", TOKENIZERS)
def test_the_padding_token_ends_no_answer(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    ids = tokenizer.convert_tokens_to_ids
    candidates = {token.content for token in tokenizer.added_tokens_decoder.values()}
    assert choose_padding(tokenizer, [ids(END_OF_TURN[family])]) is not None
    # Let each answer be a stop token in turn, until nothing is left.
    stops: list[int] = []
    while (token := choose_padding(tokenizer, stops)) is not None:
        assert ids(token) not in stops
        assert token not in tokenizer.chat_template
        assert token not in (tokenizer.eos_token, tokenizer.bos_token)
        assert token in candidates
        stops.append(ids(token))
    assert stops


def test_a_padding_token_of_its_own_is_kept() -> None:
    assert choose_padding(tiny_tokenizer("llama3"), []) == "<|finetune_right_pad_id|>"
    assert choose_padding(tiny_tokenizer("gemma"), []) == "<pad>"
    assert choose_padding(tiny_tokenizer("mistral-sentencepiece"), []) == "<unk>"


def render(tokenizer: Any, chat: list[dict[str, str]], **options: Any) -> Any:
    return tokenizer.apply_chat_template(chat, **{"tokenize": False, **options})


@pytest.mark.parametrize("name", TEMPLATES)
def test_saved_templates_end_at_the_turn(name: str, tiny_base: Path, tmp_path: Path) -> None:
    family = name.partition("-")[0]
    original = tiny_tokenizer(family, chat_template(name))
    end = END_OF_TURN[family]
    stop = original.convert_tokens_to_ids(end)
    write_adapter(tmp_path / "adapter", "llama")
    merge(
        tiny_base,
        tmp_path / "adapter",
        tmp_path / "merged",
        "llama",
        tokenizer=original,
        stop_tokens=[stop],
        rows=rows_ending(stop),
    )
    saved = AutoTokenizer.from_pretrained(tmp_path / "merged")
    for chat in CHATS:
        text, before = render(saved, chat), render(original, chat)
        assert text == before.rstrip()
        ids = saved.apply_chat_template(chat, tokenize=True, return_dict=False)
        assert ids == original(text, add_special_tokens=False)["input_ids"]
        if chat[-1]["role"] == "assistant":
            assert text.endswith(end)
            assert ids[-1] == stop
    prompt = {"add_generation_prompt": True}
    assert render(saved, CHAT[:3], **prompt) == render(original, CHAT[:3], **prompt).rstrip()


@pytest.mark.parametrize("name", ["chatml", "chatml-generation", "gemma", "qwen"])
def test_these_templates_write_more_than_the_turn(name: str) -> None:
    # What the test above would not notice if the templates changed.
    tokenizer = tiny_tokenizer(name.partition("-")[0], chat_template(name))
    assert render(tokenizer, CHAT).endswith(f"{END_OF_TURN[name.partition('-')[0]]}\n")


@pytest.mark.parametrize("name", ["qwen", "mistral"])
def test_tools_and_refusals_of_a_template_stay(name: str) -> None:
    original, ended = (tiny_tokenizer(name) for _ in range(2))
    ended.chat_template = end_at_turn(original.chat_template)
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    assert render(ended, CHAT, tools=[tool]) == render(original, CHAT, tools=[tool]).rstrip()
    assert '"add"' in render(ended, CHAT, tools=[tool])
    if name == "mistral":
        with pytest.raises(Exception, match="two user turns in a row"):
            render(ended, [CHAT[0], CHAT[0]])


def test_every_one_of_several_templates_ends_at_the_turn(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer("chatml")
    named = {"default": chat_template("chatml"), "loud": "{{ messages[0].content.upper() }}\n\n "}
    tokenizer.chat_template = named
    model = trained_model("llama", "full")
    head, rows = new_head(model, 0), rows_of("llama")
    write_reward(model, head, tokenizer, tmp_path / "out", torch.float32, rows, [])
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert saved.chat_template.keys() == named.keys()
    assert render(saved, CHAT) == render(tokenizer, CHAT).rstrip()
    assert render(saved, CHAT, chat_template="loud") == "WHAT IS 7 TIMES 6?"
    # A token that only another template writes is no padding either.
    tokenizer.chat_template = {**named, "other": "<|endoftext|>"}
    assert choose_padding(tokenizer, []) is None


def test_a_template_without_a_stop_token_gets_the_one_that_was_trained(tmp_path: Path) -> None:
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer = tiny_tokenizer("chatml", plain)
    model = trained_model("llama", "full")
    head, rows = new_head(model, 0), rows_of("llama")
    folder = tmp_path / "out"
    write_reward(model, head, tokenizer, folder, torch.float32, rows, [tokenizer.eos_token_id])
    saved = AutoTokenizer.from_pretrained(folder)
    assert render(saved, CHAT) == render(tokenizer, CHAT).rstrip() + "<|im_end|>"
    assert missing_end(tokenizer, []) == ""
    assert missing_end(tiny_tokenizer("chatml"), [tokenizer.eos_token_id]) == ""


def test_a_tokenizer_without_a_template_gets_none(tmp_path: Path) -> None:
    assert end_at_turn(None) is None
    model = trained_model("llama", "full")
    tokenizer = tiny_tokenizer("chatml", None)
    rows = rows_of("llama")
    head = new_head(model, 0)
    write_reward(model, head, tokenizer, tmp_path / "out", torch.float32, rows, [])
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is None


def test_the_statistics_travel(llama: Callable[..., ClassifierReport], tmp_path: Path) -> None:
    llama()
    assert read_statistics(tmp_path / "merged") is None
    statistics = RewardStatistics(0.5, 1.25, 1.0, 0.0, 0.75, 32, "train")
    statistics.save(tmp_path / "adapter")
    llama(overwrite=True)
    assert read_statistics(tmp_path / "merged") == statistics


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]) -> None:
    """Let `change` happen to each weight file between writing and reading it back."""
    right = shards.save_file

    def wrong(tensors: dict[str, torch.Tensor], path: Path, **options: Any) -> None:
        right(tensors, path, **options)
        change(path)

    monkeypatch.setattr(shards, "save_file", wrong)


def change_head(path: Path) -> None:
    weights = load_file(path)
    weights["score.weight"][0, 3] += 1e-6
    save_file(weights, path, metadata={"format": "pt"})


def drop_head(path: Path) -> None:
    weights = load_file(path)
    del weights["score.weight"]
    save_file(weights, path, metadata={"format": "pt"})


def fill_disk(path: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (change_head, "the file does not hold what was written: score.weight differs"),
        (drop_head, "the file does not hold what was written: score.weight differs"),
        (fill_disk, "No space left on device"),
    ],
)
def test_a_spoiled_file_leaves_nothing(
    change: Callable[[Path], None],
    sentence: str,
    llama: Callable[..., ClassifierReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(monkeypatch, change)
    with pytest.raises(ModelError) as raised:
        llama()
    assert sentence in raised.value.message
    assert folder_names(tmp_path) == ["adapter"]


def test_rewards_that_rounding_moves_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    # Equal rows have no spread, so the limit is 0.02; rewards of a head thirty times as large as
    # usual are known to bfloat16 within about 0.3.
    write_adapter(tmp_path / "adapter", "llama", scale=30.0)
    narrow = {"rows": [rows_of("llama")[0]] * 3, "dtype": torch.bfloat16}
    paths = (tiny_base, tmp_path / "adapter", tmp_path / "merged", "llama")
    with pytest.raises(ModelError, match="the merged reward model is not faithful") as raised:
        merge(*paths, **narrow)
    assert "rounding may change it by at most 0.02" in raised.value.message
    assert raised.value.hint.startswith("merge into wider weights with --dtype float32")
    assert folder_names(tmp_path) == ["adapter"]
    # What the hint says helps.
    assert merge(*paths, **{**narrow, "dtype": torch.float32}).max_difference < 0.02


def test_a_classifier_that_computes_something_else_is_refused(
    llama: Callable[..., ClassifierReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = classifier.read_merged

    def scale_head(factor: float) -> None:
        def wrong(*args: Any, **options: Any) -> torch.Tensor:
            return factor * right(*args, **options)

        monkeypatch.setattr(classifier, "read_merged", wrong)

    for factor in (1.5, float("nan")):
        scale_head(factor)
        with pytest.raises(ModelError, match="the merged reward model is not faithful"):
            llama()
        assert folder_names(tmp_path) == ["adapter"]
    scale_head(1.001)
    assert llama().max_difference > 1e-4


def test_an_existing_output_is_kept(
    llama: Callable[..., ClassifierReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "merged"
    output.mkdir()
    (output / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ModelError, match="already exists") as raised:
        llama()
    assert raised.value.hint == "add --overwrite, or name another --output"
    with monkeypatch.context() as patch:
        spoil(patch, change_head)
        with pytest.raises(ModelError, match=r"score\.weight differs"):
            llama(overwrite=True)
    assert folder_names(output) == ["mine.txt"]
    llama(overwrite=True)
    assert "mine.txt" not in folder_names(output)
    assert folder_names(tmp_path) == ["adapter", "merged"]


def test_an_architecture_without_a_classifier(
    llama: Callable[..., ClassifierReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoModelForSequenceClassification, "_model_mapping", {})
    with pytest.raises(ModelError) as raised:
        llama()
    assert raised.value.message == (
        "transformers has no sequence classifier for 'llama', so there is no merged/ that it could "
        "load"
    )
    assert raised.value.hint == (
        "train an adapter with merge=false, and use adapter/, which holds it and the head"
    )
    assert folder_names(tmp_path) == ["adapter"]


def test_an_adapter_without_a_head_is_no_reward_model(tiny_base: Path, tmp_path: Path) -> None:
    save_adapter(trained_model("llama", "lora"), tmp_path / "adapter", "the/base")
    with pytest.raises(ModelError, match="is not a reward model: it holds no scalar head"):
        merge(tiny_base, tmp_path / "adapter", tmp_path / "merged", "llama")
    assert folder_names(tmp_path) == ["adapter"]


def test_the_report_in_sentences() -> None:
    report = ClassifierReport("out", "bfloat16", 14, 0.987, 0.0123, 1.5, 8, "<pad>")
    assert report.lines() == [
        "merged 14 layers and the head into out (bfloat16), a sequence classifier with one label",
        "against the trained model on 8 rows: largest reward difference 0.012 (their spread is "
        "1.5); 98.7% of the update survived rounding",
    ]
    assert report.to_json() == dataclasses.asdict(report)
