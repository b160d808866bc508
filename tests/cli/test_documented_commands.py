"""Commands in the README.md files and docs/: the program understands each; the quick ones run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from commandline import CommandLine

from alignkit.cli.commands import COMMANDS, STAGES, load_command
from alignkit.cli.main import app
from alignkit.recipe.reading.load import load_recipe, shipped_pipelines, shipped_recipes

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
TEMPLATES = ROOT / "data_templates" / "README.md"
DOCUMENTS = [README, TEMPLATES, *sorted((ROOT / "docs").glob("*.md"))]


def commands_of(document: Path) -> list[list[str]]:
    """Arguments of each `alignkit` line in the fenced blocks that are written by hand."""
    text = re.sub(
        r"<!-- commands: start -->.*", "", document.read_text(encoding="utf-8"), flags=re.S
    )
    found = []
    for block in text.replace("\\\n", "").split("```")[1::2]:
        for line in block.split("\n"):
            words = (
                shlex.split(line.removeprefix("$ "), comments=True) if "alignkit" in line else []
            )
            parts = " ".join(map(shlex.quote, words)).split(" '&&' ")
            found += [shlex.split(part)[1:] for part in parts if part.startswith("alignkit ")]
    return found


WRITTEN = {shlex.join(one): one for document in DOCUMENTS for one in commands_of(document)}
"""Every command once."""


def parse(arguments: list[str]) -> Any:
    """The context of the command, as typer reads the arguments; nothing is called."""
    group, name, rest, context = typer.main.get_command(app), "alignkit", arguments, None
    while True:
        context = group.make_context(name, list(rest), parent=context)
        if not hasattr(group, "commands"):
            return context
        name, group, rest = group.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        assert group is not None, f"there is no command {name}"


@pytest.mark.parametrize("command", WRITTEN)
def test_a_command_is_understood(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = WRITTEN[command]
    read = parse(arguments).params
    name, overrides = read.get("recipe") or "", list(read.get("overrides") or ())
    if "/" not in name:
        return
    assert name in shipped_recipes(), f"no shipped recipe is called {name}"
    monkeypatch.chdir(tmp_path)
    for path in re.findall(r"=(\w[\w.-]*\.jsonl?)", " ".join(overrides)):
        Path(path).touch()  # rows of the reader's
    stage = arguments[0] if arguments[0] in STAGES else None
    load_recipe(name, overrides, stage=stage)  # its keys and their values


def test_pipelines_that_are_named_are_shipped() -> None:
    named = [words[1] for words in WRITTEN.values() if words[0] == "run" and "/" in words[1]]
    assert named
    assert set(named) <= set(shipped_pipelines())


def test_the_reader_is_not_fooled(tmp_path: Path) -> None:
    block = "```\nalignkit fetch a && alignkit sft b.yaml  # c\n$ alignkit chat d 'e f'\nls\n```\n"
    document = tmp_path / "a.md"
    document.write_text(f"`alignkit plan`\n{block}", encoding="utf-8")
    assert commands_of(document) == [["fetch", "a"], ["sft", "b.yaml"], ["chat", "d", "e f"]]
    with pytest.raises(Exception, match="No such option"):
        parse(["sft", "a.yaml", "--resumee"])
    with pytest.raises(Exception, match="bits"):
        parse(["export", "bnb", "runs/mine"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_command_in_a_sentence_has_the_options_it_names(document: Path) -> None:
    for span in re.findall(r"`alignkit ([a-z][^`]*)`", document.read_text(encoding="utf-8")):
        first, *rest = span.replace("…", " ").split()
        assert first in {*STAGES, *COMMANDS}, span
        command = load_command(first)
        inner = getattr(command, "commands", {})
        known = {o for one in (command, *inner.values()) for p in one.params for o in p.opts}
        assert {word for word in rest if word.startswith("--")} <= known, span
        if inner and rest:
            assert rest[0] in inner, span


def test_recipes_are_listed_and_explained(alignkit: CommandLine, tmp_path: Path) -> None:
    written = [words for words in WRITTEN.values() if words[0] == "recipes"]
    asked = [words for words in written if words[1] not in ("copy", "import")]
    assert len(asked) > 2
    for words in asked:
        done = alignkit(*words, cwd=tmp_path)
        assert done.code == 0, (words, done.stderr)
        assert done.stdout


FEW = ["training.max_steps=2", "data.train.0.take=8", "data.eval.0.take=4", "model.dtype=float32"]
QUICKLY = {
    "sft": FEW,
    "dpo": FEW,
    "run": [f"{stage}.{value}" for stage in ("sft", "reward", "ppo") for value in FEW],
}
"""Command -> what makes it quick."""
QUICKLY["run"] += ["ppo.rollout.prompts_per_step=4", "ppo.rollout.max_new_tokens=8"]


@pytest.mark.slow
def test_the_readme_can_be_followed(alignkit: CommandLine, tiny_base: Path, tmp_path: Path) -> None:
    """Its commands, one after another, over a tiny model under the real one's name."""
    home = tmp_path / "home"
    shutil.copytree(tiny_base, home / "models" / "smollm2-135m-instruct")
    commands = commands_of(README)
    assert {words[0] for words in commands} == {
        *("fetch", "sft", "dpo", "recipes", "plan", "data", "inspect", "run")
    }
    for words in commands:
        more = QUICKLY.get(words[0], [])
        done = alignkit(*words, *more, cwd=tmp_path, ALIGNKIT_HOME=str(home))
        assert done.code == 0, (words, done.stderr)
    for name in ("quickstart-sft", "quickstart-dpo"):
        assert (tmp_path / "runs" / name / "merged" / "config.json").is_file()
        recipe = f"{name.replace('-', '/')}.yaml"
        done = alignkit("plan", recipe, "--json", cwd=tmp_path, ALIGNKIT_HOME=str(home))
        plan, shown = json.loads(done.stdout), README.read_text(encoding="utf-8")
        rows = plan["data"]["rows"]
        assert f"train: {rows} of {rows} rows used" in shown
        assert f"held out, after step {plan['steps']}: " in shown
        assert f"next: alignkit chat runs/{name}" in shown
