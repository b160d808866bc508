"""Files of other toolkits become recipes: what is written, what is said, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignkit.errors import RecipeError
from alignkit.recipe.importing.write import Imported, import_file
from alignkit.recipe.reading.load import load_recipe
from alignkit.recipe.reading.yaml_values import read_values


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def imported(text: str, name: str = "foreign.yaml", **options: Any) -> Imported:
    Path(name).write_text(text, encoding="utf-8")
    return import_file(Path(name), **options)


def values(done: Imported) -> Any:
    assert done.text.startswith("# From ")
    return read_values(done.text, "").values


def said(done: Imported, key: str = "") -> str:
    return "; ".join(one.says for one in done.different if one.key == key)


def reasons(done: Imported) -> dict[str, str]:
    return {one.key: one.reason for one in done.no_counterpart}


def refused(text: str, name: str = "foreign.yaml", **options: Any) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        imported(text, name, **options)
    return caught.value


def write_info(entries: dict[str, Any], folder: str = "data") -> None:
    Path(folder).mkdir(exist_ok=True)
    (Path(folder) / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")


LLAMA_FACTORY = """
model_name_or_path: org/base
stage: STAGE
dataset: mine
template: qwen
cutoff_len: 1000
learning_rate: 2.0e-5
"""
PAIRS = {"file_name": "p.json", "ranking": True}


def test_llama_factory_sft() -> None:
    write_info({"mine": {"file_name": "m.json"}})
    Path("data/m.json").write_text("[]", encoding="utf-8")
    done = imported(LLAMA_FACTORY.replace("STAGE", "sft") + "val_size: 0.1\nmask_history: true\n")
    assert values(done) == {
        "stage": "sft",
        "output": "runs/foreign",
        "seed": 42,
        "model": {"base": "org/base"},
        "adapter": {"rank": 8, "alpha": 16},
        "data": {
            "train": [{"path": "data/m.json", "format": "alpaca"}],
            "eval_fraction": 0.1,
            "max_length": 1000,
            "too_long": "truncate_right",
            "train_on": "last_turn",
        },
        "training": {
            "batch_size": 8,
            "learning_rate": 2e-5,
            "epochs": 3,
            "schedule": "linear",
            "warmup": 0,
        },
    }
    assert {one.key for one in done.translated} == {
        *("model_name_or_path", "stage", "dataset", "cutoff_len", "learning_rate"),
        *("val_size", "mask_history"),
    }
    assert "the model's own chat template" in said(done, "template")
    assert "training.epochs: 3, their default" in said(done)
    assert done.not_found == ()
    load = Path("mine.yaml")
    load.write_text(done.text, encoding="utf-8")
    assert load_recipe("mine.yaml").recipe.stage == "sft"


@pytest.mark.parametrize(
    ("loss", "objective"),
    [
        ("", None),
        ("dpo_label_smoothing: 0.1", {"kind": "cdpo", "label_smoothing": 0.1}),
        (
            "pref_loss: ipo\npref_beta: 0.2",
            {"kind": "ipo", "tau": 0.2, "per_token": True},
        ),
        ("pref_loss: orpo\npref_beta: 0.3", {"kind": "orpo", "beta": 0.3}),
        ("pref_loss: simpo\npref_beta: 2.0", {"kind": "simpo", "beta": 2, "gamma": 0.5}),
    ],
)
def test_llama_factory_dpo(loss: str, objective: dict[str, Any] | None) -> None:
    write_info({"mine": PAIRS})
    done = imported(LLAMA_FACTORY.replace("STAGE", "dpo") + loss + "\n")
    assert values(done).get("objective") == objective
    assert values(done)["data"]["train"] == [{"path": "data/p.json", "format": "preference"}]
    assert done.not_found == ("data/p.json",)


def test_llama_factory_other_stages() -> None:
    write_info({"mine": PAIRS | {"columns": {"prompt": "q", "chosen": "a", "rejected": "b"}}})
    reward = values(imported(LLAMA_FACTORY.replace("STAGE", "rm")))
    assert (reward["stage"], reward["objective"]) == ("reward", {"center": 0.0})
    assert reward["data"]["train"][0]["columns"] == {
        "instruction": "q",
        "chosen": "a",
        "rejected": "b",
    }
    tag = {"columns": {"messages": "turns", "kto_tag": "good"}, "formatting": "sharegpt"}
    write_info({"mine": {"hf_hub_url": "org/labelled"} | tag})
    kto = values(imported(LLAMA_FACTORY.replace("STAGE", "kto") + "kto_chosen_weight: 1.5\n"))
    assert kto["objective"] == {"desirable_weight": 1.5}
    assert kto["data"]["train"][0] == {
        "hub": "org/labelled",
        "format": "sharegpt",
        "columns": {"conversations": "turns", "label": "good"},
    }
    write_info({"mine": {"file_name": "m.json", "columns": {"prompt": "body"}}})
    texts = values(imported(LLAMA_FACTORY.replace("STAGE", "pt")))
    assert (texts["stage"], texts["data"]["train_on"]) == ("sft", "everything")
    assert texts["data"]["train"][0]["columns"] == {"text": "body"}
    ppo = values(imported(LLAMA_FACTORY.replace("STAGE", "ppo") + "reward_model: runs/rm\n"))
    assert ppo["reward"] == {"model": "runs/rm"}
    assert ppo["rollout"]["prompts_per_step"] == 8
    assert ppo["objective"] == {"kl_coef": 0.2, "kl_target": 6}


def test_alpha_of_llama_factory_is_twice_the_rank() -> None:
    write_info({"mine": {"file_name": "m.json"}})
    done = imported(LLAMA_FACTORY.replace("STAGE", "sft") + "lora_rank: 64\n")
    assert values(done)["adapter"] == {"rank": 64, "alpha": 128}


def test_llama_factory_reads_json_with_tabs() -> None:
    write_info({"mine": {"file_name": "m.json"}})
    text = '{\n\t"model_name_or_path": "org/base",\n\t"cutoff_len": 99,\n\t"dataset": "mine"\n}'
    assert values(imported(text, "foreign.json"))["data"]["max_length"] == 99


TRL_DPO = r"""#!/bin/sh
MODEL=org/chat
accelerate launch --config_file multi.yaml --num_processes 4 \
    trl/scripts/dpo.py --model_name_or_path $MODEL \
    --dataset_name org/pairs --eval_strategy steps --eval_steps 50 \
    --per_device_train_batch_size 2 --gradient_accumulation_steps 8 \
    --use_peft --lora_target_modules q_proj v_proj --beta=0.2 --no_remove_unused_columns \
    --output_dir "runs/my dpo" && echo done
