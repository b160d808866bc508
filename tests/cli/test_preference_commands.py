"""Pairs and labelled answers through the command line, and what can be asked afterwards."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import CommandLine, Done
from running import make_labelled, make_pairs, make_preference_recipe, write_rows
from tiny import tiny_tokenizer
from transformers import AutoModelForSequenceClassification

EXACT = ("--dtype", "float32")
STAGES = ("reward", "dpo", "kto")


@pytest.fixture(scope="module")
def folder(
    alignkit: CommandLine, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Holds for each stage a folder with a recipe, its rows and its finished run."""
    folder = tmp_path_factory.mktemp("preferences").resolve()
    for stage in STAGES:
        (folder / stage).mkdir()
        make = make_labelled if stage == "kto" else make_pairs
        write_rows(folder / stage / "held.jsonl", make(5, seed=8))
        recipe = make_preference_recipe(
            folder / stage, tiny_base, stage, merge=True, data__eval=[{"path": "held.jsonl"}]
        )
        done = alignkit(stage, recipe, cwd=folder)
        assert done.code == 0, done.stderr
        assert done.stdout == ""
        (folder / stage / "said").write_text(done.stderr, encoding="utf-8")
    answers = [
        {
            "prompt": [{"role": "user", "content": "the cat"}],
            "completion": [{"role": "assistant", "content": text}],
        }
        for text in ("sat on a mat", "birds fly")
    ]
    write_rows(folder / "answers.jsonl", answers)
    return folder


def as_json(done: Done) -> Any:
    """stdout is one JSON document and nothing else."""
    assert done.code == 0, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout)


def summary(folder: Path, stage: str) -> Any:
    path = folder / stage / "run" / "run.json"
    return json.loads(path.read_text(encoding="utf-8"))["summary"]


# Training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_run_says(stage: str, folder: Path) -> None:
    said = (folder / stage / "said").read_text(encoding="utf-8")
    verb = "eval" if stage == "reward" else "chat"
    run = folder / stage / "run"
    assert f"next: alignkit {verb} {run}" in said.replace("\n", "")
    assert re.search(r"before: loss \d+\.\d{4}  accuracy \d+\.\d%", said)
    assert re.search(r"after:  loss \d+\.\d{4}  accuracy \d+\.\d%", said)
    reference = "reference: adapter off, each row is read about once: caching would save nothing"
    assert (reference in said) == (stage != "reward")
    assert ("a sequence classifier with one label" in said) == (stage == "reward")


def test_the_summary_as_json(alignkit: CommandLine, folder: Path) -> None:
    found = as_json(alignkit("dpo", "dpo/recipe.yaml", "output=again", "--json", "-q", cwd=folder))
    assert found["after"] == summary(folder, "dpo")["after"]
    assert found["output"] == "again"


def test_help_lists_the_stages(alignkit: CommandLine, folder: Path) -> None:
    done = alignkit("--help", cwd=folder, COLUMNS="160")
    assert done.code == 0
    for stage, words in (
        ("reward", "Train a reward model on preference pairs"),
        ("dpo", "Optimize preferences on pairs: DPO, IPO, SimPO, ORPO"),
        ("kto", "Optimize preferences on single completions labelled good or bad"),
    ):
        assert re.search(rf"\b{stage}\b +{words}", done.stdout)
        own = alignkit(stage, "--help", cwd=folder, COLUMNS="160")
        assert words in own.stdout
        assert "--resume" in own.stdout


# plan ------------------------------------------------------------------------------------------

LN_ONCE = "adapter off, each row is read about once: caching would save nothing"
REFERENCES: dict[str, tuple[str, list[str], str, str]] = {
    "one pass": ("dpo", [], "adapter_off", LN_ONCE),
    "several passes": (
        "dpo",
        ["training.max_steps=12"],
        "cached",
        "cached, each row is read 3.0 times and scored once",
    ),
    "full weights": (
        "kto",
        ["adapter={kind: full}"],
        "cached",
        "cached, all weights are trained: no second model is kept in memory",
    ),
    "as it says": (
        "kto",
        ["reference.kind=frozen_copy"],
        "frozen_copy",
        "frozen copy, as the recipe says",
    ),
}


