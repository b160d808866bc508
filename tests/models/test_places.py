"""What every kind of name means, and what stands there."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import save_tiny, tiny_model
from transformers import AutoConfig

from alignkit.errors import ModelError
from alignkit.models.adapters.attach import attach_adapter
from alignkit.models.adapters.files import save_adapter
from alignkit.models.adapters.finding import base_of, tokenizer_of
from alignkit.models.base.changes import BaseChanges
from alignkit.models.base.fitness import require_language_model, require_plain_weights
from alignkit.models.base.loading import BaseModel, load_config, stored_dtype
from alignkit.models.base.places import Place, resolve
from alignkit.recipe.adapters import LoraSpec
from alignkit.recipe.rope import RopeSpec


@pytest.fixture
def home(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with one of everything that a name may be."""
    monkeypatch.setenv("ALIGNKIT_HOME", str(tmp_path / "alignkit"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_base, "model")
    Path("model.gguf").write_bytes(b"GGUF")
    save_adapter(attach_adapter(tiny_model(), LoraSpec(rank=2), 0), Path("lora"), "model")
    shutil.copytree("lora", "unmerged/adapter")
    shutil.copytree("lora", "run/adapter")
    shutil.copytree(tiny_base, "run/merged")
    shutil.copytree(tiny_base, "full/merged")
    shutil.copytree("lora", "beside")
    shutil.copytree(tiny_base, "beside/merged")
    Path("begun/adapter").mkdir(parents=True)
    Path("empty").mkdir()
    Path("text.txt").write_text("no model", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "kind", "model", "adapter"),
    [
        ("model", "model", "model", None),
        ("run", "run", "run/merged", "run/adapter"),
        ("full", "run", "full/merged", None),
        ("unmerged", "run", None, "unmerged/adapter"),
        ("begun", "run", None, None),
        ("lora", "adapter", None, "lora"),
        ("beside", "adapter", "beside/merged", "beside"),
        ("run/adapter", "adapter", None, "run/adapter"),
        ("empty", "folder", None, None),
        ("owner/name", "hub", "owner/name", None),
        ("smollm2-135m-instruct", "known", None, None),
        ("text.txt", "nothing", None, None),
        ("/no/such/folder", "nothing", None, None),
        ("nothing-like-it", "nothing", None, None),
    ],
)
def test_names(name: str, kind: str, model: str | None, adapter: str | None, home: Path) -> None:
    place = resolve(name)
    assert (place.name, place.kind) == (name, kind)
    assert place.model == (None if model is None else BaseModel(model))
    assert place.adapter == (None if adapter is None else Path(adapter))
    assert place.unmerged == (place.adapter if model is None else None)
    if model is not None:
        assert place.whole() == BaseModel(model)
        assert base_of(place) == place.whole()
        return
    with pytest.raises(ModelError):
        place.whole()
    if adapter is not None:
        assert base_of(place) == BaseModel("model")


def test_a_file_and_a_fetched_model(home: Path) -> None:
    gguf = BaseModel(str(home), "model.gguf", True)
    name = str(home / "model.gguf")
    assert resolve(name, trust_remote_code=True) == Place(name, "gguf", gguf)
    folder = home / "alignkit" / "models" / "smollm2-135m-instruct"
    shutil.copytree("model", folder)
    name = "smollm2-135m-instruct"
    assert resolve(name) == Place(name, "known", BaseModel(str(folder)))


def test_the_tokenizer_of_an_adapter(home: Path) -> None:
    base = BaseModel("model")
    assert tokenizer_of(Path("lora"), base) is base
    shutil.copy("model/tokenizer_config.json", "lora")
    assert tokenizer_of(Path("lora"), base) == BaseModel("lora")


def test_the_configuration_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "base")
    read, reads = AutoConfig.from_pretrained, []

    def counted(*args: object, **options: object) -> object:
        reads.append(args)
        return read(*args, **options)

    monkeypatch.setattr(AutoConfig, "from_pretrained", counted)
    base = resolve(str(tmp_path / "base")).whole()
    require_language_model(base)
    require_plain_weights(base)
    stored_dtype(base)
    first = load_config(base)
    first.vocab_size = 1  # a copy: the caller's own
    assert load_config(base).vocab_size > 1
    longer = replace(base, changes=BaseChanges(RopeSpec(kind="linear", factor=2.0)))
    plain = load_config(base).max_position_embeddings
    assert load_config(longer).max_position_embeddings == 2 * plain
    assert len(reads) == 1
    load_config(resolve(str(tmp_path / "base")).whole())  # another run may find other files
    assert len(reads) == 2
