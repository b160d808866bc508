"""Recipes of PPO: how rewards are written, found and explained, and every way to get one wrong."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from commandline import CommandLine

from alignkit.cli.training.launch import typed_command
from alignkit.errors import RecipeError
from alignkit.recipe.assets import assets_root
from alignkit.recipe.reading.load import load_recipe
from alignkit.recipe.reading.problems import choice_of, sections_of
from alignkit.recipe.reading.stored import render_recipe, stored_recipe
from alignkit.recipe.rewards import (
    RULES,
    SOURCE_TAGS,
    ExactReward,
    FunctionReward,
    LengthReward,
    ModelReward,
    RegexReward,
    RewardSources,
    UrlReward,
    reward_name,
)
from alignkit.recipe.stages.ppo import PpoRecipe, PpoSpec

GOOD = """\
stage: ppo
output: runs/x
model: {base: some/model}
data: {train: [{path: rows.jsonl}]}
reward: {rule: exact}
"""
SOURCE_HINT = (
    "\nhint: as in {model: runs/reward}, {function: rewards.py:score}, {rule: exact}, {url: …} or "
    "{judge: …, model: …, rubric: …}; several are a list of these, each with a weight"
)
RULE_NAMES = (
    "'exact', 'numeric', 'regex', 'format', 'length', 'json', 'sentiment', 'math', 'code' or "
    "'json_schema'"
)
LENGTH_HINT = "\nhint: longest length that scores 1, as in {rule: length, max: 50}"
PATTERN_HINT = (
    "\nhint: a Python regular expression; a backslash before . ( ) [ ] { } + * ? matches the "
    "character itself"
)
LOOKED = "\nhint: looked in the recipe's folder, the working folder and the shipped examples"


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8")


def write(text: str, name: str = "r.yaml") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    return name


def loaded(reward: str = "{rule: exact}", *more: str) -> PpoRecipe:
    text = GOOD.replace("{rule: exact}", reward) + "".join(f"{line}\n" for line in more)
    recipe = load_recipe(write(text)).recipe
    assert isinstance(recipe, PpoRecipe)
    return recipe


def failure(reward: str = "{rule: exact}", *more: str) -> str:
    with pytest.raises(RecipeError) as caught:
        loaded(reward, *more)
    return str(caught.value)


# how rewards are written ----------------------------------------------------------------------


def test_one_reward_or_several() -> None:
    assert loaded().reward == (ExactReward(rule="exact"),)
    assert loaded("[{rule: exact}]").reward == (ExactReward(rule="exact"),)
    several = loaded(
        "[{rule: exact, weight: -2}, {url: 'http://localhost:8000/a'}, {rule: regex, pattern: a.b}]"
    ).reward
    assert several == (
        ExactReward(rule="exact", weight=-2),
        UrlReward(url="http://localhost:8000/a"),
        RegexReward(rule="regex", pattern="a.b"),
    )
    assert [reward_name(source) for source in several] == ["exact", "url", "regex"]
    assert reward_name(ModelReward(model="runs/r")) == "model"
    assert reward_name(FunctionReward(function="a/b.py:polite")) == "polite"


def test_a_run_keeps_its_rewards() -> None:
    Path("mine.py").touch()
    recipe = loaded("[{rule: json, keys: [a, b]}, {function: mine.py:score}, {model: some/reward}]")
    rendered = render_recipe(recipe)
    assert yaml.safe_load(rendered)["reward"] == [
        {"rule": "json", "keys": ["a", "b"], "weight": 1.0, "name": None},
        {
            "function": f"{Path('mine.py').resolve()}:score",
            "messages": False,
            "weight": 1.0,
            "name": None,
            "timeout": 600.0,
            "on_failure": "stop",
        },
        {
            "model": "some/reward",
            "weight": 1.0,
            "name": None,
            "normalize": True,
            "separate": False,
        },
    ]
    assert stored_recipe(Path(write(rendered, "recipe.yaml"))) == recipe


def test_a_run_keeps_no_query_of_an_address_and_is_resumed_without_it() -> None:
    recipe = loaded("{url: 'https://host:1/score?key=secret#part'}")
    rendered = render_recipe(recipe)
    assert yaml.safe_load(rendered)["reward"][0]["url"] == "https://host:1/score?…"
    other = loaded("{url: 'https://host:1/score?key=another'}")
    stored = stored_recipe(Path(write(rendered, "recipe.yaml")))
    assert stored.as_dict() == recipe.as_dict() == other.as_dict()
    assert recipe.reward_sources[0].url.endswith("?key=secret#part")  # type: ignore[union-attr]


SECRETS = {
    "reward.url=http://h/p?key=a&b=c": "reward.url=http://h/p?…",
    "reward={url: 'https://me:pw@h:1/p#x'}": "reward={url: 'https://…@h:1/p?…",
    "reward.url=http://a:b/c@h/d?e": "reward.url=http://…@h/d?…",
    "training.max_steps=3": "training.max_steps=3",
}


@pytest.mark.parametrize("typed", SECRETS)
def test_the_command_is_kept_without_secrets(typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/bin/alignkit", "ppo", "r.yaml", typed])
    assert shlex.split(typed_command()) == ["alignkit", "ppo", "r.yaml", SECRETS[typed]]


def test_an_override_changes_one_reward() -> None:
    write(GOOD)
    one = load_recipe("r.yaml", ["reward.column=gold"]).recipe
    assert one.reward[0].column == "gold"  # type: ignore[union-attr]
    write(GOOD.replace("{rule: exact}", "[{rule: exact}, {rule: length, max: 9}]"))
    two = load_recipe("r.yaml", ["reward.1.max=5"]).recipe
    assert two.reward[1] == LengthReward(rule="length", max=5)  # type: ignore[union-attr]


def test_the_tags_belong_to_the_sections_of_the_union() -> None:
    assert set(sections_of(RewardSources)) == set(SOURCE_TAGS)
    later = ("sentiment", "math", "code", "json_schema")
    assert ("exact", "numeric", "regex", "format", "length", "json", *later) == RULES
    for section, tag in SOURCE_TAGS.items():
        choice = choice_of(section)
        assert choice is not None
        assert tag == f"reward:{choice[1]}"
    assert choice_of(ExactReward) == ("rule", "exact")
    assert choice_of(ModelReward) == ("model", "model")
    assert choice_of(PpoSpec) == ("kind", "ppo")


# where files are looked for -------------------------------------------------------------------


def test_a_function_is_found_like_other_files() -> None:
    def found(name: str) -> str:
        recipe = load_recipe(name).recipe
        return recipe.reward[0].function  # type: ignore[union-attr]

    text = GOOD.replace("{rule: exact}", "[{function: mine.py:score}]")
    write("", "mine.py")
    write("", "sub/mine.py")
    write(text, "sub/r.yaml")
    assert found("sub/r.yaml") == f"{Path('sub/mine.py').resolve()}:score"
    Path("sub/mine.py").unlink()
    assert found("sub/r.yaml") == f"{Path('mine.py').resolve()}:score"
    shipped = "data_templates/rewards/length_and_tone.py"
    write(GOOD.replace("{rule: exact}", f"{{function: {shipped}:score}}"))
    assert found("r.yaml") == f"{(assets_root() / shipped).resolve()}:score"


def test_a_reward_model_that_is_a_folder_is_found_and_another_name_stays() -> None:
    Path("runs/reward").mkdir(parents=True)
    folder, name = loaded("[{model: runs/reward}, {model: runs/later}]").reward
    assert (folder.model, name.model) == (  # type: ignore[union-attr]
        str(Path("runs/reward").resolve()),
        "runs/later",
    )


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            "{function: rewars.py:score}",
            "r.yaml:5: reward.function names no file: 'rewars.py'\n"
            "hint: did you mean rewards.py:score?",
        ),
        (
            "\n  - {rule: exact}\n  - weight: 2\n    function: far/away.py:score",
            f"r.yaml:8: reward[1].function names no file: 'far/away.py'{LOOKED}",
        ),
        (
            "{function: folder.py:score}",
            f"r.yaml:5: reward.function names no file: 'folder.py'{LOOKED}",
        ),
    ],
)
def test_a_function_whose_file_is_missing(reward: str, message: str) -> None:
    Path("rewards.py").touch()
    Path("folder.py").mkdir()
    assert failure(reward) == message


# what is wrong --------------------------------------------------------------------------------

REWARDS = {
    # The value of reward -> what is said of it, behind `r.yaml:5: reward`.
    # no source, or two
    "{weight: 2}": (
        " must be a mapping with one of model, function, url, judge or rule, got {weight}"
        + SOURCE_HINT
    ),
    "{modle: runs/r}": (
        " must be a mapping with one of model, function, url, judge or rule, got {modle}\n"
        "hint: did you mean model instead of modle?"
    ),
    "[{rule: exact}, {functon: a.py:b}]": (
        "[1] must be a mapping with one of model, function, url, judge or rule, got {functon}\n"
        "hint: did you mean function instead of functon?"
    ),
    "{model: runs/r, rule: exact}": (
        " must be a mapping with one of model, function, url, judge or rule, got {model, rule}\n"
        "hint: a source has exactly one of these keys; write several sources as a list"
    ),
    "[exact]": (
        "[0] must be a mapping with one of model, function, url, judge or rule, got 'exact'"
        + SOURCE_HINT
    ),
    "runs/r": f" must be a mapping or a list of mappings, got 'runs/r'{SOURCE_HINT}",
    "null": f" must be a mapping or a list of mappings, got null{SOURCE_HINT}",
    "[]": f" must not be empty, got []{SOURCE_HINT}",
    # rules
    "{rule: exat}": f".rule must be {RULE_NAMES}, got 'exat'\nhint: did you mean exact?",
    "{rule: 3}": f".rule must be {RULE_NAMES}, got 3",
    "{rule: null}": f".rule must be {RULE_NAMES}, got null",
    "[{rule: model}]": f"[0].rule must be {RULE_NAMES}, got 'model'\nhint: did you mean code?",
    # keys
    "{model: runs/r, normalise: true}": (
        ".normalise is not a key of a recipe\nhint: did you mean reward.normalize?"
    ),
    "[{rule: exact}, {rule: numeric, colum: a}]": (
        "[1].colum is not a key of a recipe\nhint: did you mean reward[1].column?"
    ),
    "{rule: exact, pattern: a}": (
        ".pattern is not a key of a recipe\n"
        "hint: it belongs to another reward; keys here: rule, column, ignore_case, weight, name"
    ),
    "{rule: json, zzz: a}": (
        ".zzz is not a key of a recipe\nhint: keys here: rule, keys, weight, name"
    ),
    "{rule: regex}": f".pattern is required and missing{PATTERN_HINT}",
    "[{rule: length}]": f"[0].max is required and missing{LENGTH_HINT}",
    # values
    "{rule: regex, pattern: '(a'}": (
        ".pattern is not a regular expression (missing ), unterminated subpattern at "
        "position 0), got "
        f"'(a'{PATTERN_HINT}"
    ),
    "[{rule: format, pattern: '*'}]": (
        "[0].pattern is not a regular expression (nothing to repeat at position 0), got "
        f"'*'{PATTERN_HINT}"
    ),
    "{rule: regex, pattern: 'a{99999999999}'}": (
        ".pattern is not a regular expression (the repetition number is too large), got "
        f"'a{{99999999999}}'{PATTERN_HINT}"
    ),
    "{rule: regex, pattern: ''}": f".pattern must not be empty text, got ''{PATTERN_HINT}",
    "{rule: regex, pattern: 3}": f".pattern must be text, got 3{PATTERN_HINT}",
    "{rule: exact, column: 3}": ".column must be text, got 3",
    "{rule: numeric, column: ''}": ".column must not be empty text, got ''",
    "{rule: numeric, tolerance: -1}": (
        ".tolerance must be at least 0, got -1\n"
        "hint: relative to the correct number: 0.01 accepts an error of 1%"
    ),
    "{rule: length, max: 0}": f".max must be at least 1, got 0{LENGTH_HINT}",
    "{rule: length, min: -1, max: 3}": ".min must be at least 0, got -1",
    "{rule: length, min: 5, max: 3}": f".max must be at least min = 5, got 3{LENGTH_HINT}",
    "{rule: length, max: 1.5}": f".max must be a whole number, got 1.5{LENGTH_HINT}",
    "{rule: length, max: 5, unit: word}": (
        ".unit must be 'words' or 'characters', got 'word'\nhint: did you mean words?"
    ),
    "{rule: json, keys: a}": ".keys must be a list, got 'a'",
    "{rule: json, keys: [a, 3]}": ".keys[1] must be text, got 3",
    "{rule: exact, weight: much}": (
        ".weight must be a number, got 'much'\n"
        "hint: 1 is usual; a negative one turns a reward into a penalty"
    ),
    "{rule: exact, weight: .inf}": (
        ".weight must be a finite number, got inf\n"
        "hint: 1 is usual; a negative one turns a reward into a penalty"
    ),
    "{model: ''}": ".model must not be empty text, got ''",
    "{url: 'http://localhost', timeout: 0}": (
        ".timeout must be greater than 0, got 0\nhint: seconds; 60 is usual"
    ),
}
for _function in ("rewards.py", "rewards:score", "rewards.py:", "rewards.py:2nd", ":score"):
    REWARDS[f"{{function: '{_function}'}}"] = (
        ".function must name a Python file and a function in it, as in rewards.py:score, got "
        f"'{_function}'"
    )
for _url in ("localhost:8000", "ftp://host/a", "http://", "http://host:port/", "http://a b/"):
    REWARDS[f"{{url: '{_url}'}}"] = (
        f".url must be an address, as in http://localhost:8000/score, got '{_url}'"
    )
REWARDS["{url: 'http://me:pass@host/a'}"] = (
    ".url must not hold a user name or password, got 'http://…@host/a'"
)


@pytest.mark.parametrize("reward", REWARDS)
def test_a_wrong_reward(reward: str) -> None:
    assert failure(reward) == f"r.yaml:5: reward{REWARDS[reward]}"


def test_two_wrong_rewards_are_said_at_once_with_their_lines() -> None:
    assert failure("\n  - rule: exat\n  - rule: length\n    max: -1").splitlines() == [
        f"r.yaml:6: reward[0].rule must be {RULE_NAMES}, got 'exat'",
        "hint: did you mean exact?",
        "r.yaml:8: reward[1].max must be at least 1, got -1",
        LENGTH_HINT.strip(),
    ]


def test_no_reward() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(GOOD.replace("reward: {rule: exact}\n", "")))
    assert str(caught.value) == f"r.yaml: reward is required and missing{SOURCE_HINT}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "training: {batch_size: 8}",
            "training.batch_size is not a key of a recipe\n"
            "hint: did you mean rollout.prompts_per_step?",
        ),
        (
            "batch_size: 8",
            "batch_size is not a key of a recipe\nhint: did you mean rollout.prompts_per_step?",
        ),
        (
            "objective: {beta: 0.1}",
            "objective.beta is not a key of a recipe\nhint: did you mean objective.kl_coef?",
        ),
        (
            "objective: {kl_coeff: 0.1}",
            "objective.kl_coeff is not a key of a recipe\nhint: did you mean objective.kl_coef?",
        ),
        (
            "reference: {kind: auto}",
            "reference is not a key of a recipe\nhint: the reference is the model that "
            "training starts from; remove the key",
        ),
        (
            "temperature: 0.7",
            "temperature is not a key of a recipe\nhint: did you mean rollout.temperature?",
        ),
        (
            "column: gold",  # of two rules, and named once
            "column is not a key of a recipe\nhint: did you mean reward.column or task.column?",
        ),
        (
            "adapter: {dropout: 0.1}",
            "adapter has dropout = 0.1: the policy that samples and the policy that is trained "
            "would differ; ppo needs 0, got {dropout, kind}\nhint: as in {kind: lora, rank: 16}",
        ),
        (
            "objective: {kind: dpo}",
            "objective.kind must be 'ppo', got 'dpo'\nhint: did you mean ppo?",
        ),
        (
            "objective: {clip: 1}",
            "objective.clip must be less than 1, got 1\nhint: 0.2 is the value of the PPO paper",
        ),
        (
            "rollout: {temperature: 0}",
            "rollout.temperature must be at least 0.0001, got 0\n"
            "hint: 1 is usual and samples from the unchanged policy",
        ),
        (
            "rollout: 3",
            "rollout must be a mapping of keys to values, got 3\n"
            "hint: as in {prompts_per_step: 32, max_new_tokens: 64}",
        ),
        (
            "value: adapter",
            "value must be a mapping of keys to values, got 'adapter'\n"
            "hint: as in {kind: adapter, init: reward}",
        ),
        (
            "value: {kind: adaptor}",
            "value.kind must be 'auto', 'adapter' or 'head', got 'adaptor'\n"
            "hint: did you mean adapter?",
        ),
        (
            "value: {init: model}",
            "value.init must be 'auto', 'reward' or 'fresh', got 'model'",
        ),
        (
            "guard: {action: halt}",
            "guard.action must be 'stop' or 'raise_kl', got 'halt'",
        ),
        (
            "guard: {max_kl: 0}",
            "guard.max_kl must be greater than 0, got 0\n"
            "hint: in nats per response; null only reports",
        ),
    ],
)
def test_other_keys(line: str, message: str) -> None:
    assert failure("{rule: exact}", line) == f"r.yaml:6: {message}"


def test_a_reward_in_another_stage() -> None:
    text = GOOD.replace("stage: ppo", "stage: sft")
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(text))
    assert str(caught.value) == (
        "r.yaml:5: reward is not a key of a recipe\n"
        "hint: keys here: stage, output, seed, model, adapter, data, objective, training, merge"
    )


# what is explained ----------------------------------------------------------------------------


def explained(alignkit: CommandLine, folder: Path, *arguments: str) -> list[str]:
    done = alignkit("recipes", "explain", *arguments, cwd=folder)
    assert done.code == 0, done.stderr
    return [line for line in done.stdout.splitlines() if not line.startswith("    ")]


def test_keys_of_ppo_are_explained(alignkit: CommandLine, tmp_path: Path) -> None:
    reward = explained(alignkit, tmp_path, "reward")
    assert reward[:3] == [
        "reward  list of sections  required",
        "reward[model]  by model",
        "reward[model].model  text  required",
    ]
    heads = [line for line in reward if re.fullmatch(r"reward\[\w+\]  .*", line)]
    assert heads == [
        *(f"reward[{name}]  by {name}" for name in ("model", "function", "url", "judge")),
        *(f"reward[{name}]  rule: {name}" for name in RULES),
    ]
    assert "reward[length].max  whole number  required" in reward
    weights = explained(alignkit, tmp_path, "reward.weight")
    assert weights == [
        f"reward[{tag.removeprefix('reward:')}].weight  number  default 1.0"
        for tag in SOURCE_TAGS.values()
    ]
    assert explained(alignkit, tmp_path, "reward[regex]") == [
        "reward[regex]  rule: regex",
        "reward[regex].rule  regex  required",
        "reward[regex].pattern  text  required",
        "reward[regex].weight  number  default 1.0",
        "reward[regex].name  text | null  default null",
        "reward[regex].timeout  number  default 60.0",
    ]
    for key, line in {
        "rollout.temperature": "rollout.temperature  number  default 1.0",
        "objective.kl_target": "objective.kl_target  number | null  default null",
    }.items():
        assert explained(alignkit, tmp_path, key) == [line]
        assert explained(alignkit, tmp_path, key, "--stage", "ppo") == [line]


def test_a_stage_that_is_named_is_kept(alignkit: CommandLine, tmp_path: Path) -> None:
    done = alignkit("recipes", "explain", "rollout.temperature", "--stage", "sft", cwd=tmp_path)
    assert done.code == 2
    assert "there is no key 'rollout.temperature'" in done.stderr
    # a key of several stages is explained as the first of them has it
    assert explained(alignkit, tmp_path, "objective.kind") == [
        "objective.kind  cross_entropy | custom  default cross_entropy"
    ]


def test_the_json_schema_takes_one_reward_or_several(alignkit: CommandLine, tmp_path: Path) -> None:
    done = alignkit("recipes", "schema", "--stage", "ppo", cwd=tmp_path)
    schema = json.loads(done.stdout)
    one, several = schema["properties"]["reward"]["oneOf"]
    assert several["type"] == "array"
    assert several["minItems"] == 1
    names = {part["$ref"].rsplit("/", 1)[-1] for part in one["oneOf"]}
    assert names == {section.__name__ for section in SOURCE_TAGS}
    assert several["items"]["oneOf"] == one["oneOf"]
    required: dict[str, Any] = {name: schema["$defs"][name].get("required") for name in names}
    assert required["ModelReward"] == ["model"]
    assert required["LengthReward"] == ["rule", "max"]