@pytest.mark.parametrize("case", REFERENCES)
def test_plan_shows_the_reference(case: str, alignkit: CommandLine, folder: Path) -> None:
    stage, overrides, kind, sentence = REFERENCES[case]
    words = alignkit("plan", f"{stage}/recipe.yaml", *overrides, cwd=folder)
    assert words.code == 0, words.stderr
    assert re.search(rf"^  reference +{re.escape(sentence)}$", words.stdout, re.MULTILINE)
    plan = as_json(alignkit("plan", f"{stage}/recipe.yaml", *overrides, "--json", cwd=folder))
    assert plan["reference"] == kind
    assert sentence == f"{kind.replace('_', ' ')}, {plan['reference_reason']}"


@pytest.mark.parametrize("arguments", [["reward"], ["dpo", "objective={kind: simpo}"]])
def test_plan_without_a_reference(
    arguments: list[str], alignkit: CommandLine, folder: Path
) -> None:
    stage, *overrides = arguments
    recipe = f"{stage}/recipe.yaml"
    words = alignkit("plan", recipe, *overrides, cwd=folder)
    assert words.code == 0, words.stderr
    assert not re.search(r"^  reference ", words.stdout, re.MULTILINE)
    assert as_json(alignkit("plan", recipe, *overrides, "--json", cwd=folder))["reference"] is None


# inspect ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_inspect_pairs(stage: str, alignkit: CommandLine, folder: Path) -> None:
    found = as_json(alignkit("inspect", f"{stage}/recipe.yaml", "-n", "16", "--json", cwd=folder))
    tokenizer = tiny_tokenizer()
    for row, shown in zip(make_pairs(), found["rows"], strict=True):
        assert [part["name"] for part in shown["parts"]] == ["prompt", "chosen", "rejected"]
        assert sum(part["length"] for part in shown["parts"]) == len(shown["ids"])
        pieces = {}
        for part in shown["parts"]:
            span = slice(part["start"], part["start"] + part["length"])
            pieces[part["name"]] = (shown["ids"][span], shown["labels"][span])
        prompt, labels = pieces["prompt"]
        assert set(labels) == {-100}
        text = tokenizer.apply_chat_template(
            row["prompt"], tokenize=False, add_generation_prompt=True
        )
        begun = tokenizer.decode(prompt)
        assert text.startswith(begun)
        for side in ("chosen", "rejected"):
            ids, labels = pieces[side]
            answer = row[side][0]["content"] + "<|im_end|>"
            assert begun + tokenizer.decode(ids) == text + answer
            trained = [label for label in labels if label != -100]
            assert tokenizer.decode(trained) == answer
        assert shown["trained"] == sum(label != -100 for label in shown["labels"])
    assert found["report"]["trained_tokens"] == sum(row["trained"] for row in found["rows"])


def test_inspect_mismatched_answers(alignkit: CommandLine, folder: Path) -> None:
    found = as_json(alignkit("inspect", "kto/recipe.yaml", "-n", "16", "--json", cwd=folder))
    tokenizer = tiny_tokenizer()
    rows = make_labelled()
    answers = [row["completion"][0]["content"] + "<|im_end|>" for row in rows]
    mismatched = []
    for number, (row, shown) in enumerate(zip(rows, found["rows"], strict=True)):
        role = "chosen" if row["label"] else "rejected"
        assert [part["name"] for part in shown["parts"]] == ["prompt", role, "mismatched"]
        _, own, other = (
            [i for i in shown["labels"][p["start"] : p["start"] + p["length"]] if i != -100]
            for p in shown["parts"]
        )
        assert tokenizer.decode(own) == answers[number]
        assert shown["trained"] == len(own), "a mismatched answer is not trained"
        mismatched.append(tokenizer.decode(other))
    assert sorted(mismatched) == sorted(answers), "the answers of other rows"
    assert all(one != two for one, two in zip(mismatched, answers, strict=True))
    assert found["report"]["trained_tokens"] == sum(row["trained"] for row in found["rows"])


