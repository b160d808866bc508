"""Pipeline files: what a stage is made of, what references become, every problem at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignkit.errors import RecipeError
from alignkit.recipe.reading import pipeline as module
from alignkit.recipe.reading.load import load_recipe, shipped_pipelines, shipped_recipes
from alignkit.recipe.reading.pipeline import Pipeline, load_pipeline

SFT = """\
stage: sft
output: runs/alone
model: {base: some/model}
adapter: {kind: lora, rank: 8}
data: {train: [{path: rows.jsonl}], max_length: 512}
training: {max_steps: 5}
"""
GOOD = """\
output: runs/p
stages:
  sft:
    stage: sft
    model: {base: some/model}
    data: {train: [{path: rows.jsonl}]}
  rm:
    recipe: sft.yaml
    stage: reward
    model: {base: "${sft}"}
    adapter: {rank: 4}
  dpo:
    stage: dpo
    model:
      base: ${sft}/adapter
    data: {train: [{path: rows.jsonl}]}
"""


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    write(SFT, "sft.yaml")


def write(text: str, name: str = "p.yaml") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    return name


def changed(old: str, new: str, text: str = GOOD) -> str:
    assert text.count(old) == 1, old
    return text.replace(old, new)


def load(text: str, *overrides: str) -> Pipeline:
    return load_pipeline(write(text), list(overrides))


def failure(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides)
    return "\n".join(str(problem) for problem in caught.value.problems)


def test_a_good_pipeline(tmp_path: Path) -> None:
    found = load(GOOD)
    sft, rm, dpo = found.steps
    assert (found.name, found.output) == ("p.yaml", "runs/p")
    assert [step.output for step in found.steps] == ["runs/p/sft", "runs/p/rm", "runs/p/dpo"]
    assert [step.settings.stage for step in found.steps] == ["sft", "reward", "dpo"]
    # A recipe's own output is where it runs alone; keys beside `recipe` merge over its own.
    assert rm.settings.adapter.rank == 4
    assert rm.settings.training.max_steps == 5
    # References are absolute: a folder of that name beside the file cannot be meant.
    assert rm.settings.model.base == str(tmp_path / "runs/p/sft")
    assert dpo.settings.model.base == str(tmp_path / "runs/p/sft/adapter")
    assert dpo.references == {("model", "base"): ("sft",)}
    assert sft.references == {}


def test_overrides_reach_the_recipe_file_too() -> None:
    found = load(
        GOOD,
        "rm.data.train.0.take=3",
        "stages.sft.training.max_steps=2",
        "output=runs/other",
        "dpo.output=else/where",
        "rm.recipe=sft.yaml",
    )
    sft, rm, dpo = found.steps
    assert rm.settings.data.train[0].take == 3
    assert sft.settings.training.max_steps == 2
    assert [step.output for step in found.steps] == [
        *("runs/other/sft", "runs/other/rm", "else/where")
    ]
    assert dpo.settings.model.base.endswith("/runs/other/sft/adapter")


def test_an_own_output_is_what_references_mean(tmp_path: Path) -> None:
    text = changed("    stage: sft\n", "    stage: sft\n    output: elsewhere\n")
    assert load(text).steps[1].settings.model.base == str(tmp_path / "elsewhere")


def test_a_dollar_can_be_written(tmp_path: Path) -> None:
    Path("a${b}.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    text = changed(
        "sft\n    model: {base: some/model}\n    data: {train: [{path: rows.jsonl}]}",
        "sft\n    model: {base: $x}\n    data: {train: [{path: 'a$${b}.jsonl'}]}",
    )
    recipe = load(text).steps[0].settings
    assert recipe.data.train[0].path == str(tmp_path / "a${b}.jsonl")
    assert recipe.model.base == "$x"


def test_every_path_is_relative_to_the_file_that_names_it(tmp_path: Path) -> None:
    # rows.jsonl stands in three folders: each recipe means the one beside it.
    for name in ("here/rows.jsonl", "there/rows.jsonl"):
        write('{"text": "b"}\n', name)
    write(SFT, "there/sft.yaml")
    write(
        "output: runs/p\nstages:\n"
        "  one: {recipe: ../there/sft.yaml}\n"
        "  two: {recipe: ../there/sft.yaml, data: {eval: [{path: rows.jsonl}]}}\n"
        "  three: {recipe: sft.yaml}\n",
        "here/p.yaml",
    )
    one, two, three = (step.settings.data for step in load_pipeline("here/p.yaml").steps)
    assert one.train[0].path == str(tmp_path / "there/rows.jsonl")
    assert two.train[0].path == str(tmp_path / "there/rows.jsonl")
    assert two.eval[0].path == str(tmp_path / "here/rows.jsonl")
    assert three.train[0].path == str(tmp_path / "rows.jsonl")  # sft.yaml of the working folder


def test_files_of_earlier_stages_are_found_once_they_are_there(tmp_path: Path) -> None:
    text = changed("train: [{path: rows.jsonl}]}\n  rm", "train: [{path: rows.jsonl}]}\n  rm")
    text = text.replace(
        "base: ${sft}/adapter\n    data: {train: [{path: rows.jsonl}]}",
        "base: ${sft}\n    data: {train: [{path: '${sft}/pairs.jsonl'}]}",
    )
    step = load(text).steps[2]
    with pytest.raises(RecipeError, match=r"p.yaml:16: data.train\[0\].path names no file"):
        step.settle()
    write("{}\n", "runs/p/sft/pairs.jsonl")
    assert step.settle().data.train[0].path == str(tmp_path / "runs/p/sft/pairs.jsonl")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "${sft}/adapter",
            "${sfd}/adapter",
            "p.yaml:15: model.base refers to an unknown stage: ${sfd}\nhint: did you mean ${sft}?",
        ),
        (
            "${sft}/adapter",
            "${policy}",
            "p.yaml:15: model.base refers to an unknown stage: ${policy}\n"
            "hint: earlier stages: sft, rm",
        ),
        (
            "${sft}/adapter",
            "${dpo}",
            "p.yaml:15: model.base refers to its own stage: ${dpo}\nhint: name an earlier stage",
        ),
        (
            '"${sft}"',
            '"${dpo}"',
            "p.yaml:10: model.base refers to a later stage: ${dpo}\n"
            "hint: write dpo before rm: stages run in the order of the file",
        ),
        (
            "${sft}/adapter",
            "${sft",
            "p.yaml:15: model.base contains a malformed reference: ${sft\n"
            "hint: write a reference as ${name}, and $${ for the characters ${ themselves",
        ),
        (
            "    data: {train: [{path: rows.jsonl}]}\n  rm:",
            "    adapter: {kind: prefix}\n    data: {train: [{path: rows.jsonl}]}\n  rm:",
            "p.yaml:11: model.base is stage sft, whose prefix cannot be merged\n"
            "hint: train that stage with adapter.kind = lora\n"
            "p.yaml:16: model.base is stage sft, whose prefix cannot be merged\n"
            "hint: train that stage with adapter.kind = lora",
        ),
        (
            "${sft}/adapter",
            "${rm}",
            "p.yaml:15: model.base is stage rm, which trains a reward model\n"
            "hint: name the stage it was trained from, which can generate text",
        ),
        (
            "output: runs/p",
            "outptu: runs/p",
            "p.yaml: output is required and missing\nhint: as in output: runs/my-pipeline\n"
            "p.yaml:1: outptu is not a key of a pipeline\nhint: did you mean output?",
        ),
        (
            "recipe: sft.yaml",
            "recipe: nowhere",
            "p.yaml:8: stages.rm.recipe names no recipe: 'nowhere'\n"
            "hint: `alignkit recipes list` shows the shipped ones",
        ),
        (
            "recipe: sft.yaml",
            "recipe: quickstart/sfd.yaml",
            "p.yaml:8: stages.rm.recipe names no recipe: 'quickstart/sfd.yaml'\n"
            "hint: did you mean quickstart/sft.yaml? `alignkit recipes list` shows the shipped "
            "ones",
        ),
        (
            "recipe: sft.yaml",
            "recipe: p.yaml",
            "p.yaml:8: stages.rm.recipe names a pipeline: 'p.yaml'\nhint: name a recipe",
        ),
        (
            "recipe: sft.yaml",
            "recipe: [a]",
            "p.yaml:8: stages.rm.recipe must be a file or shipped name, got ['a']",
        ),
        (
            "  dpo:\n",
            "  d.po:\n",
            "p.yaml:12: stages.d.po is not a valid stage name\n"
            "hint: use letters, digits, - and _, as in sft-2",
        ),
        (
            "    stage: dpo\n",
            "    extends: sft.yaml\n    stage: dpo\n",
            "p.yaml:13: a stage cannot use extends\n"
            "hint: write recipe: FILE instead; the stage's other keys override it",
        ),
        (
            "    stage: dpo\n",
            "    stage: dpo\n    output: runs/p/sft/more\n",
            "p.yaml:14: output overlaps that of stage sft: runs/p/sft/more\n"
            "hint: remove the key to use runs/p/dpo",
        ),
        (
            "    stage: dpo\n",
            "    stage: dpo\n    output: runs\n",
            "p.yaml:14: output is or contains the pipeline's folder: runs\n"
            "hint: remove the key to use runs/p/dpo",
        ),
        (
            "    stage: dpo\n",
            "",
            "p.yaml:12: stage is required and missing\nhint: sft, reward, dpo, kto, ppo or grpo",
        ),
    ],
)
def test_what_can_be_wrong(old: str, new: str, message: str) -> None:
    found = failure(changed(old, new))
    if "stage is required" in message:  # the hint follows the stages there are
        assert message.partition("\n")[0] == found.partition("\n")[0]
    else:
        assert found == message


def test_all_problems_of_all_stages_at_once_each_with_its_place() -> None:
    write(SFT.replace("max_steps", "max_stepz"), "sft.yaml")
    text = changed("model: {base: some/model}", "model: {base: some/model, dtype: int3}")
    text = text.replace("    data: {train: [{path: rows.jsonl}]}\n", "", 1)
    text = text.replace("${sft}/adapter", "${x}").replace("rank: 4", "rank: 0")
    found = failure(text, "sft.seed=-1")
    heads = [line for line in found.splitlines() if not line.startswith("hint:")]
    assert heads == [
        "command line: sft: seed must be at least 0, got -1",
        "p.yaml:3: data is required and missing",
        "p.yaml:5: model.dtype must be 'auto', 'bfloat16', 'float16' or 'float32', got 'int3'",
        "p.yaml:10: adapter.rank must be at least 1, got 0",
        "sft.yaml:6: training.max_stepz is not a key of a recipe",
        "p.yaml:14: model.base refers to an unknown stage: ${x}",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sfd.seed=1", "command line: there is no stage 'sfd'\nhint: did you mean sft?"),
        ("seed=1", "command line: there is no stage 'seed'\nhint: stages: sft, rm, dpo"),
        (
            "sft.sed=1",
            "command line: sft: sed is not a key of a recipe\nhint: did you mean seed?",
        ),
        (
            "sft",
            "command line: 'sft' is not an override\n"
            "hint: write overrides as key.sub=value, for example training.learning_rate=1e-4",
        ),
        (
            "rm.data.train.7.take=1",
            "command line: rm: data.train[7].take: there is no data.train[7] to set\n"
            "hint: set a key of a mapping, or an existing list item, as in data.train.0.take=100",
        ),
    ],
)
def test_wrong_overrides(override: str, message: str) -> None:
    assert failure(GOOD, override) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SFT, "p.yaml: is a recipe, not a pipeline\nhint: run `alignkit sft p.yaml`"),
        (
            "output: a\n",
            "p.yaml: stages is required and missing\nhint: name each stage, as in "
            "stages: {sft: {recipe: quickstart/sft.yaml}}",
        ),
        (
            "output: a\nstages: [b]\n",
            "p.yaml:2: stages must be a mapping, got ['b']\nhint: name "
            "each stage, as in stages: {sft: {recipe: quickstart/sft.yaml}}",
        ),
        (
            "output: a\nstages: {b: c}\n",
            "p.yaml:2: stages.b must be a mapping of keys to values, got 'c'\n"
            "hint: as in b: {recipe: quickstart/sft.yaml}",
        ),
    ],
)
def test_no_pipeline(text: str, message: str) -> None:
    assert failure(text) == message


def test_a_pipeline_is_no_recipe() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(GOOD))
    assert (
        str(caught.value) == "p.yaml: is a pipeline, not a recipe\nhint: run `alignkit run p.yaml`"
    )


def test_another_kind_of_step_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.READERS, "label", lambda document, pending: dict(document.values))
    text = GOOD + "  marks:\n    label: {model: '${rm}', output: runs/p/marks.jsonl}\n"
    step = load(text, "marks.label.rows=7").steps[3]
    assert (step.kind, step.output) == ("label", "runs/p/marks.jsonl")
    assert step.settings["model"] == str(tmp_path / "runs/p/rm")
    assert step.settings["rows"] == 7
    assert failure(text.replace("    label: {", "    seed: 1\n    label: {")) == (
        "p.yaml:17: stages.marks must contain the mapping label and nothing else\n"
        "hint: move seed into it"
    )


@pytest.mark.parametrize("name", shipped_pipelines())
def test_shipped_pipelines_load(name: str) -> None:
    found = load_pipeline(name)
    assert name not in shipped_recipes()
    for step in found.steps:
        assert Path(step.output) == Path(found.output) / step.name
        made = {key[:-1] for key in step.references}
        label = step.kind == "label"
        key = ("prompts",) if label else ("data", "train")
        for number, source in enumerate(
            step.settings.prompts if label else step.settings.data.train
        ):
            assert (*key, number) in made or not Path(source.path).is_absolute()
