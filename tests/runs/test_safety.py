"""What --overwrite and --resume must never do."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from running import make_recipe
from torch import nn, optim

from alignkit.errors import FileError, ModelError, RunError
from alignkit.files import make_folder, write_text
from alignkit.jobs.merge import MergeOptions, merge_run
from alignkit.recipe.reading.load import load_recipe
from alignkit.recipe.reading.pipeline import load_pipeline
from alignkit.recipe.stages.ppo import PpoRecipe
from alignkit.recipe.stages.sft import SftRecipe
from alignkit.runtime.checkpoint import find_checkpoint, save_checkpoint
from alignkit.stages.registry import run_stage
from alignkit.stages.running import run_folder
from alignkit.stages.running.run_folder import check_output
from alignkit.stages.running.session import RunOptions


def recipe(output: Path, base: str = "some/model") -> SftRecipe:
    return SftRecipe.model_validate_json(
        f'{{"stage": "sft", "output": "{output}", "model": {{"base": "{base}"}}, '
        '"data": {"train": [{"path": "rows.jsonl"}]}}'
    )


def a_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}", encoding="utf-8")
    return folder


def test_resume_and_overwrite_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="--resume continues a run and --overwrite deletes it"):
        check_output(recipe(a_run(tmp_path / "run")), resume=True, overwrite=True)


def test_overwrite_never_deletes_the_base(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    (run / "merged").mkdir()
    with pytest.raises(RunError, match="--overwrite would delete it"):
        check_output(recipe(run, str(run / "merged")), resume=False, overwrite=True)


@pytest.mark.parametrize("target", ["run", ".", "file"])
def test_merging_overwrites_nothing_but_a_model_folder(tmp_path: Path, target: str) -> None:
    adapter = a_run(tmp_path / "run") / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(ModelError, match="is not a merged model, so it is not overwritten"):
        merge_run([str(adapter)], MergeOptions(output=tmp_path / target, overwrite=True))
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"
    assert (adapter / "adapter_config.json").is_file()


def test_a_damaged_later_checkpoint_does_not_crowd_out_a_whole_one(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = optim.AdamW(model.parameters())
    for step in (10, 37):
        save_checkpoint(tmp_path, step, model, optimizer, {}, keep=2)
    (tmp_path / "step-000037" / "manifest.json").write_text("torn", encoding="utf-8")
    saved = save_checkpoint(tmp_path, 30, model, optimizer, {}, keep=1)
    found, skipped = find_checkpoint(tmp_path)
    assert saved.is_dir()
    assert found is not None
    assert found.step == 30
    assert skipped == []


READ = {
    "adapter.from": {"adapter": {"kind": "lora", "from": "FILE"}},
    "model.chat_template": {"model": {"base": "some/model", "chat_template": "FILE"}},
    "data.train": {"data": {"train": [{"path": "FILE"}]}},
    "objective.file": {"objective": {"kind": "custom", "file": "FILE", "name": "loss"}},
}


@pytest.mark.parametrize("key", READ)
def test_overwrite_never_deletes_what_the_run_reads(key: str, tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    file = run / "held.py"
    file.write_text("", encoding="utf-8")
    values = recipe(run).as_dict() | json.loads(json.dumps(READ[key]).replace("FILE", str(file)))
    spec = SftRecipe.model_validate_json(json.dumps(values))
    with pytest.raises(RunError, match=r"holds .*held\.py, which this run reads: --overwrite"):
        check_output(spec, resume=False, overwrite=True)
    (tmp_path / "link").symlink_to(run)  # under another name, too
    spec = spec.model_copy(update={"output": str(tmp_path / "link")})
    with pytest.raises(RunError, match="which this run reads"):
        check_output(spec, resume=False, overwrite=True)


@pytest.mark.parametrize(
    "reward", [{"model": "FOLDER"}, {"function": "FOLDER/held.py:score"}, [{"model": "FOLDER"}]]
)
def test_overwrite_never_deletes_what_judges(reward: Any, tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    (run / "held.py").write_text("", encoding="utf-8")
    values = {
        "stage": "ppo",
        "output": str(run),
        "model": {"base": "some/model"},
        "data": {"train": [{"path": "rows.jsonl"}]},
        "reward": json.loads(json.dumps(reward).replace("FOLDER", str(run))),
    }
    spec = PpoRecipe.model_validate_json(json.dumps(values))
    with pytest.raises(RunError, match="which this run reads: --overwrite would delete it"):
        check_output(spec, resume=False, overwrite=True)


def test_overwrite_never_deletes_the_recipe_nor_follows_links(
    tiny_base: Path, tmp_path: Path
) -> None:
    run = a_run(tmp_path / "run")
    (run / "parent.yaml").write_text("seed: 1\n", encoding="utf-8")
    path = make_recipe(tmp_path, tiny_base, merge=False, training__max_steps=1)
    child = tmp_path / "child.yaml"
    text = path.read_text(encoding="utf-8").replace("{", '{"extends": "run/parent.yaml",', 1)
    child.write_text(text, encoding="utf-8")
    loaded = load_recipe(str(child))
    reads = loaded.document.files
    assert [file.name for file in reads] == ["child.yaml", "parent.yaml"]
    with pytest.raises(RunError, match=r"holds .*parent\.yaml, which this run reads"):
        run_stage(loaded.recipe, RunOptions(overwrite=True, quiet=True, reads=reads))
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "step-000001").write_text("mine", encoding="utf-8")
    (run / "checkpoints").symlink_to(disk)
    run_stage(load_recipe(str(path)).recipe, RunOptions(overwrite=True, quiet=True))
    assert (disk / "step-000001").read_text(encoding="utf-8") == "mine"
    assert not (run / "checkpoints").is_symlink()
    assert (run / "adapter").is_dir()


OUTPUTS = {
    "file": "is a file",
    "file/run": "is a file, so",
    "/dev/null": "is a file",
    "dangling": "is a link to nothing",
    "dangling/run": "is a link to nothing",
    "loop": "cannot be written: Too many levels of symbolic links",
    "x" * 300: "cannot be written: File name too long",
    "/proc/run": "cannot be written: ",
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_that_cannot_be(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    folder = tmp_path / name
    with pytest.raises(FileError, match=OUTPUTS[name]) as caught:
        make_folder(folder)
    assert caught.value.hint
    if name != "/proc/run":  # only writing shows it
        with pytest.raises(FileError):
            check_output(recipe(folder), resume=False, overwrite=False)
        with pytest.raises(FileError):
            write_text(folder / "file.json", "{}")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert recipe(Path("~/runs/x")).output == str(tmp_path / "runs" / "x")
    with pytest.raises(ValidationError, match="unless it names a home folder"):
        recipe(Path("~nobody-of-this-name/x"))
    pipeline = tmp_path / "p.yaml"
    stage = "{stage: sft, model: {base: b}, data: {train: [{path: r.jsonl}]}"
    third = stage.replace("base: b", 'base: "${a}"')
    (tmp_path / "r.jsonl").write_text("{}", encoding="utf-8")
    pipeline.write_text(
        f"output: ~/all\nstages:\n  a: {stage}}}\n  b: {stage}, output: ~/b}}\n  c: {third}}}\n",
        encoding="utf-8",
    )
    steps = load_pipeline(str(pipeline)).steps
    assert [step.output for step in steps] == [str(tmp_path / p) for p in ("all/a", "b", "all/c")]
    assert steps[2].settings.model.base == str(tmp_path / "all/a")


def test_a_full_disk_at_the_start_leaves_nothing(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_recipe(tmp_path, tiny_base, merge=False, training__max_steps=1)
    write = run_folder.write_text

    def full(file: Path, text: str) -> None:
        if file.name == "plan.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, text)

    monkeypatch.setattr(run_folder, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        run_stage(load_recipe(str(path)).recipe, RunOptions(quiet=True))
    assert not (tmp_path / "run").exists()