def test_inspect_in_words(alignkit: CommandLine, folder: Path) -> None:
    row = make_pairs(1)[0]
    pairs = alignkit("inspect", "reward/recipe.yaml", "-n", "1", cwd=folder)
    labelled = alignkit("inspect", "kto/recipe.yaml", "-n", "1", cwd=folder)
    assert (pairs.code, labelled.code) == (0, 0)
    for text in (pairs.stdout, labelled.stdout):
        assert f"<|im_start|>user\n{row['prompt'][0]['content']}<|im_end|>" in text
        assert re.search(r"^\[prompt, \d+ tokens\]$", text, re.MULTILINE)
        assert re.search(r"^\[chosen, \d+ tokens\]$", text, re.MULTILINE)
        assert f"«{row['chosen'][0]['content']}<|im_end|>»" in text
    assert re.search(r"^\[rejected, \d+ tokens\]$", pairs.stdout, re.MULTILINE)
    assert f"«{row['rejected'][0]['content']}<|im_end|>»" in pairs.stdout
    assert "[rejected" not in labelled.stdout
    assert re.search(
        r"^\[mismatched, \d+ tokens, scored and not trained\]$", labelled.stdout, re.MULTILINE
    )


# eval ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "part"),
    [(stage, "") for stage in STAGES]
    + [("reward", "/merged"), ("reward", "/adapter"), ("dpo", "/merged")],
)
def test_eval_repeats_the_runs_own_numbers(
    stage: str, part: str, alignkit: CommandLine, folder: Path
) -> None:
    name = f"{stage}/run{part}"
    found = as_json(alignkit("eval", name, *EXACT, "--json", cwd=folder))[name]
    after = summary(folder, stage)["after"]
    assert found.keys() == after.keys()
    for key, value in after.items():
        if "accuracies" not in key and key != "calibration_error":
            assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-4), key
    assert found["rewards/accuracies"] == after["rewards/accuracies"]


@pytest.mark.parametrize("stage", STAGES)
def test_eval_in_words(stage: str, alignkit: CommandLine, folder: Path) -> None:
    done = alignkit("eval", f"{stage}/run", *EXACT, cwd=folder)
    assert done.code == 0, done.stderr
    heads, values = done.stdout.splitlines()
    after = summary(folder, stage)["after"]
    assert re.split(r"  +", heads)[:5] == ["model", "loss", "accuracy", "95% from", "to"]
    assert values.startswith(f"{stage}/run  ")
    assert f"{after['loss']:.3f}" in values
    assert f"{after['rewards/accuracies']:.1%}" in values
    assert ("AUC" in heads, "calibration error" in heads) == (stage == "kto", stage != "kto")


def test_eval_of_two_models_on_the_first_ones_rows(
    alignkit: CommandLine, folder: Path, tiny_base: Path
) -> None:
    found = as_json(
        alignkit("eval", "dpo/run", "reward/run", tiny_base, *EXACT, "--json", cwd=folder)
    )
    assert list(found) == ["dpo/run", "reward/run", str(tiny_base)]
    assert {values["pairs"] for values in found.values()} == {5.0}
    alone = as_json(alignkit("eval", "reward/run", *EXACT, "--json", cwd=folder))["reward/run"]
    assert found["reward/run"] == alone


def test_a_reward_model_scores_pairs_of_a_file(alignkit: CommandLine, folder: Path) -> None:
    arguments = ["eval", "reward/run", "--data", "dpo/held.jsonl", *EXACT, "--json"]
    found = as_json(alignkit(*arguments, cwd=folder))["reward/run"]
    assert found["rewards/margins"] == pytest.approx(
        summary(folder, "reward")["after"]["rewards/margins"], abs=1e-5
    )
    assert "scores" not in found
    part = as_json(alignkit(*arguments, "--take", "2", cwd=folder))["reward/run"]
    assert (part["pairs"], found["pairs"]) == (2.0, 5.0)


def scored_by_transformers(folder: Path, prompt: str, answer: str) -> float:
    """As anyone would with the written classifier: its reward at the end of the turn."""
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    text = str(tiny_tokenizer().apply_chat_template(turns, tokenize=False)).rstrip()
    ids = tiny_tokenizer()(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder / "reward/run/merged")
    with torch.no_grad():
        return float(model(input_ids=ids).logits[0, 0])


