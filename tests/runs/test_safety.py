"""What --overwrite and --resume must never do."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn, optim

from alignkit.errors import ModelError, RunError
from alignkit.jobs.merge import MergeOptions, merge_run
from alignkit.recipe.stages.sft import SftRecipe
from alignkit.runtime.checkpoint import find_checkpoint, save_checkpoint
from alignkit.stages.running.run_folder import check_output


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
