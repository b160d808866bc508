"""Command lines of TRL: launchers, shell variables, several commands, null."""

from __future__ import annotations

import pytest
from test_importing import imported, refused, said, values
from test_importing import work as work  # the working folder of each test

ROWS = "--model_name_or_path org/base --dataset_name org/rows"


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        ("torchrun --nnodes 2 --nproc_per_node 8", 16),
        ("torchrun --nnodes=2 --nproc-per-node=8", 16),
        ("torchrun --nproc_per_node 8", 8),
        ("torchrun --nnodes 1:4 --nproc_per_node 8", None),
        ("torchrun --nproc_per_node gpu", None),
        ("accelerate launch --num_machines 2 --num-processes 16", 16),
    ],
)
def test_processes_of_all_nodes_share_a_step(launcher: str, processes: int | None) -> None:
    done = imported(f"{launcher} scripts/sft.py {ROWS}\n", "run.sh")
    assert values(done)["training"]["batch_size"] == 8 * (processes or 1)
    note = said(done, "per_device_train_batch_size")
    assert ("counted for one process" in note) == (processes is None)


def test_further_commands_are_listed() -> None:
    text = f"trl sft {ROWS} && trl kto --beta $B\n# trl cpo\ntrl dpo \\\n    {ROWS}\n"
    done = imported(text, "run.sh")
    assert done.stage == "sft"
    assert "not read: run.sh:1: kto" in said(done)
    assert "not read: run.sh:3: dpo" in said(done)
    assert "cpo" not in said(done)
    assert "not read" not in said(imported(f"trl sft {ROWS} --output_dir x\n", "run.sh"))


def test_variables_are_filled_in_where_they_are_set() -> None:
    text = "BASE=/data\nexport MODEL=\"${BASE}/m\"\nRAW='$BASE/r'\n"
    line = "trl sft --model_name_or_path $MODEL --dataset_name org/rows"
    assert values(imported(f"{text}{line}\n", "run.sh"))["model"]["base"] == "/data/m"
    error = refused(f"{text}{line} --output_dir $RAW\n", "run.sh")
    assert "--output_dir holds $BASE, which the file does not set" in str(error)


def test_null_on_a_command_line_is_their_default() -> None:
    done = imported(f"trl sft {ROWS} --max_length null --report_to none\n", "run.sh")
    assert said(done, "max_length") == "null; 1024 is taken, which is their default"
