"""Every command on a trained tiny model: what it prints, and that --json is one JSON document."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import CommandLine, Done
from peft import LoraConfig, get_peft_model
from running import make_recipe, make_rows, write_rows
from tiny import TOKENIZERS, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

import alignkit as package
from alignkit.cli.training.inspect import _pieces


@pytest.fixture(scope="module")
def folder(
    alignkit: CommandLine, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with a recipe and its finished run."""
    folder = tmp_path_factory.mktemp("commands").resolve()
    write_rows(folder / "held.jsonl", make_rows(5, seed=9))
    recipe = make_recipe(folder, tiny_base, data__eval=[{"path": "held.jsonl"}])
    done = alignkit("sft", recipe, "training.max_steps=6", cwd=folder)
    assert done.code == 0, done.stderr
    return folder


def as_json(done: Done) -> Any:
    """stdout is one JSON document and nothing else."""
    assert done.code == 0, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout)


# plan ------------------------------------------------------------------------------------------


def test_plan_decides_what_the_run_does(alignkit: CommandLine, folder: Path) -> None:
    plan = as_json(alignkit("plan", "recipe.yaml", "training.max_steps=6", "--json", cwd=folder))
    stored = json.loads((folder / "run" / "plan.json").read_text(encoding="utf-8"))
    for made in (plan, stored):
        made["hardware"].pop("memory")  # free at this moment
        made.pop("warnings")
    assert plan.pop("foreign") == []
    assert plan == stored


def test_plan_in_words(alignkit: CommandLine, folder: Path) -> None:
    done = alignkit("plan", "recipe.yaml", "training.batch_size=8", cwd=folder)
    assert done.code == 0, done.stderr
    assert re.search(r"rows +16 rows, [\d,]+ tokens \([\d,]+ trained\), longest \d+", done.stdout)
    assert re.search(r"steps +4 of 8 examples \(2 an epoch\)", done.stdout)
    assert re.search(r"model +LlamaForCausalLM", done.stdout)
    assert "warning: training.learning_rate = 0.002 is above the usual" in done.stderr
    assert "warning: only 4 optimizer steps" in done.stderr
    assert not (folder / "runs").exists()


def test_plan_counts_in_closed_form(alignkit: CommandLine, folder: Path) -> None:
    # 16 rows in steps of 5: 4 steps an epoch; 2.5 epochs are 10 steps; a tenth of them warms up.
    options = ["training.max_steps=null", "training.epochs=2.5", "training.batch_size=5"]
    done = alignkit("plan", "recipe.yaml", *options, "training.warmup=0.1", "--json", cwd=folder)
    plan = as_json(done)
    assert (plan["steps_per_epoch"], plan["steps"], plan["warmup_steps"]) == (4, 10, 1)
    assert plan["tokens"] == round(2.5 * plan["data"]["tokens"])
    memory = plan["memory"]
    parts = ("libraries", "weights", "reference", "training_state", "activations", "workspace")
    assert memory["peak"] == max(
        sum(memory[part] for part in parts), memory["libraries"] + memory["merging"]
    )


# inspect ---------------------------------------------------------------------------------------


def test_inspect_labels_are_the_trained_tokens(alignkit: CommandLine, folder: Path) -> None:
    found = as_json(alignkit("inspect", "recipe.yaml", "--json", "--rows", "16", cwd=folder))
    tokenizer = tiny_tokenizer()
    rows = make_rows()
    assert len(found["rows"]) == found["report"]["kept"] == 16
    for row, shown in zip(rows, found["rows"], strict=True):
        assert len(shown["ids"]) == len(shown["labels"]) == len(shown["tokens"])
        trained = [i for i, label in zip(shown["ids"], shown["labels"], strict=True) if label > -1]
        assert {label for label in shown["labels"] if label < 0} == {-100}
        assert len(trained) == shown["trained"]
        answers = [t["content"] for t in row["messages"] if t["role"] == "assistant"]
        assert tokenizer.decode(trained) == "".join(f"{text}<|im_end|>" for text in answers)
    assert [row["place"].rsplit(":")[-1] for row in found["rows"]] == [str(n) for n in range(1, 17)]
    assert found["report"]["trained_tokens"] == sum(row["trained"] for row in found["rows"])