"""


def test_a_command_line_of_trl() -> None:
    done = imported(TRL_DPO, "run.sh")
    recipe = values(done)
    assert recipe["stage"] == "dpo"
    assert recipe["output"] == "runs/my dpo"
    assert recipe["model"] == {"base": "org/chat"}
    assert recipe["training"]["batch_size"] == 64
    assert recipe["training"]["learning_rate"] == 1e-6
    assert recipe["training"]["eval_every"] == 50
    assert recipe["adapter"]["targets"] == ["q_proj", "v_proj"]
    assert recipe["adapter"]["dropout"] == 0.05
    assert recipe["objective"] == {"beta": 0.2}
    assert recipe["data"]["eval"] == [{"hub": "org/pairs", "split": "test"}]
    assert "counted for one process" not in said(done, "per_device_train_batch_size")
    assert done.off == ("remove_unused_columns",)
    assert done.no_counterpart == ()


@pytest.mark.parametrize(
    ("command", "stage", "objective"),
    [
        ("trl sft", "sft", None),
        ("trl reward", "reward", {"center": 0.0}),
        ("trl kto --beta 0.3", "kto", {"beta": 0.3}),
        ("torchrun --nproc_per_node=2 -m trl.scripts.dpo", "dpo", None),
        ("python examples/scripts/orpo.py", "dpo", {"kind": "orpo"}),
        ("python examples/scripts/cpo.py", "dpo", {"kind": "cpo"}),
        ("python scripts/reward_modeling.py", "reward", {"center": 0.0}),
        (
            "trl grpo --reward_funcs accuracy_reward --loss_type dr_grpo --epsilon_high 0.28",
            "grpo",
            {"loss": "constant", "clip": [0.2, 0.28]},
        ),
        ("trl rloo --reward_funcs r.score", "grpo", {"kind": "rloo", "kl_coef": 0.05}),
    ],
)
def test_stages_of_trl(command: str, stage: str, objective: dict[str, Any] | None) -> None:
    line = f"{command} --model_name_or_path org/base --dataset_name org/rows\n"
    recipe = values(imported(line, "run.txt"))
    assert recipe["stage"] == stage
    kind = recipe.get("objective")
    assert kind == objective or {k: kind[k] for k in objective or {}} == objective
    assert recipe["adapter"] == {"kind": "full"}
    assert recipe["training"]["schedule"] == "linear"


def test_a_yaml_file_of_trl_needs_its_stage() -> None:
    text = "model_name_or_path: org/base\ndataset_name: org/rows\nmax_length: 512\n"
    assert "--stage" in str(refused(text).problems[0].hint)
    recipe = values(imported(text, stage="sft"))
    assert recipe["data"]["too_long"] == "truncate_right"
    assert recipe["data"]["train_on"] == "everything"
    other = refused(LLAMA_FACTORY.replace("STAGE", "sft"), stage="dpo")
    assert "is for the stage sft, not dpo" in str(other)


def test_null_is_their_default_and_said() -> None:
    text = "model_name_or_path: org/base\ndataset_name: org/rows\nmax_length: null\nrun_name:\n"
    done = imported(text, stage="sft")
    assert said(done, "max_length") == "null; 1024 is taken, which is their default"
    assert done.off == ("run_name",)


def test_trl_trains_the_completion_of_prompt_and_completion() -> None:
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    text = "model_name_or_path: org/base\ndataset_name: rows.jsonl\nuse_peft: true\n"
    data = values(imported(text, stage="sft"))["data"]
    assert data["train"] == [{"path": "rows.jsonl"}]
    assert "train_on" not in data  # completions


def test_a_config_named_on_the_command_line_is_read() -> None:
    Path("base.yaml").write_text("model_name_or_path: org/base\nbeta: 0.5\n", encoding="utf-8")
    line = "trl dpo --config base.yaml --dataset_name org/rows --beta 0.7\n"
    recipe = values(imported(line, "run.sh"))
    assert recipe["model"]["base"] == "org/base"
    assert recipe["objective"] == {"beta": 0.7}
    missing = refused("trl dpo --config none.yaml\n", "run.sh")
    assert "run.sh:1: --config names no file: 'none.yaml'" in str(missing)


AXOLOTL = """
base_model: org/base
adapter: qlora
load_in_4bit: true
lora_r: 32
lora_alpha: 64
lora_target_linear: true
datasets:
  - path: org/rows
    type: TYPE
    split: train[:100]