def test_a_reward_model_scores_single_answers(alignkit: CommandLine, folder: Path) -> None:
    file = ["eval", "reward/run", "--data", "answers.jsonl", *EXACT]
    rows = as_json(alignkit(*file, "--json", cwd=folder))["reward/run"]
    assert [score["place"] for score in rows["scores"]] == ["answers.jsonl:1", "answers.jsonl:2"]
    rewards = [score["reward"] for score in rows["scores"]]
    assert rewards[0] != pytest.approx(rewards[1], abs=1e-3)
    for reward, text in zip(rewards, ("sat on a mat", "birds fly"), strict=True):
        assert reward == pytest.approx(scored_by_transformers(folder, "the cat", text), abs=1e-5)
    assert rows["rewards/mean"] == pytest.approx(sum(rewards) / 2)
    assert (rows["rewards/min"], rows["rewards/max"]) == (min(rewards), max(rewards))
    words = alignkit(*file, cwd=folder)
    assert words.stdout.splitlines()[:2] == [
        f"{reward:>9.4f}  answers.jsonl:{number}" for number, reward in enumerate(rewards, start=1)
    ]

    typed = ["eval", "reward/run", "--prompt", "the cat", *EXACT]
    for text in ("sat on a mat", "birds fly", "sat on a mat"):
        typed += ["--answer", text]
    found = as_json(alignkit(*typed, "--json", cwd=folder))["reward/run"]
    assert [score["answer"] for score in found] == ["sat on a mat", "birds fly", "sat on a mat"]
    assert found[0]["reward"] == found[2]["reward"]
    assert [score["reward"] for score in found[:2]] == pytest.approx(rewards, abs=1e-5)
    lines = alignkit(*typed, cwd=folder).stdout.splitlines()
    assert lines == [f"{score['reward']:>9.4f}  {score['answer']}" for score in found]


def test_a_language_model_on_pairs(alignkit: CommandLine, folder: Path, tiny_base: Path) -> None:
    pairs = ["--data", "dpo/held.jsonl", *EXACT, "--json"]
    plain = alignkit("eval", tiny_base, *pairs, cwd=folder)
    name = str(tiny_base)
    found = as_json(plain)[name]
    assert f"{name}: rewards are plain log-probs" in plain.stderr.replace("\n", "")
    assert found["rewards/chosen"] == found["logps/chosen"] < -10
    before = summary(folder, "dpo")["before"]
    assert found["logps/chosen"] == pytest.approx(before["logps/chosen"], rel=1e-5)
    itself = alignkit("eval", tiny_base, *pairs, "--reference", tiny_base, cwd=folder)
    assert f"implicit rewards are relative to {name}" in itself.stderr.replace("\n", "")
    values = as_json(itself)[name]
    assert values["rewards/margins"] == 0.0
    assert values["rewards/accuracies"] == 0.5
    # The other way round, rewards change their sign.
    after = summary(folder, "dpo")["after"]
    swapped = as_json(alignkit("eval", tiny_base, *pairs, "--reference", "dpo/run", cwd=folder))
    assert swapped[name]["rewards/margins"] == pytest.approx(-after["rewards/margins"], abs=1e-5)
    assert after["rewards/margins"] != pytest.approx(0.0, abs=1e-3)


def test_a_kto_run_on_pairs_and_on_labelled_rows(alignkit: CommandLine, folder: Path) -> None:
    pairs, labelled = (
        as_json(alignkit("eval", "kto/run", "--data", data, *EXACT, "--json", cwd=folder))
        for data in ("dpo/held.jsonl", "kto/held.jsonl")
    )
    assert pairs["kto/run"]["pairs"] == 5.0
    assert labelled["kto/run"]["rows"] == 5.0
    after = summary(folder, "kto")["after"]
    assert labelled["kto/run"]["rewards/margins"] == pytest.approx(
        after["rewards/margins"], abs=1e-5
    )


