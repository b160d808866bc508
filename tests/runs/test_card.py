"""Model cards: what a merged model states about itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from commandline import CommandLine
from huggingface_hub.repocard import metadata_load
from peft import LoraConfig, get_peft_model
from running import make_preference_recipe, make_recipe, train
from tiny import save_tiny, tiny_model

from alignkit.models.base.known import model_folder
from alignkit.models.base.licence import licence_of
from alignkit.models.base.loading import BaseModel
from alignkit.recipe.reading.load import load_recipe
from alignkit.stages.running.card import escape, write_card


def card_of(folder: Path) -> tuple[dict[str, object], str]:
    text = (folder / "README.md").read_text(encoding="utf-8")
    about = metadata_load(folder / "README.md")
    assert about is not None
    return about, text


def without_numbers(card: str) -> str:
    """A card without what its merge measured."""
    return re.sub(r"## Merge\n\n(- .*\n)+", "", card)


def test_the_card_of_a_run(tmp_path: Path) -> None:
    save_tiny(tmp_path / "mother")
    head = "---\nlicense: mit\nlanguage: en\n---\n# Mother\n"
    (tmp_path / "mother/README.md").write_text(head, encoding="utf-8")
    recipe = make_recipe(
        tmp_path / "child", tmp_path / "mother", data__eval_fraction=0.25, training__max_steps=2
    )
    summary = train(recipe)
    about, text = card_of(tmp_path / "child/run/merged")
    assert about == {
        "base_model": "mother",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["alignkit", "sft"],
        "license": "mit",
    }
    assert "\n# run\n\nMade from mother by the `sft` stage of alignkit " in text
    line = f"| loss | {summary.before['loss']:.4g} | {summary.after['loss']:.4g} |"
    assert line in text
    assert "- rows.jsonl\n" in text
    assert summary.merge is not None
    for sentence in summary.merge.lines()[1:]:
        assert f"- {escape(sentence)}\n" in text
    assert text.endswith("That of the base: mit.\n")
    assert str(tmp_path) not in text  # made to be shared
    settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert settings["adapter"]["rank"] == 4
    assert settings["training"]["learning_rate"] == 2e-3

    # The licence is handed on.
    grandchild = make_recipe(tmp_path / "grandchild", tmp_path / "child/run", training__max_steps=1)
    train(grandchild)
    about, text = card_of(tmp_path / "grandchild/run/merged")
    assert (about["base_model"], about["license"]) == ("run", "mit")
    assert "Held-out results" not in text


def test_merging_again_writes_the_same_card(alignkit: CommandLine, tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    recipe = make_recipe(tmp_path, tmp_path / "base", data__eval_fraction=0.25)
    train(recipe)
    first = (tmp_path / "run/merged/README.md").read_text(encoding="utf-8")
    done = alignkit("merge-lora", "run", "--overwrite", cwd=tmp_path)
    assert done.code == 0
    again = (tmp_path / "run/merged/README.md").read_text(encoding="utf-8")
    # it is checked on shipped rows: those that the stored recipe names are not read
    assert without_numbers(again) == without_numbers(first)
    assert "do not name its licence: look it up" in first


@pytest.mark.parametrize("adapter", [{"kind": "lora", "rank": 4}, {"kind": "full"}])
def test_a_reward_model(adapter: dict[str, object], tiny_base: Path, tmp_path: Path) -> None:
    fields = {"adapter": adapter, "merge": True, "training__max_steps": 1}
    train(make_preference_recipe(tmp_path, tiny_base, "reward", **fields))
    about, text = card_of(tmp_path / "run/merged")
    assert about["pipeline_tag"] == "text-classification"
    assert about["tags"] == ["alignkit", "reward"]
    assert "A reward model made from" in text
    assert "## Merge" in text


def test_anyones_adapter(alignkit: CommandLine, tiny_base: Path, tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear", r=2))
    model.save_pretrained(tmp_path / "theirs")
    arguments = ["merge-lora", "theirs", "--base", str(tiny_base), "--output", "out"]
    assert alignkit(*arguments, cwd=tmp_path).code == 0
    about, text = card_of(tmp_path / "out")
    assert about["tags"] == ["alignkit"]
    assert "by merging an adapter with alignkit" in text
    assert "## Settings" not in text


def test_licences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNKIT_HOME", str(tmp_path / "home"))
    fetched = model_folder("smollm2-135m-instruct")
    fetched.mkdir(parents=True)
    assert licence_of(BaseModel(str(fetched))) == "apache-2.0"
    assert licence_of(BaseModel("some/hub-model")) is None
    damaged = ("---\nlicense: [", "---\nlicense: mit", "---\nlicense: mit\nd: 2024-13-45\n---\n")
    damaged += ("---\nlicense: !!int x\n---\n", "---\nlicense: !!timestamp ''\n---\n")
    for text in ("", "no front matter", "---\n- a\n---\n", *damaged):
        (tmp_path / "README.md").write_text(text, encoding="utf-8")
        assert licence_of(BaseModel(str(tmp_path))) is None
    (tmp_path / "README.md").write_bytes("---\nlicense: größer\n---\n".encode("latin-1"))
    assert licence_of(BaseModel(str(tmp_path))) is None
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "README.md").write_text("---\nlicense: llama3.1\n---\n", encoding=encoding)
        assert licence_of(BaseModel(str(tmp_path))) == "llama3.1"


def test_what_was_not_finite_stays_empty(tiny_base: Path, tmp_path: Path) -> None:
    before: dict[str, Any] = {"loss": None, "accuracy": 0.5}  # as metrics.jsonl keeps NaN
    write_card(tmp_path, BaseModel(str(tiny_base)), before=before, after={"loss": 2.0, "kl": None})
    _, text = card_of(tmp_path)
    assert "| loss |  | 2 |\n| kl |  |  |" in text


FOREIGN = {
    "plain words, 1.5 of 2 (a/b-c_d): 3%": "plain words, 1.5 of 2 (a/b-c_d): 3%",
    "# heading\n\n## another": r"\# heading \#\# another",
    "[link](https://evil.example)": r"\[link\](https:\//evil.example)",
    "www.evil.example": r"www\.evil.example",
    "me@evil.example": r"me\@evil.example",
    "<script>alert(1)</script>": r"\<script\>alert(1)\</script\>",
    "&lt;b&gt;": "&amp;lt;b&amp;gt;",
    "`code` *strong* _slanted_ ~~out~~": r"\`code\` \*strong\* \_slanted\_ \~\~out\~\~",
    "- item": r"\- item",
    "a | b\t|": r"a \| b \|",
    "\x1b]0;title\x07": "␛\\]0;title␇",
}


@pytest.mark.parametrize("text", FOREIGN)
def test_foreign_text_is_only_text(text: str) -> None:
    assert escape(text) == FOREIGN[text]


def test_a_card_holds_no_foreign_markdown(tiny_base: Path, tmp_path: Path) -> None:
    evil = "x](https://a.b)<script>\n# owned\n```\n"
    base = tmp_path / "<img src=x>\n# base"
    base.mkdir()
    head = yaml.safe_dump({"license": evil})
    (base / "README.md").write_text(f"---\n{head}---\n", encoding="utf-8")
    (base / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (tmp_path / "run").mkdir()
    recipe = load_recipe(str(make_recipe(tmp_path / "run", tiny_base))).recipe
    source = recipe.data.train[0].model_copy(update={"path": f"/data/{evil}.jsonl"})
    data = recipe.data.model_copy(update={"train": (source,)})
    adapter = recipe.adapter.model_copy(update={"targets": (evil,)})
    recipe = recipe.model_copy(update={"data": data, "adapter": adapter})
    (tmp_path / "out").mkdir()
    write_card(tmp_path / "out", BaseModel(str(base)), recipe=recipe, after={evil: 1.0, "b": "<b>"})
    about, text = card_of(tmp_path / "out")
    assert "license" not in about  # it is none
    body = text.partition("\n---\n")[2]
    prose, fence, settings = body.partition("````yaml\n")
    assert fence
    settings, _, rest = settings.partition("\n````\n")
    assert yaml.safe_load(settings)["adapter"]["targets"] == [evil]
    prose = prose.replace("`sft`", "")  # our own
    assert not re.search(r"(?<!\\)[<`]|://", prose + rest)
    headings = re.findall(r"^#+ .*", prose + rest, re.M)
    ours = ["# out", "## Held-out results", "## Data", "## Settings", "## Use", "## Licence"]
    assert headings == ours
