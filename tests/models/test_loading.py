"""Finding and reading base models: what each kind of name means and what a wrong one says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import MODELS, save_tiny, tiny_model
from transformers import AutoModelForSequenceClassification

from alignkit.errors import ModelError
from alignkit.models.adapters.attach import attach_adapter
from alignkit.models.adapters.files import save_adapter
from alignkit.models.adapters.finding import base_of_adapter
from alignkit.models.base.fitness import require_language_model
from alignkit.models.base.identity import same_weights, weights_fingerprint
from alignkit.models.base.loading import (
    BaseModel,
    load_config,
    load_model,
    load_tokenizer,
    stored_dtype,
)
from alignkit.models.base.places import resolve
from alignkit.models.opening import open_model
from alignkit.recipe.adapters import LoraSpec


@pytest.fixture
def run(tiny_base: Path, tmp_path: Path) -> Path:
    """A run folder as a finished run leaves it: adapter/ and merged/."""
    folder = tmp_path / "run"
    model = attach_adapter(tiny_model(), LoraSpec(rank=2), 0)
    save_adapter(model, folder / "adapter", str(tiny_base))
    shutil.copytree(tiny_base, folder / "merged")
    return folder


def test_kinds_of_names(
    run: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNKIT_HOME", str(tmp_path / "home"))
    fetched = tmp_path / "home" / "models" / "smollm2-135m-instruct"
    shutil.copytree(tiny_base, fetched)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert resolve(str(tiny_base)).whole() == BaseModel(str(tiny_base))
    assert resolve(str(run)).whole() == BaseModel(str(run / "merged"))
    assert resolve("smollm2-135m-instruct").whole() == BaseModel(str(fetched))
    gguf = resolve(str(tmp_path / "model.gguf")).whole()
    assert gguf == BaseModel(str(tmp_path), "model.gguf")
    assert gguf.options == {"trust_remote_code": False, "gguf_file": str(tmp_path / "model.gguf")}
    assert resolve("owner/name", trust_remote_code=True).whole() == BaseModel(
        "owner/name", None, True
    )


@pytest.mark.parametrize(
    ("name", "sentence", "hint"),
    [
        ("smollm2-135m-instruct", "smollm2-135m-instruct is not here yet", "alignkit fetch smol"),
        (
            "smollm2-135m",
            "'smollm2-135m' is not a model: no such folder",
            "did you mean smollm2-135m",
        ),
        ("nothing-like-it", "'nothing-like-it' is not a model", "name a folder, a .gguf file or a"),
        ("/no/such/folder", "'/no/such/folder' is not a model", "name a folder"),
        ("./here", "'./here' is not a model", "name a folder"),
        ("a/b/c", "'a/b/c' is not a model", "name a folder"),
        ("text.txt", "'text.txt' is not a model", "name a folder"),
        (
            "empty",
            "empty is not a model folder: it has no config.json",
            "config.json and *.safetens",
        ),
        ("adapted", "adapted holds an adapter, not a whole model", "alignkit merge-lora adapted"),
        ("unmerged", "unmerged holds an adapter, not a whole", "alignkit merge-lora unmerged"),
    ],
)
def test_names_that_are_no_model(
    name: str, sentence: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNKIT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "adapted", "unmerged/adapter"):
        Path(folder).mkdir(parents=True)
    Path("adapted/adapter_config.json").write_text("{}", encoding="utf-8")
    Path("text.txt").write_text("no model", encoding="utf-8")
    with pytest.raises(ModelError) as raised:
        resolve(name).whole()
    assert raised.value.message.startswith(sentence)
    assert hint in raised.value.hint


def test_a_hub_model_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for load in (load_config, load_tokenizer):
        with pytest.raises(ModelError, match="of 'no-one/nothing' could not be read") as raised:
            load(BaseModel("no-one/nothing"))
        assert raised.value.hint == (
            "HF_HUB_OFFLINE is set and the local cache does not hold the whole model"
        )


def test_broken_folders(tiny_base: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_base, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=re.escape(f"the weights of '{broken}' could not be")):
        load_model(BaseModel(str(broken)), torch.float32)
    weights.unlink()
    with pytest.raises(ModelError, match="the weights of"):
        load_model(BaseModel(str(broken)), torch.float32)
    (broken / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="the configuration of"):
        load_config(BaseModel(str(broken)))


@pytest.mark.parametrize("family", MODELS)
def test_a_folder_without_a_tokenizer(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="the tokenizer of"):
        load_tokenizer(BaseModel(str(tmp_path)))


def test_pickled_weights_are_not_read(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_base, folder)
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"a pickle \(pytorch_model.bin\)") as raised:
        load_model(BaseModel(str(folder)), torch.float32)
    assert "save_pretrained writes safetensors" in raised.value.hint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_in_the_dtype_asked_for(tiny_base: Path, dtype: torch.dtype) -> None:
    model = load_model(resolve(str(tiny_base)).whole(), dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not model.training
    expected = tiny_model(dtype=dtype).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_the_template_can_be_replaced(tiny_base: Path) -> None:
    base = resolve(str(tiny_base)).whole()
    own, other = load_tokenizer(base), load_tokenizer(base, "{{ messages[0].content }}")
    turns = [{"role": "user", "content": "Hi"}]
    assert "<|im_start|>" in own.apply_chat_template(turns, tokenize=False)
    assert other.apply_chat_template(turns, tokenize=False) == "Hi"
    assert own.padding_side == "right"


def test_a_tokenizer_that_cuts_at_random_is_told_not_to(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_base, tmp_path / "m")
    file = tmp_path / "m" / "tokenizer.json"
    stored = json.loads(file.read_text(encoding="utf-8"))
    stored["model"]["dropout"] = 0.5
    file.write_text(json.dumps(stored), encoding="utf-8")
    text = "The weather is fine today, and everyone goes out for a walk."
    wanted = load_tokenizer(BaseModel(str(tiny_base)))(text)["input_ids"]
    assert capsys.readouterr().err == ""
    for _ in range(2):
        assert load_tokenizer(BaseModel(str(tmp_path / "m")))(text)["input_ids"] == wanted
    said = capsys.readouterr().err
    assert said.count("cuts text at random (BPE dropout 0.5); it is switched off") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    save_tiny(tmp_path / "m", dtype=dtype)
    assert stored_dtype(BaseModel(str(tmp_path / "m"))) == dtype


def test_the_fingerprint_tells_weights_apart(tiny_base: Path, tmp_path: Path) -> None:
    first = weights_fingerprint(BaseModel(str(tiny_base)))
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base, copy)
    assert weights_fingerprint(BaseModel(str(copy))) == first  # wherever it stands
    weights = load_file(copy / "model.safetensors")
    name = sorted(weights)[3]
    weights[name].view(-1)[7] += 1e-3  # one number
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    changed = weights_fingerprint(BaseModel(str(copy)))
    assert changed != first
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config["transformers_version"] = "0.0.1"
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert weights_fingerprint(BaseModel(str(copy))) == changed
    config["rms_norm_eps"] = 1e-3
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert weights_fingerprint(BaseModel(str(copy))) != changed


def test_the_fingerprint_of_a_hub_model_names_its_commit(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    cache = tmp_path / "models--owner--name"
    (cache / "refs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):  # the hub's own layout: what a name means may move on
        snapshot = cache / "snapshots" / commit
        snapshot.mkdir(parents=True)
        shutil.copy(tiny_base / "config.json", snapshot)
        (cache / "refs" / "main").write_text(commit, encoding="ascii")
        assert weights_fingerprint(BaseModel("owner/name")) == f"owner/name@{commit}"


def test_opening_prefers_the_merged_model(run: Path, tiny_base: Path) -> None:
    def is_adapted(name: Path, base: str | None = None) -> bool:
        opened = open_model(str(name), dtype=torch.float32, base=base)
        assert opened.tokenizer.chat_template
        assert not opened.model.training
        return hasattr(opened.model, "peft_config")

    assert not is_adapted(tiny_base)
    assert not is_adapted(run)
    assert is_adapted(run, str(tiny_base))
    assert is_adapted(run / "adapter")
    shutil.rmtree(run / "merged")
    assert is_adapted(run)
    assert resolve(str(run)).adapter == run / "adapter"
    assert resolve(str(tiny_base)).adapter is None


def test_an_adapter_whose_base_has_gone(run: Path) -> None:
    config_file = run / "adapter" / "adapter_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    for recorded, sentence, hint in (
        ("/gone/base", "'/gone/base' is not a model", "records '/gone/base'; name the base with"),
        (None, "does not say which base it belongs to", "name the base with --base"),
    ):
        config["base_model_name_or_path"] = recorded
        config_file.write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(ModelError) as raised:
            base_of_adapter(run / "adapter", None)
        assert sentence in raised.value.message
        assert hint in raised.value.hint


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_reward_model_is_no_language_model(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "language", family)
    config = tiny_model(family).config
    config.num_labels = 1
    reward = AutoModelForSequenceClassification.from_config(config)
    reward.save_pretrained(tmp_path / "reward")
    require_language_model(BaseModel(str(tmp_path / "language")))
    with pytest.raises(ModelError) as raised:
        require_language_model(BaseModel(str(tmp_path / "reward")))
    assert raised.value.message == (
        f"{tmp_path / 'reward'} is a reward model, not a language model"
    )
    assert raised.value.hint.startswith("name the model it was trained from")


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ("a/b@1f", "a/b@1f", True),
        ("a/b@1f", "a/b@2e", False),
        # recorded while the commit was not kept
        ("a/b@unknown", "a/b@2e", True),
        ("a/b@unknown", "a/c@2e", False),
        ("0f3a", "0f3a", True),
        ("0f3a", "77bc", False),
        ("a/b@unknown", "0f3a", False),
        (None, None, True),
        (None, "0f3a", False),
    ],
)
def test_fingerprints_of_the_same_weights(one: str | None, two: str | None, same: bool) -> None:
    assert same_weights(one, two) is same
    assert same_weights(two, one) is same
