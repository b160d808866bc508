"""`alignkit recipes import`: what it prints and writes; imported recipes train and are merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commandline import CommandLine, refused
from running import make_pairs, make_rows, write_rows

from alignkit.recipe.reading.yaml_values import read_values

FILE = """
base_model: org/base
adapter: lora
datasets: [{path: org/rows, type: alpaca}]
sequence_len: 64
micro_batch_size: 4
learning_rate: 1e-4
sample_packing: true
hub_token: hf_SECRET
"""


def test_the_recipe_is_data_and_the_list_is_talk(alignkit: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "ax.yml").write_text(FILE, encoding="utf-8")
    done = alignkit("recipes", "import", "ax.yml", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert read_values(done.stdout, "").values["stage"] == "sft"
    order = ["translated", "sequence_len: 64 -> data.max_length: 64", "no counterpart"]
    order += ["sample_packing: true -- rows are always packed", "done differently here"]
    places = [done.stderr.index(part) for part in order]
    assert places == sorted(places)
    assert "hf_SECRET" not in done.stdout + done.stderr
    assert "nothing was written" in done.stderr


def test_a_file_is_written_once(alignkit: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "ax.yml").write_text(FILE, encoding="utf-8")
    command = ("recipes", "import", "ax.yml", "-o", "my.yaml")
    done = alignkit(*command, cwd=tmp_path)
    assert (done.code, done.stdout) == (0, "")
    text = (tmp_path / "my.yaml").read_text(encoding="utf-8")
    refused(alignkit(*command, cwd=tmp_path), "my.yaml exists", "name another file, or add")
    listed = alignkit(*command, "--overwrite", "--json", cwd=tmp_path)
    values = json.loads(listed.stdout)
    assert values["recipe"] == text
    keys = {"translated", "no_counterpart", "different", "recipe"}
    assert keys <= set(values)
    assert {one["key"] for one in values["no_counterpart"]} == {"sample_packing", "hub_token"}


def test_what_the_user_can_fix_is_said(alignkit: CommandLine, tmp_path: Path) -> None:
    refused(
        alignkit("recipes", "import", "none.yaml", cwd=tmp_path),
        "none.yaml: cannot be read: No such file or directory",
        "check its name",
    )
    (tmp_path / "ax.yml").write_text(FILE.replace("1e-4", "2"), encoding="utf-8")
    refused(
        alignkit("recipes", "import", "ax.yml", cwd=tmp_path),
        "ax.yml:7: learning_rate: training.learning_rate must be less than 1, got 2",
        "usual for SFT",
    )


def llama_factory(folder: Path, base: Path) -> tuple[str, list[str]]:
    (folder / "data").mkdir()
    write_rows(folder / "data" / "turns.jsonl", make_rows(8))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user"}
    entry = {
        "file_name": "turns.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": tags | {"assistant_tag": "assistant", "system_tag": "system"},
    }
    info = json.dumps({"talk": entry})
    (folder / "data" / "dataset_info.json").write_text(info, encoding="utf-8")
    text = (
        f"model_name_or_path: {base}\nstage: sft\ndataset: talk\ntemplate: chatml\nmax_steps: 2\n"
    )
    (folder / "lf.yaml").write_text(f"{text}cutoff_len: 128\nlearning_rate: 1e-3\n", "utf-8")
    return "sft", ["lf.yaml"]


def axolotl(folder: Path, base: Path) -> tuple[str, list[str]]:
    rows = [
        {"talk": row["prompt"], "good": row["chosen"][-1], "bad": row["rejected"][-1]}
        for row in make_pairs(8)
    ]
    write_rows(folder / "pairs.jsonl", rows)
    text = f"""
base_model: {base}
rl: dpo
adapter: lora
lora_target_linear: true
datasets:
  - path: pairs.jsonl
    ds_type: json
    type: chat_template.default
    field_messages: talk
    field_chosen: good
    field_rejected: bad
sequence_len: 128
micro_batch_size: 4
max_steps: 2
learning_rate: 1e-4
"""
    (folder / "ax.yml").write_text(text, encoding="utf-8")
    return "dpo", ["ax.yml"]


def trl(folder: Path, base: Path) -> tuple[str, list[str]]:
    write_rows(folder / "rows.jsonl", make_rows(8))
    text = f"trl sft --model_name_or_path {base} --dataset_name rows.jsonl \\\n  --use_peft "
    text += "--max_length 128 --max_steps 2 --per_device_train_batch_size 4 --assistant_only_loss\n"
    (folder / "run.sh").write_text(text, encoding="utf-8")
    return "sft", ["run.sh"]


@pytest.mark.slow
@pytest.mark.parametrize("make", [llama_factory, axolotl, trl])
def test_an_imported_recipe_trains_to_a_merged_model(
    make: Any, alignkit: CommandLine, tiny_base: Path, tmp_path: Path
) -> None:
    stage, arguments = make(tmp_path, tiny_base)
    done = alignkit("recipes", "import", *arguments, "-o", "my.yaml", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert "first:" not in done.stderr
    assert "not found" not in done.stderr
    done = alignkit(stage, "my.yaml", "output=run", "model.dtype=float32", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert (tmp_path / "run" / "merged" / "model.safetensors").is_file()
