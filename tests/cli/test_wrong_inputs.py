"""What a person mistypes: exit code 2, one sentence and a hint, no traceback, nothing written."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest
from commandline import CommandLine, Done
from running import make_labelled, make_pairs, make_recipe, make_rows, write_rows
from tiny import tiny_model

from alignkit.models.adapters.attach import attach_adapter
from alignkit.models.adapters.files import save_adapter
from alignkit.recipe.adapters import LoraSpec


def said(done: Done, *parts: str) -> None:
    """The command failed politely, with all of the parts on stderr."""
    assert done.code == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "error: " in done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path.resolve()


def rows_with(bad: Any, number: int, folder: Path) -> None:
    """Ten good rows, the `number`-th replaced; text is written as it is."""
    lines = [json.dumps(row) for row in make_rows(10)]
    lines[number - 1] = bad if isinstance(bad, str) else json.dumps(bad)
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


NO_ANSWER = {"messages": [{"role": "user", "content": "Hello?"}]}
EMPTY_ANSWER = {
    "messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": " "}]
}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}

ROWS = {
    "broken JSON": ('{"messages": [', 7, ["rows.jsonl:7: is not valid JSON: ", "hint: a .jsonl"]),
    "not an object": ("[1, 2]", 3, ["rows.jsonl:3: a row must be a JSON object, got list"]),
    "no answer": (
        NO_ANSWER,
        4,
        ["rows.jsonl:4: the row has no answer: no assistant turn", "hint: remove the row, or add"],
    ),
    "empty answer": (
        EMPTY_ANSWER,
        5,
        ["rows.jsonl:5: the row has no answer: the assistant's turn 1 is empty"],
    ),
    "unknown role": (
        {"messages": [{"role": "robot", "content": "Hi"}]},
        2,
        ["rows.jsonl:2: messages[0].role is 'robot'", "hint: roles: system"],
    ),
    "preference pair": (PAIR, 1, ["rows.jsonl:1: the row is a preference pair", "hint: keep the"]),
    "unknown columns": (
        {"question": "a", "answer": "b"},
        1,
        ["rows.jsonl:1: no known row format has the keys question, answer", "rename with columns"],
    ),
    "another format": ({"text": "b"}, 6, ["rows.jsonl:6: the row has no `messages`", "hint: its"]),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows(case: str, alignkit: CommandLine, tiny_base: Path, folder: Path) -> None:
    bad, number, parts = ROWS[case]
    rows_with(bad, number, folder)
    recipe = make_recipe(folder, tiny_base)
    for command in ("sft", "plan", "inspect") if case == "broken JSON" else ("sft",):
        said(alignkit(command, recipe, cwd=folder), *parts)
    assert sorted(path.name for path in folder.iterdir()) == ["recipe.yaml", "rows.jsonl"]


PAIRS_ARE = (
    "hint: pairs are prompt, chosen, rejected | conversations, chosen, rejected | chosen, "
    "rejected; rename with columns, as in columns: {chosen: better, rejected: worse}\n"
)
IPO = '{"kind": "ipo", "beta": 0.1}'


def third(rows: list[dict[str, Any]], **values: Any) -> list[dict[str, Any]]:
    """The rows with other values in the third; `...` leaves a key out."""
    changed = {k: v for k, v in {**rows[2], **values}.items() if v is not ...}
    return [*rows[:2], changed, *rows[3:]]


PREFERENCES: dict[str, tuple[tuple[str, ...], list[dict[str, Any]], list[str], str]] = {
    # Case -> stages, rows, overrides, all that stands on stderr.
    "no rejected answer": (
        ("reward", "dpo", "kto"),
        third(make_pairs(6), rejected=...),
        [],
        "error: ROWS:3: the row has no rejected answer: `rejected` is missing\n"
        "hint: every pair needs both answers; the row's keys are prompt, chosen\n",
    ),
    "a rejected answer that is null": (
        ("reward", "dpo", "kto"),
        third(make_pairs(6), rejected=None),
        [],
        "error: ROWS:3: the row has no rejected answer: `rejected` is null\n"
        "hint: every pair needs both answers; the row's keys are prompt, chosen, rejected\n",
    ),
    "a label that is text": (
        ("kto",),
        third(make_labelled(6), label="good"),
        [],
        "error: ROWS:3: label must be true or false, got 'good'\n"
        "hint: true marks a desirable answer, false an undesirable one\n",
    ),
    "a label that is a number": (
        ("kto",),
        third(make_labelled(6), label=1),
        [],
        "error: ROWS:3: label must be true or false, got 1\n"
        "hint: true marks a desirable answer, false an undesirable one\n",
    ),
    "a label that is missing": (
        ("kto",),
        third(make_labelled(6), label=...),
        [],
        "error: ROWS:3: label must be true or false, got None\n"
        "hint: true marks a desirable answer, false an undesirable one\n",
    ),
    "a margin that is text": (
        ("reward", "dpo"),
        third(make_pairs(6), margin="wide"),
        [],
        "error: ROWS:3: margin must be a number, got 'wide'\n"
        "hint: write a finite number, or remove `margin`\n",
    ),
    "beta of IPO": (
        ("dpo",),
        make_pairs(6),
        [f"objective={IPO}"],
        "error: command line: objective.beta is not a key of a recipe\n"
        "hint: it belongs to another kind; keys here: kind, tau, per_token\n",
    ),
    "a reference without use": (
        ("dpo",),
        make_pairs(6),
        ["objective={kind: simpo}", "reference={kind: cached}"],
        "error: command line: reference is not used: `simpo` has no reference model"
        ", got {kind}\n"
        "hint: remove the key, or choose an objective with a reference, such as dpo\n",
    ),
    "no adapter to turn off": (
        ("dpo",),
        make_pairs(6),
        ["adapter={kind: full}", "reference.kind=adapter_off"],
        "error: reference.kind = adapter_off, but there is no adapter: all weights are trained\n"
        "hint: set reference.kind to cached or frozen_copy\n",
    ),
    "conversations where pairs are wanted": (
        ("reward", "dpo"),
        make_rows(6),
        [],
        f"error: ROWS:1: the row is not a preference pair: its keys are messages\n{PAIRS_ARE}",
    ),
    "labelled rows where pairs are wanted": (
        ("reward", "dpo"),
        make_labelled(6),
        [],
        "error: ROWS:1: the row is not a preference pair: its keys are prompt, completion, label\n"
        + PAIRS_ARE,
    ),
    "rows without a label": (
        ("kto",),
        make_rows(6),
        [],
        "error: ROWS:1: the row has no `label`\n"
        "hint: labelled rows are prompt, completion, label (true or false) | messages, label; "
        "pairs (prompt, chosen, rejected) are split; rename with columns\n",
    ),
    "all rows dropped": (
        ("reward", "dpo", "kto"),
        make_pairs(2),
        ["data.max_length=8"],
        "error: ROWS: no row is left to train on: COUNT rows dropped: longer than max_length = 8 "
        "tokens (PLACES)\n"
        "hint: raise data.max_length, or choose another data.too_long\n",
    ),
}


@pytest.mark.parametrize("case", PREFERENCES)
def test_preferences(case: str, alignkit: CommandLine, tiny_base: Path, folder: Path) -> None:
    stages, rows, overrides, stderr = PREFERENCES[case]
    path = write_rows(folder / "rows.jsonl", rows)
    for stage in stages:
        recipe = make_recipe(folder, tiny_base, stage=stage)
        places = [f"{path}:{number}" for number in (1, 2) for _ in range(1 + (stage == "kto"))]
        expected = stderr.replace("PLACES", ", ".join(places[:3])).replace("ROWS", str(path))
        expected = expected.replace("COUNT", str(len(places)))
        for command in (stage, "plan") if case == "no rejected answer" else (stage,):
            done = alignkit(command, recipe, *overrides, cwd=folder)
            assert (done.code, done.stdout, done.stderr) == (2, "", expected)
        assert sorted(path.name for path in folder.iterdir()) == ["recipe.yaml", "rows.jsonl"]


def test_an_empty_file(alignkit: CommandLine, tiny_base: Path, folder: Path) -> None:
    recipe = make_recipe(folder, tiny_base)
    for content in ("", "\n  \n"):
        (folder / "rows.jsonl").write_text(content, encoding="utf-8")
        said(alignkit("sft", recipe, cwd=folder), "rows.jsonl: the file is empty", "hint: every")
    assert not (folder / "run").exists()


RECIPES: dict[str, tuple[list[str], list[str]]] = {
    "misspelt key": (
        ["training.learnin_rate=1e-4"],
        [
            "error: command line: training.learnin_rate is not a key of a recipe",
            "hint: did you mean training.learning_rate?",
        ],
    ),
    "misspelt section": (
        ["trainin.epochs=2"],
        ["error: command line: trainin is not a key of a recipe", "hint: did you mean training?"],
    ),
    "wrong type": (
        ["training.batch_size=many"],
        ["command line: training.batch_size must be a whole number, got 'many'", "hint: examples"],
    ),
    "out of range": (
        ["training.learning_rate=-1"],
        ["training.learning_rate must be greater than 0, got -1", "hint: usual for SFT: 1e-4"],
    ),
    "unknown value": (
        ["training.schedule=cosin"],
        ["training.schedule must be ", "got 'cosin'", "hint: did you mean cosine?"],
    ),
    "missing file": (
        ["data.train=[{path: no.jsonl}]"],
        ["data.train[0].path names no file: 'no.jsonl'", "hint: "],
    ),
    "misspelt file": (
        ["data.train=[{path: row.jsonl}]"],
        ["data.train[0].path names no file: 'row.jsonl'", "hint: did you mean rows.jsonl?"],
    ),
    "wrong stage": (
        ["stage=dpo"],
        ["command line: stage is dpo, not sft", "hint: run `alignkit dpo "],
    ),
    "unknown stage": (
        ["stage=dop"],
        [
            "command line: stage must be 'sft', 'reward', 'dpo', 'kto', 'ppo' or 'grpo', got 'dop'",
            "hint: did you mean dpo?",
        ],
    ),
    "yaml 1.1": (["training.batch_size=010"], ["training.batch_size: '010' starts with a zero"]),
    "infinite": (
        ["training.weight_decay=.inf", "training.epochs=1e400", "data.train.0.weight=.inf"],
        [
            "training.weight_decay must be a finite number",
            "training.epochs must be a finite number",
            "data.train[0].weight must be a finite number",
        ],
    ),
    "a name too long": (
        ["output=" + "x" * 300],
        ["cannot be written: File name too long", "hint: name another place"],
    ),
    "a model name too long": (["model.base=" + "x" * 300], ["is not a model", "hint: "]),
    "rows with a name too long": (["data.train.0.path=" + "x" * 300], ["names no file", "hint:"]),
    "no list item": (["data.train.².take=1"], ["there is no data.train.² to set", "hint: set"]),
    "no override": (
        ["epochs"],
        ["command line: 'epochs' is not an override", "hint: write overrides"],
    ),
    "eval twice": (
        ["data.eval=[{path: rows.jsonl}]", "data.eval_fraction=0.5"],
        ["must have only one of `eval` and `eval_fraction`"],
    ),
    "no model": (
        ["model.base=nothing-here"],
        ["'nothing-here' is not a model", "hint: name a folder"],
    ),
    "known but not fetched": (
        ["model.base=smollm2-135m-instruct"],
        ["smollm2-135m-instruct is not here yet", "hint: run `alignkit fetch smollm2-135m-"],
    ),
    "target that matches nothing": (
        ["adapter.targets=[q_prj]"],
        [
            "error: adapter.targets matches no linear layer: 'q_prj'",
            "hint: did you mean q_proj, v_proj? this model has q_proj, k_proj",
        ],
    ),
    "beyond the context": (
        ["data.max_length=4096"],
        [
            "data.max_length = 4096 is longer than the model's context of 2048 tokens",
            "hint: set data.max_length=2048 or less",
        ],
    ),
    "all rows too long": (
        ["data.max_length=8"],
        [
            "no row is left to train on: 16 rows dropped: longer than max_length = 8 tokens",
            "hint: raise data.max_length, or choose another data.too_long",
        ],
    ),
    "all prompts too long": (
        ["data.max_length=8", "data.too_long=truncate_right"],
        ["no row is left to train on", "the prompt alone fills max_length = 8 tokens", "hint: "],
    ),
    "a row too long": (
        ["data.max_length=100", "data.too_long=error"],
        ["rows.jsonl:2: the row has 1", "tokens, more than data.max_length = 100", "hint: raise"],
    ),
    "unknown template": (
        ["model.chat_template=chatmll"],
        ["model.chat_template names no file and no shipped template: 'chatmll'", "did you mean ch"],
    ),
    "held out everything": (["data.eval_fraction=0.99"], ["holds out all of the 16 rows", "hint"]),
    "weights draw nothing": (
        ["data.train.0.weight=0.001"],
        ["the weights draw no row from 16", "hint: raise the weights"],
    ),
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipes(case: str, alignkit: CommandLine, tiny_base: Path, folder: Path) -> None:
    overrides, parts = RECIPES[case]
    recipe = make_recipe(folder, tiny_base)
    home = {"ALIGNKIT_HOME": str(folder / "home")}
    said(alignkit("sft", recipe, *overrides, cwd=folder, **home), *parts)
    assert not (folder / "run").exists()


def test_every_problem_of_a_recipe_at_once_with_its_line(
    alignkit: CommandLine, tiny_base: Path, folder: Path
) -> None:
    make_recipe(folder, tiny_base)
    (folder / "bad.yaml").write_text(
        "stage: sft\n"
        "output: run\n"
        f"model: {{base: {tiny_base}}}\n"
        "data:\n"
        "  train: [{path: rows.jsonl}]\n"
        "  max_lenght: 64\n"
        "training:\n"
        "  batch_size: 0\n"
        "  epochs: fast\n",
        encoding="utf-8",
    )
    done = alignkit("sft", "bad.yaml", cwd=folder)
    said(
        done,
        "error: bad.yaml:6: data.max_lenght is not a key of a recipe",
        "hint: did you mean data.max_length?",
        "error: bad.yaml:8: training.batch_size must be at least 1, got 0",
        "error: bad.yaml:9: training.epochs must be a number, got 'fast'",
    )
    assert done.stderr.index(":6:") < done.stderr.index(":8:") < done.stderr.index(":9:")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("stage: sft\n  output: x\n", "bad.yaml:2: is not valid YAML"),
        ("", "bad.yaml: must be a mapping of keys to values, got nothing"),
        ("- a\n", "bad.yaml: must be a mapping of keys to values, got a single value or a list"),
        ("stage: sft\nstage: sft\n", "bad.yaml:2: stage is written twice, first on line 1"),
        ("stage: sft\n", "output is required"),
        ("stage: !!int sft\n", "bad.yaml:1: 'sft' is not a value of !!int"),
        ("stage: &a [*a]\n", "bad.yaml:1: is nested more than 40 levels deep"),
    ],
)
def test_recipe_files(text: str, part: str, alignkit: CommandLine, folder: Path) -> None:
    (folder / "bad.yaml").write_text(text, encoding="utf-8")
    said(alignkit("sft", "bad.yaml", cwd=folder), part)


def test_recipes_that_are_not_there(alignkit: CommandLine, folder: Path) -> None:
    done = alignkit("sft", "quickstart/stf.yaml", cwd=folder)
    said(done, "quickstart/stf.yaml: no such recipe", "hint: did you mean quickstart/sft.yaml?")
    said(alignkit("plan", ".", cwd=folder), ".: is a folder, not a recipe", "name the .yaml file")


def test_models_that_are_none(alignkit: CommandLine, tiny_base: Path, folder: Path) -> None:
    recipe = make_recipe(folder, tiny_base)
    (folder / "empty").mkdir()
    done = alignkit("sft", recipe, "model.base=empty", cwd=folder)
    said(done, "empty is not a model folder: it has no config.json", "hint: name the folder with")
    save_adapter(attach_adapter(tiny_model(), LoraSpec(rank=2), 0), folder / "lora", "b")
    done = alignkit("sft", recipe, "model.base=lora", cwd=folder)
    said(
        done,
        "lora is an adapter whose base is missing: 'b' is not a model",
        "hint: merge it with `alignkit merge-lora",
    )
    (folder / "bert").mkdir()
    (folder / "bert/config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    done = alignkit("sft", recipe, "model.base=bert", cwd=folder)
    said(done, "error: ", "bert")
    assert not (folder / "run").exists()


def test_an_output_that_holds_something_else(
    alignkit: CommandLine, tiny_base: Path, folder: Path
) -> None:
    recipe = make_recipe(folder, tiny_base)
    (folder / "run").mkdir()
    (folder / "run" / "thesis.tex").write_text("mine", encoding="utf-8")
    for flags in ([], ["--overwrite"], ["--resume"]):
        done = alignkit("sft", recipe, *flags, cwd=folder)
        said(
            done, "run is not empty and is not a run folder", "hint: choose another folder: output="
        )
        assert [path.name for path in (folder / "run").iterdir()] == ["thesis.tex"]
    (folder / "file").write_text("mine", encoding="utf-8")
    said(alignkit("sft", recipe, "output=file", cwd=folder), "file is a file", "hint: choose")
    assert (folder / "file").read_text(encoding="utf-8") == "mine"


def test_an_output_that_another_process_writes(
    alignkit: CommandLine, tiny_base: Path, folder: Path
) -> None:
    recipe = make_recipe(folder, tiny_base)
    (folder / "run").mkdir()
    with (folder / "run" / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = alignkit("sft", recipe, cwd=folder)
        said(done, "run is in use by another process", "hint: wait for it, or choose another")
        assert [path.name for path in (folder / "run").iterdir()] == [".lock"]
    assert alignkit("sft", recipe, "merge=false", cwd=folder).code == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_that_cannot_be_written(
    alignkit: CommandLine, tiny_base: Path, folder: Path
) -> None:
    recipe = make_recipe(folder, tiny_base)
    (folder / "locked").mkdir(mode=0o500)
    said(alignkit("sft", recipe, "output=locked/run", cwd=folder), "locked/run")


def test_more_processes_than_examples(alignkit: CommandLine, tiny_base: Path, folder: Path) -> None:
    recipe = make_recipe(folder, tiny_base)
    done = alignkit("plan", recipe, "--processes", "5", cwd=folder)
    said(done, "training.batch_size = 4 is less than the 5 processes", "hint: each process needs")


OTHER_COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "generate without a prompt": (["generate", "BASE"], ["there is no prompt", "hint: as in"]),
    "generate from no file": (["generate", "BASE", "-f", "no.txt"], ["no.txt: no such file"]),
    "generate from no model": (
        ["generate", "nothing", "Hi"],
        ["'nothing' is not a model", "hint:"],
    ),
    "generate in no dtype": (
        ["generate", "BASE", "Hi", "--dtype", "int4"],
        ["--dtype cannot be 'int4'", "hint: one of auto, bfloat16, float16, float32"],
    ),
    "generate too cold": (
        ["generate", "BASE", "Hi", "--temperature", "-1"],
        ["temperature cannot be -1", "hint: 0 for the likeliest token"],
    ),
    "generate colder than float32": (
        ["generate", "BASE", "Hi", "--temperature", "1e-300"],
        ["temperature cannot be 1e-300", "hint: 0 for the likeliest token"],
    ),
    "generate nothing": (
        ["generate", "BASE", "Hi", "--max-new-tokens", "0"],
        ["max_new_tokens cannot be 0", "hint: a whole number from 1"],
    ),
    "generate beyond the context": (
        ["generate", "BASE", "Hi", "--max-new-tokens", "4000"],
        ["do not fit the model's context of 2048", "hint: shorten the prompt, or lower"],
    ),
    "merge no adapter": (["merge-lora", "BASE"], ["holds no adapter", "hint: name a run folder"]),
    "eval on nothing": (["eval", "BASE"], ["there are no rows to evaluate on", "hint: name a"]),
    "eval on no file": (["eval", "BASE", "--data", "no.jsonl"], ["no.jsonl: no such file"]),
    "fetch nothing known": (
        ["fetch", "smollm2-135m"],
        [
            "'smollm2-135m' is not a model that alignkit fetches",
            "hint: did you mean smollm2-135m-ins",
        ],
    ),
    "explain no key": (
        ["recipes", "explain", "training.warmupp"],
        ["there is no key 'training.warmupp'", "hint: did you mean training.warmup?"],
    ),
    "explain no stage": (["recipes", "explain", "--stage", "x"], ["there is no stage 'x'"]),
    "copy no recipe": (["recipes", "copy", "quickstart/sfd.yaml"], ["no such recipe", "did you m"]),
    "inspect no held-out rows": (["inspect", "RECIPE", "--eval"], ["holds out no rows", "hint: s"]),
}


@pytest.mark.parametrize("case", OTHER_COMMANDS)
def test_other_commands(case: str, alignkit: CommandLine, tiny_base: Path, folder: Path) -> None:
    arguments, parts = OTHER_COMMANDS[case]
    recipe = make_recipe(folder, tiny_base)
    before = sorted(folder.rglob("*"))
    names = {"BASE": str(tiny_base), "RECIPE": str(recipe)}
    said(alignkit(*[names.get(a, a) for a in arguments], cwd=folder), *parts)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments", [["sfft"], ["sft"], ["sft", "a.yaml", "--proceses", "2"], ["eval"]]
)
def test_the_parser_exits_with_2_as_well(
    arguments: list[str], alignkit: CommandLine, folder: Path
) -> None:
    done = alignkit(*arguments, cwd=folder)
    assert done.code == 2
    assert "Traceback" not in done.stderr


def test_a_bug_exits_with_1_and_its_traceback(
    alignkit: CommandLine, tiny_base: Path, folder: Path
) -> None:
    recipe = make_recipe(folder, tiny_base)
    spoil = """
import alignkit.stages.supervised.stage as run
def broken(recipe, base):
    raise AssertionError("never so")
run.load_rows = broken
"""
    done = alignkit("plan", recipe, cwd=folder, before=spoil)
    assert done.code == 1
    assert "AssertionError: never so" in done.stderr
    assert "error: this is a bug in alignkit" in done.stderr
    assert "hint: please report it with the lines above" in done.stderr


def test_a_source_with_a_bad_row_after_take_is_fine(
    alignkit: CommandLine, tiny_base: Path, folder: Path
) -> None:
    rows_with("{", 7, folder)
    recipe = make_recipe(folder, tiny_base)
    assert alignkit("plan", recipe, "data.train.0.take=6", cwd=folder).code == 0