def test_inspect_marks_what_is_trained(alignkit: CommandLine, folder: Path) -> None:
    done = alignkit("inspect", "recipe.yaml", "-n", "1", cwd=folder)
    assert done.code == 0, done.stderr
    question, answer = (turn["content"] for turn in make_rows()[0]["messages"])
    text = done.stdout
    assert (
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n«{answer}<|im_end|>»"
        in text
    )
    assert text.count("«") == 2  # and once in the legend
    assert "answers end with  '<|im_end|>'" in text
    assert "trained tokens stand between « and »" in text


@pytest.mark.parametrize("family", TOKENIZERS)
def test_inspect_shows_characters_of_several_tokens_whole(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    texts = ("He said: 天气 🙂", " naïve 好的🙂🙂 and so on.", "� ��")
    ids: list[int] = []
    marks: list[bool] = []
    for number, text in enumerate(texts):
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        marks += [number % 2 == 1] * (len(ids) - len(marks))
    pieces = list(_pieces(ids, marks, tokenizer))
    assert "".join(text for text, _ in pieces) == tokenizer.decode(ids)
    shown = "".join(text for text, trained in pieces if trained)
    assert shown.lstrip() == texts[1].lstrip()
    assert len(pieces) > 20


def test_inspect_held_out_rows(alignkit: CommandLine, folder: Path) -> None:
    found = as_json(alignkit("inspect", "recipe.yaml", "--eval", "--json", "-n", "0", cwd=folder))
    assert found["rows"] == []
    assert found["report"]["kept"] == 5


# generate --------------------------------------------------------------------------------------


GREEDY = ("--dtype", "float32", "--max-new-tokens", "12")


def greedy(base: Path, prompt: str) -> str:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), tiny_tokenizer()
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    fields = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    output = model.generate(**fields, max_new_tokens=12, do_sample=False, pad_token_id=0)
    return str(
        tokenizer.decode(output[0, fields["input_ids"].shape[1] :], skip_special_tokens=True)
    ).strip()


def test_generate_is_plain_greedy_decoding(
    alignkit: CommandLine, folder: Path, tiny_base: Path
) -> None:
    prompts = ["the cat", "how many red birds fly over our old house", "a"]
    found = as_json(alignkit("generate", tiny_base, *prompts, "--json", *GREEDY, cwd=folder))
    # Padding on the left changes sums in the last bit only; greedy text is the same.
    assert found == [{"prompt": prompt, "answer": greedy(tiny_base, prompt)} for prompt in prompts]


def test_generate_takes_prompts_from_stdin_and_files(
    alignkit: CommandLine, folder: Path, tiny_base: Path
) -> None:
    (folder / "prompts.txt").write_text("the cat\n\na mat\n", encoding="utf-8")
    by_file = as_json(
        alignkit("generate", tiny_base, "--file", "prompts.txt", "--json", *GREEDY, cwd=folder)
    )
    by_stdin = as_json(
        alignkit("generate", tiny_base, "--json", *GREEDY, cwd=folder, stdin="the cat\n\na mat\n")
    )
    assert [row["prompt"] for row in by_file] == ["the cat", "a mat"]
    assert by_stdin == by_file
    plain = alignkit("generate", tiny_base, "the cat", *GREEDY, cwd=folder)
    assert plain.stdout.strip() == by_file[0]["answer"]


def test_generate_against_another(alignkit: CommandLine, folder: Path, tiny_base: Path) -> None:
    arguments = ["generate", "run", "the cat", "--against", str(tiny_base), *GREEDY]
    (row,) = as_json(alignkit(*arguments, "--json", cwd=folder))
    assert row["answers"][str(tiny_base)] == greedy(tiny_base, "the cat")
    assert row["answers"]["run"] == greedy(folder / "run" / "merged", "the cat")
    table = alignkit(*arguments, cwd=folder, COLUMNS="160")
    assert table.code == 0
    assert "the cat" in table.stdout
    assert "run" in table.stdout


def test_merged_adapter_and_base_with_adapter_say_the_same(
    alignkit: CommandLine, folder: Path, tiny_base: Path
) -> None:
    found = [
        as_json(alignkit("generate", *model, "the cat", "--json", *GREEDY, cwd=folder))
        for model in (["run"], ["run/merged"], ["run/adapter"], ["run", "--base", str(tiny_base)])
    ]
    assert found[0] == found[1] == found[2] == found[3]