sequence_len: 4096
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 2
learning_rate: 0.0002
wandb_project: mine
special_tokens:
"""


def test_axolotl_sft() -> None:
    done = imported(AXOLOTL.replace("TYPE", "alpaca") + "val_set_size: 0.05\n")
    assert values(done) == {
        "stage": "sft",
        "output": "./model-out",
        "seed": 42,
        "model": {"base": "org/base", "quantization": "nf4"},
        "adapter": {"kind": "lora", "rank": 32, "alpha": 64, "targets": "all-linear"},
        "data": {
            "train": [{"hub": "org/rows", "format": "alpaca", "take": 100}],
            "eval_fraction": 0.05,
            "max_length": 4096,
            "too_long": "drop",
        },
        "training": {
            "batch_size": 8,
            "learning_rate": 2e-4,
            "epochs": 2,
            "trackers": ["wandb"],
        },
    }
    assert done.off == ("special_tokens",)
    assert "chat template takes the place" in said(done, "datasets")


@pytest.mark.parametrize(
    ("more", "stage", "objective"),
    [
        ("rl: dpo\nrl_beta: 0.3", "dpo", {"kind": "dpo", "beta": 0.3}),
        ("rl: ipo", "dpo", {"kind": "ipo", "tau": 0.1, "per_token": True}),
        ("rl: orpo\norpo_alpha: 0.2", "dpo", {"kind": "orpo", "beta": 0.2}),
        ("rl: simpo\nsimpo_gamma: 1.0", "dpo", {"kind": "simpo", "gamma": 1, "beta": 0.1}),
        ("rl: kto\ntrl: {beta: 0.3}", "kto", {"beta": 0.3}),
        ("reward_model: true\ncenter_rewards_coefficient: 0.02", "reward", {"center": 0.02}),
    ],
)
def test_axolotl_preferences(more: str, stage: str, objective: dict[str, Any]) -> None:
    recipe = values(imported(f"{AXOLOTL.replace('TYPE', 'chatml.intel')}{more}\n"))
    assert recipe["stage"] == stage
    assert recipe["objective"] == objective
    assert recipe["data"]["train"][0]["columns"]["instruction"] == "question"


def test_axolotl_grpo() -> None:
    more = "rl: grpo\ntrl:\n  num_generations: 4\n  reward_funcs: [rewards.score]\n  beta: 0.001\n"
    recipe = values(imported(AXOLOTL.replace("TYPE", "completion") + more))
    assert recipe["rollout"]["prompts_per_step"] == 2
    assert recipe["reward"] == {"function": "rewards.py:score", "messages": True}
    assert recipe["objective"]["kl_coef"] == 0.001


def test_rows_whose_turns_have_other_names_are_converted_first() -> None:
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "me", "assistant_tag": "bot"}
    entry = {"file_name": "t.json", "formatting": "sharegpt", "tags": tags}
    write_info({"mine": entry})
    done = imported(LLAMA_FACTORY.replace("STAGE", "sft"))
    assert values(done)["data"]["train"] == [{"path": "mine.jsonl"}]
    assert done.first == ("alignkit data convert data/dataset_info.json --name mine -o mine.jsonl",)
    assert "turns of who and says, where me is user, bot is assistant" in said(done, "dataset")
    rows = "    type: chat_template\n    message_field_role: who\n"
    text = AXOLOTL.replace("    type: TYPE\n", rows).replace("path: org/rows", "path: t.jsonl")
    done = imported(text)
    assert values(done)["data"]["train"][0]["path"] == "t-converted.jsonl"
    (command,) = done.first
    assert command.endswith(" --name t.jsonl -o t-converted.jsonl")
    assert done.not_found == ("t.jsonl",)


def test_a_dataset_info_that_is_not_here_is_said() -> None:
    done = imported(LLAMA_FACTORY.replace("STAGE", "sft"))
    assert done.not_found == ("data/dataset_info.json",)
    assert done.first[0].endswith("--name mine -o mine.jsonl")


def test_paths_are_those_of_the_folder_the_toolkit_ran_in() -> None:
    write_info({"mine": {"file_name": "m.json"}}, "repository")
    Path("repository/m.json").write_text("[]", encoding="utf-8")
    Path("repository/examples").mkdir()
    text = LLAMA_FACTORY.replace("STAGE", "sft").replace(
        "dataset: mine", "dataset: mine\ndataset_dir: ."
    )
    done = imported(text, "repository/examples/foreign.yaml")
    train = values(done)["data"]["train"][0]["path"]
    assert train == str(Path("repository/m.json").resolve())
    assert done.not_found == ()


def test_typos_are_named_with_the_key_they_resemble() -> None:
    done = imported(AXOLOTL.replace("TYPE", "alpaca") + "adam_epsilion: 1e-7\nzzz: 1\nrl_beta: 1\n")
    assert reasons(done) == {
        "adam_epsilion": "not a key that alignkit knows of; look whether it is a typo of "
        "adam_epsilon",
        "zzz": "not a key that alignkit knows of; look whether it is a typo",
        "rl_beta": "means nothing in sft",
    }


def test_secrets_are_neither_written_nor_shown() -> None:
    secrets = "hub_token: hf_SECRET\nwandb_api_key: SECRET\nmy_password: SECRET\n"
    address = "mlflow_tracking_uri: https://me:SECRET@host/x?key=SECRET\n"
    done = imported(AXOLOTL.replace("TYPE", "alpaca") + secrets + address)
    assert "SECRET" not in json.dumps(done.as_dict())
    assert {"hub_token", "wandb_api_key", "my_password"} <= set(reasons(done))


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("learning_rate: 1\n", "no key by which a toolkit could be told", "--from trl"),
        ("- a\n", "foreign.yaml: holds no settings", "YAML or JSON"),
        ("output: a\nmodel: {base: b}\ndata: {}\n", "is a recipe of alignkit already", "plan"),
        (
            "cutoff_len: 1\nsequence_len: 2\n",
            "could be of LLaMA-Factory or of Axolotl",
            "--from",
        ),
        (
            AXOLOTL.replace("TYPE", "alpaca").replace("0.0002", "5"),
            "foreign.yaml:16: learning_rate: training.learning_rate must be less than 1, got 5",
            "usual for SFT",
        ),
        (
            AXOLOTL.replace("lora_r: 32", "lora_r: many"),
            "foreign.yaml:5: lora_r must be a number, got many",
            "",
        ),
        (
            AXOLOTL.replace("TYPE", "alpaca").replace("base_model: org/base\n", ""),
            "foreign.yaml: names no model: base_model is missing",
            "add base_model",
        ),
        (
            AXOLOTL.replace("TYPE", "chat_templte"),
            "foreign.yaml:8: datasets: org/rows has the type chat_templte",
            "did you mean chat_template?",
        ),
        (
            AXOLOTL.replace("TYPE", "alpaca") + "rl: gkd\n",
            "rl names no stage of alignkit, got gkd",
            "known: dpo",
        ),
        ("lora_r: 1\nlora_r: 2\n", "lora_r is written twice", "keep one"),
    ],
)
def test_what_cannot_be_read_is_an_error(text: str, message: str, hint: str) -> None:
    error = refused(text)
    assert message in str(error)
    assert hint in error.problems[0].hint


def test_a_command_in_a_text_is_found() -> None:
    text = "It's run so:\n\n    trl sft --model_name_or_path a/b \\\n        --dataset_name c/d\n"
    assert values(imported(text, "note.txt"))["model"]["base"] == "a/b"


def test_wrong_command_lines_are_errors() -> None:
    unset = refused("trl sft --model_name_or_path $MODEL\n", "run.sh")
    assert "run.sh:1: --model_name_or_path holds $MODEL, which the file does not set" in str(unset)
    quote = refused("trl sft --output_dir 'a\n", "run.sh")
    assert "run.sh:1: a quote is not closed" in str(quote)
    group = refused(
        "trl grpo --model_name_or_path a/b --dataset_name c/d --reward_funcs r.f "
        "--num_generations 3\n",
        "run.sh",
    )
    assert "run.sh:1: num_generations must divide the 8 responses of a step, got 3" in str(group)


def test_unknown_keys_of_datasets_are_named() -> None:
    text = AXOLOTL.replace("TYPE", "chat_template\n    field_mesages: talk")
    assert "field_mesages is not a key that alignkit knows of; it resembles field_messages" in (
        said(imported(text), "datasets")
    )
    write_info({"mine": {"file_name": "m.json", "columns": {"promt": "q"}, "rankin": True}})
    notes = said(imported(LLAMA_FACTORY.replace("STAGE", "sft")), "dataset")
    assert "promt is not a key" in notes
    assert "it resembles ranking" in notes


def test_a_full_model_has_no_adapter_keys() -> None:
    text = AXOLOTL.replace("TYPE", "alpaca").replace("adapter: qlora\n", "")
    assert "trains all weights, but model.quantization = nf4" in str(refused(text))
    done = imported(text.replace("load_in_4bit: true\n", ""))
    assert "all weights are trained" in reasons(done)["lora_r"]


def test_processes_multiply_the_batch() -> None:
    done = imported(AXOLOTL.replace("TYPE", "alpaca"), processes=8)
    assert values(done)["training"]["batch_size"] == 64