REFUSED: dict[str, tuple[list[str], str]] = {
    "a language model scores no single answer": (
        ["eval", "dpo/run", "--prompt", "a", "--answer", "b"],
        "error: dpo/run is a language model: only a reward model scores single answers\n"
        "hint: name a run of the reward stage\n",
    ),
    "a prompt without an answer": (
        ["eval", "reward/run", "--prompt", "a"],
        "error: --prompt and --answer go together\nhint: give both, or --data\n",
    ),
    "a prompt and a file": (
        ["eval", "reward/run", "--prompt", "a", "--answer", "b", "--data", "answers.jsonl"],
        "error: --data and --prompt exclude each other\nhint: give one of the two\n",
    ),
    "a prompt in no dtype": (
        ["eval", "reward/run", "--prompt", "a", "--answer", "b", "--dtype", "int4"],
        "error: --dtype cannot be 'int4'\nhint: one of auto, bfloat16, float16, float32\n",
    ),
    "a prompt and a number of rows": (
        ["eval", "reward/run", "--prompt", "a", "--answer", "b", "--take", "3"],
        "error: --take and --max-length go with --data: the run's own rows follow its recipe\n"
        "hint: name the file with --data\n",
    ),
    "a prompt and a reference": (
        ["eval", "reward/run", "--prompt", "a", "--answer", "b", "--reference", "dpo/run"],
        "error: --reference has no use for answers to --prompt: it is what log-probs of "
        "preferences are compared with\nhint: leave it out\n",
    ),
    "a reward model as reference": (
        ["eval", "dpo/run", "--reference", "reward/run"],
        "error: reward/run is a reward model: it scores answers and writes none\n"
        "hint: score with `alignkit eval reward/run --prompt TEXT --answer TEXT`\n",
    ),
    "labelled rows and no kto run": (
        ["eval", "dpo/run", "--data", "kto/held.jsonl"],
        "error: dpo/run is not a kto run, and the rows are labelled completions\n"
        "hint: name a run of the kto stage or a reward model, or rows of another format\n",
    ),
    "generate": (
        ["generate", "reward/run", "the cat"],
        "error: reward/run is a reward model: it scores answers and writes none\n"
        "hint: score with `alignkit eval reward/run --prompt TEXT --answer TEXT`\n",
    ),
    "chat with the classifier": (
        ["chat", "reward/run/merged"],
        "error: reward/run/merged is a reward model: it scores answers and writes none\n"
        "hint: score with `alignkit eval reward/run/merged --prompt TEXT --answer TEXT`\n",
    ),
    "chat with the adapter": (
        ["chat", "reward/run/adapter"],
        "error: reward/run/adapter is a reward model: it scores answers and writes none\n"
        "hint: score with `alignkit eval reward/run/adapter --prompt TEXT --answer TEXT`\n",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_one_sentence(case: str, alignkit: CommandLine, folder: Path) -> None:
    arguments, sentence = REFUSED[case]
    done = alignkit(*arguments, cwd=folder)
    assert (done.code, done.stdout) == (2, "")
    beside = (" rows used, ", " names its base: ")
    said = [line for line in done.stderr.splitlines() if not any(b in line for b in beside)]
    assert "\n".join(said) + "\n" == sentence


def test_a_reference_is_of_no_use_to_a_reward_model(alignkit: CommandLine, folder: Path) -> None:
    done = alignkit("eval", "reward/run", "--reference", "dpo/run", cwd=folder)
    assert (done.code, done.stdout) == (2, "")
    assert "error: --reference has no use for reward models: " in done.stderr
    single = alignkit(
        "eval", "dpo/run", "--data", "answers.jsonl", "--reference", "dpo/run", cwd=folder
    )
    assert (single.code, single.stdout) == (2, "")
    assert "error: --reference has no use for single answers: " in single.stderr


# merge-lora ------------------------------------------------------------------------------------


def test_merge_lora_of_a_reward_run(alignkit: CommandLine, folder: Path) -> None:
    report = as_json(
        alignkit("merge-lora", "reward/run", "--output", "merged-again", "--json", cwd=folder)
    )
    assert report["output"] == "merged-again"
    assert report["max_difference"] < 1e-4 < report["spread"]
    assert report["modules"] == 14
    again, first = folder / "merged-again", folder / "reward" / "run" / "merged"
    for name in ("model.safetensors", "reward.json", "config.json", "chat_template.jinja"):
        assert (again / name).read_bytes() == (first / name).read_bytes()
    narrow = alignkit(
        "merge-lora", "reward/run", "--output", "narrow", "--dtype", "bfloat16", cwd=folder
    )
    assert narrow.code == 0, narrow.stderr
    assert "merged 14 layers and the head into narrow (bfloat16), a sequence classifier" in (
        narrow.stderr
    )
    scores = [
        as_json(alignkit("eval", name, "--data", "answers.jsonl", *EXACT, "--json", cwd=folder))[
            name
        ]["rewards/mean"]
        for name in ("merged-again", "narrow", "reward/run")
    ]
    # The same rewards from weights of 8 bits of precision, near 0.01 apart in a reward near 1.
    assert scores[0] == scores[2] != scores[1] == pytest.approx(scores[0], abs=0.05)