def test_sampling_is_seeded(alignkit: CommandLine, folder: Path, tiny_base: Path) -> None:
    def sample(*options: str) -> Any:
        arguments = ["the cat", "--temperature", "1.0", "--json", *GREEDY, *options]
        return as_json(alignkit("generate", tiny_base, *arguments, cwd=folder))

    assert sample("--seed", "3") == sample("--seed", "3") != sample("--seed", "4")
    cold = sample("--top-k", "1")
    assert cold[0]["answer"] == greedy(tiny_base, "the cat")


def test_a_system_message_is_read(alignkit: CommandLine, folder: Path, tiny_base: Path) -> None:
    plain, told = (
        as_json(alignkit("generate", tiny_base, "the cat", "--json", *GREEDY, *more, cwd=folder))
        for more in ([], ["--system", "a mat and our old house"])
    )
    assert plain != told


# chat ------------------------------------------------------------------------------------------


def chat(alignkit: CommandLine, folder: Path, base: Path, *lines: str) -> Done:
    options = ("--dtype", "float32", "--max-new-tokens", "6", "--temperature", "0")
    return alignkit("chat", base, *options, cwd=folder, stdin="\n".join(lines) + "\n")


def test_chat_session(alignkit: CommandLine, folder: Path, tiny_base: Path) -> None:
    (folder / "saved.jsonl").unlink(missing_ok=True)
    done = chat(
        alignkit, folder, tiny_base,
        "the cat",
        "",
        "/help",
        "/set",
        "/set temperature 0.9",
        "/set top_k=5",
        "/retry",
        "/save saved.jsonl",
        "/undo",
        "/system birds fly",
        "a mat",
        "/save saved.jsonl",
        "/clear",
        "/system",
        "/quit",
        "never reached",
    )  # fmt: skip
    assert done.code == 0, done.stderr
    for sentence in (
        f"{tiny_base} is ready. /help lists the commands, /quit leaves.",
        "/retry           answer the last message again",
        "temperature 0.0, top_p 0.95",
        "temperature is 0.9",
        "top_k is 5",
        "took back the last message and its answer",
        "system message set; the conversation starts over",
        "appended 2 messages to saved.jsonl",
        "appended 3 messages to saved.jsonl",
        "the conversation starts over",
        "no system message",
    ):
        assert sentence in done.stderr.replace("\n", " ") or sentence in done.stderr
    assert "error" not in done.stderr
    first, second = [
        json.loads(line)["messages"]
        for line in (folder / "saved.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [turn["role"] for turn in first] == ["user", "assistant"]
    assert [turn["role"] for turn in second] == ["system", "user", "assistant"]
    assert second[0]["content"] == "birds fly"
    answers = done.stdout.splitlines()
    assert answers[0].strip().startswith(greedy(tiny_base, "the cat")[:8])
    assert first[1]["content"] in done.stdout  # the answer of /retry, not the first one
    # What was saved can be trained on.
    plan = alignkit(
        "plan", "recipe.yaml", "data.train=[{path: saved.jsonl}]", "data.eval=[]", cwd=folder
    )
    assert "2 rows" in plan.stdout, plan.stderr


@pytest.mark.parametrize(
    ("line", "sentence", "hint"),
    [
        ("/sytem x", "there is no command /sytem", "did you mean /system?"),
        ("/qiut", "there is no command /qiut", "did you mean /quit?"),
        ("/zzz", "there is no command /zzz", "/help lists them"),
        ("/retry", "there is no answer to repeat", "say something first"),
        ("/undo", "there is nothing to take back", ""),
        ("/save", "/save needs a file name", "/save chats.jsonl"),
        ("/save x.jsonl", "there is nothing to save yet", ""),
        ("/set temperatur 1", "there is no setting 'temperatur'", "settings: max_new_tokens, "),
        ("/set top_p 2", "top_p cannot be 2", "above 0, at most 1"),
        ("/set top_k many", "top_k cannot be 'many'", "a whole number from 0"),
        ("word " * 2100, "do not fit the model's context of 2048", "shorten the prompt"),
    ],
)
def test_chat_mistakes_do_not_end_it(
    line: str, sentence: str, hint: str, alignkit: CommandLine, folder: Path, tiny_base: Path
) -> None:
    done = chat(alignkit, folder, tiny_base, line, "/set top_k 7")
    assert done.code == 0  # the end of input leaves
    assert re.search(f"error: .*{re.escape(sentence)}", done.stderr)
    assert not hint or f"hint: {hint}" in done.stderr
    assert "top_k is 7" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


# eval, merge-lora ------------------------------------------------------------------------------


def test_eval_repeats_the_runs_own_numbers(
    alignkit: CommandLine, folder: Path, tiny_base: Path
) -> None:
    found = as_json(alignkit("eval", "run", tiny_base, "--dtype", "float32", "--json", cwd=folder))
    about = json.loads((folder / "run" / "run.json").read_text(encoding="utf-8"))["summary"]
    for name, key in (("run", "after"), (str(tiny_base), "before")):
        assert found[name]["loss"] == pytest.approx(about[key]["loss"], rel=1e-5)
        assert found[name]["tokens"] == about[key]["tokens"]
        assert found[name]["accuracy"] == pytest.approx(about[key]["accuracy"])
    table = alignkit("eval", "run", "--dtype", "float32", cwd=folder)
    assert f"{about['after']['loss']:.4f}" in table.stdout


def test_eval_on_a_file(alignkit: CommandLine, folder: Path, tiny_base: Path) -> None:
    arguments = ["eval", tiny_base, "--data", "held.jsonl", "--dtype", "float32", "--json"]
    whole = as_json(alignkit(*arguments, cwd=folder))[str(tiny_base)]
    part = as_json(alignkit(*arguments, "--take", "2", cwd=folder))[str(tiny_base)]
    about = json.loads((folder / "run" / "run.json").read_text(encoding="utf-8"))["summary"]
    assert whole["loss"] == pytest.approx(about["before"]["loss"], rel=1e-5)
    assert 0 < part["tokens"] < whole["tokens"]


def test_merge_lora_of_a_run(alignkit: CommandLine, folder: Path) -> None:
    output = folder / "again"
    done = alignkit("merge-lora", "run", "--output", "again", "--json", cwd=folder)
    report = as_json(done)
    assert report["output"] == "again"
    assert report["mean_kl"] < 1e-6
    name = "model.safetensors"
    assert (output / name).read_bytes() == (folder / "run" / "merged" / name).read_bytes()
    refused = alignkit("merge-lora", "run", "--output", "again", cwd=folder)
    assert refused.code == 2
    assert "again already exists" in refused.stderr
    assert "hint: add --overwrite, or name another --output" in refused.stderr
    replaced = alignkit("merge-lora", "run", "--output", "again", "--overwrite", cwd=folder)
    assert replaced.code == 0
    assert "merged 14 layers into again (float32)" in replaced.stderr


def test_merge_lora_of_anyones_adapter(
    alignkit: CommandLine, folder: Path, tiny_base: Path
) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", use_rslora=True)
    model = get_peft_model(tiny_model(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder / "theirs")
    arguments = ["merge-lora", "theirs", "--json", "--output", "theirs-merged"]
    nameless = alignkit(*arguments, cwd=folder)
    assert nameless.code == 2
    assert "name the base with --base" in nameless.stderr
    report = as_json(alignkit(*arguments, "--base", tiny_base, "--data", "held.jsonl", cwd=folder))
    assert report["modules"] == 2
    assert report["mean_kl"] < 1e-6 < report["mean_kl_to_base"]
    AutoModelForCausalLM.from_pretrained(folder / "theirs-merged")


# recipes, fetch, doctor, version ---------------------------------------------------------------


def test_recipes_list_and_copy(alignkit: CommandLine, tmp_path: Path) -> None:
    found = as_json(alignkit("recipes", "list", "--json", cwd=tmp_path))
    assert "quickstart/sft.yaml" in found
    assert all(found.values()), "every shipped recipe says in its first line what it does"
    listed = alignkit("recipes", "list", cwd=tmp_path, COLUMNS="300").stdout
    assert all(name in listed for name in found)
    done = alignkit("recipes", "copy", "quickstart/sft.yaml", "mine/my.yaml", cwd=tmp_path)
    assert done.code == 0
    assert "wrote mine/my.yaml" in done.stderr
    assert (tmp_path / "mine" / "my.yaml").read_text(encoding="utf-8").startswith("# ")
    again = alignkit("recipes", "copy", "quickstart/sft.yaml", "mine/my.yaml", cwd=tmp_path)
    assert again.code == 2
    assert "mine/my.yaml already exists" in again.stderr


def test_recipes_explain_and_schema(alignkit: CommandLine, tmp_path: Path) -> None:
    whole = alignkit("recipes", "explain", cwd=tmp_path).stdout
    assert "training.learning_rate  " in whole
    one = alignkit("recipes", "explain", "training.warmup", cwd=tmp_path).stdout
    assert one.splitlines()[0] == "training.warmup  number  default 0.03"
    assert "below 1 a share of the steps" in one
    section = alignkit("recipes", "explain", "training", cwd=tmp_path).stdout
    assert "training.batch_size" in section
    assert "model.base" not in section
    schema = json.loads(alignkit("recipes", "schema", cwd=tmp_path).stdout)
    assert schema["additionalProperties"] is False
    # Every key of the schema is explained.
    for name in schema["properties"]:
        assert re.search(rf"^{name}  ", whole, re.MULTILINE), name


def test_fetch_without_a_name_lists(alignkit: CommandLine, tmp_path: Path) -> None:
    done = alignkit("fetch", cwd=tmp_path)
    assert done.code == 0
    assert "smollm2-135m-instruct  135 M weights, 93 MB, Apache-2.0" in done.stdout


def test_fetch_says_what_is_here(alignkit: CommandLine, tmp_path: Path, tiny_base: Path) -> None:
    folder = tmp_path / "models" / "smollm2-135m-instruct"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    done = alignkit("fetch", "smollm2-135m-instruct", cwd=tmp_path, ALIGNKIT_HOME=str(tmp_path))
    assert done.code == 0
    assert done.stdout.strip() == str(folder)
    assert f"smollm2-135m-instruct is already in {folder}" in done.stderr.replace("\n", " ")


def test_doctor(alignkit: CommandLine, tmp_path: Path) -> None:
    done = alignkit("doctor", "--json", cwd=tmp_path)
    assert done.code in (0, 2)  # 2 where disk or memory is short
    facts = json.loads(done.stdout)
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["machine"]["python"] == sys.version.split()[0]
    assert facts["storage"]["hub"] == "offline (HF_HUB_OFFLINE)"
    assert (done.code == 2) == bool(facts["problems"])
    assert facts["warnings"] == []
    words = alignkit("doctor", cwd=tmp_path)
    assert torch.__version__ in words.stdout
    assert words.stdout.splitlines()[-1].startswith("not ready: " if words.code else "ready: no ")


@pytest.mark.parametrize(
    ("free", "version", "code", "said", "verdict"),
    [
        (9e9, "", 0, "", "ready: no problems found"),
        (9e9, "5.19.9", 0, "warning: transformers 5.19.9 is outside", "ready, with 1 warning"),
        (1e9, "", 2, "problem: less than 2 GB of disk is free", "not ready: 1 problem"),
        (1e9, "5.19.9", 2, "warning: transformers 5.19.9", "not ready: 1 problem"),
    ],
    ids=["ready", "warning", "problem", "both"],
)
def test_doctor_ends_with_its_verdict(
    free: float,
    version: str,
    code: int,
    said: str,
    verdict: str,
    alignkit: CommandLine,
    tmp_path: Path,
) -> None:
    before = (
        "import psutil, shutil, types\nfrom importlib import metadata\nreal = metadata.version\n"
        f"shutil.disk_usage = lambda place: types.SimpleNamespace(free={free})\n"
        "psutil.virtual_memory = lambda: types.SimpleNamespace(available=8 * 10**9)\n"
        f"metadata.version = lambda n: {version!r} if n == 'transformers' and {version!r} "
        "else real(n)"
    )
    done = alignkit("doctor", cwd=tmp_path, before=before, COLUMNS="300")
    assert done.code == code, done.stderr
    assert done.stdout.splitlines()[-1] == verdict
    assert done.stderr.startswith(said)
    assert bool(done.stderr) == bool(said)


def test_version(alignkit: CommandLine, tmp_path: Path) -> None:
    done = alignkit("--version", cwd=tmp_path)
    assert (done.code, done.stdout) == (0, f"alignkit {package.__version__}\n")
