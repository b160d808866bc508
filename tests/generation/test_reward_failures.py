"""Functions as TRL has them, and calls that fail: what they cost, and what is said of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from alignkit.errors import RewardError
from alignkit.generation.rewards import failures
from alignkit.generation.rewards.build import build_score
from alignkit.generation.rewards.failures import Unanswered, tolerant
from alignkit.generation.rewards.responses import Response, Scores
from alignkit.recipe.rewards import FunctionReward

CHAT = [{"role": "user", "content": "Two?"}]


def responses(*texts: str, prompt: Any = "One?") -> list[Response]:
    return [
        Response(prompt, text, {"prompt": prompt, "answer": "1"}, f"rows.jsonl:{number + 1}", [7])
        for number, text in enumerate(texts)
    ]


@pytest.fixture
def score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def build(code: str, **fields: Any) -> Any:
        (tmp_path / "mine.py").write_text(code, encoding="utf-8")
        return build_score(FunctionReward(function=f"{tmp_path}/mine.py:score", **fields))

    return build


# as TRL has them ------------------------------------------------------------------------------


def test_a_function_of_trl_runs_unchanged(score: Any) -> None:
    code = (
        "def score(completions, answer, **kwargs):\n"
        "    contents = [completion[0]['content'] for completion in completions]\n"
        "    return [1.0 if content == gold else 0.0 for content, gold in zip(contents, answer)]\n"
    )
    rows = responses("1", "2", prompt=CHAT)
    assert score(code, messages=True)(rows).values == [1.0, 0.0]
    with pytest.raises(RewardError) as caught:
        score(code)(rows)
    assert caught.value.hint.endswith(
        "reward.messages: true gives completions as messages, as TRL does"
    )
    # a row of plain text stays text, there and here
    text = "def score(completions, completion_ids, **kwargs):\n"
    text += "    return [len(c) + 10 * i[0] for c, i in zip(completions, completion_ids)]\n"
    assert score(text, messages=True)(responses("abc")).values == [73.0]


def test_the_functions_that_trl_ships(score: Any) -> None:
    pytest.importorskip("trl")
    rows = [
        Response(CHAT, text, {"prompt": CHAT, "solution": gold}, "rows.jsonl:1", ids)
        for text, gold, ids in (
            (r"It is $\boxed{\frac{2}{4}}$.", r"$\frac{1}{2}$", range(5)),
            ("<think>\nhm\n</think>\n$\\boxed{3}$", "$4$", range(20)),
            (r"$\boxed{3}$", "", range(2)),
        )
    ]
    right = score("from trl.rewards import accuracy_reward as score\n", messages=True)(rows)
    assert right.values[:2] == [1.0, 0.0]
    assert math.isnan(right.values[2])  # its solution cannot be read
    assert right.notes[0].keys() == {"solution", "gold_parsed", "answer_parsed"}
    thought = score("from trl.rewards import think_format_reward as score\n", messages=True)
    assert thought(rows).values == [0.0, 1.0, 0.0]
    code = "from trl.rewards import get_soft_overlong_punishment\n"
    code += "score = get_soft_overlong_punishment(max_completion_len=20, soft_punish_cache=10)\n"
    assert score(code, messages=True)(rows).values == [0.0, -1.0, 0.0]


def test_an_async_function_that_does_not_always_apply(score: Any) -> None:
    code = (
        "import asyncio\n"
        "async def score(prompts, completions, **kwargs):\n"
        "    await asyncio.sleep(0.01)\n"
        "    return [None if c == 'x' else float(len(c)) for c in completions]\n"
    )
    values = score(code)(responses("ab", "x", "abc")).values
    assert values[::2] == [2.0, 3.0]
    assert math.isnan(values[1])


def test_what_a_function_logs(score: Any) -> None:
    code = (
        "def score(completions, log_metric, log_extra=None, **kwargs):\n"
        "    assert 'log_metric' not in kwargs\n"
        "    log_metric('longest', max(map(len, completions)))\n"
        "    log_extra('size', [len(c) for c in completions])\n"
        "    return [0.0, 1.0]\n"
    )
    found = score(code)(responses("ab", "abc"))
    assert found.metrics == {"longest": 3.0}
    with pytest.raises(RewardError, match="log_extra got 1 values for 2 completions"):
        score(code.replace("[len(c) for c in completions]", "[1]"))(responses("ab", "abc"))
    assert found.notes == {0: {"size": 2}, 1: {"size": 3}}


def test_a_client_is_kept_from_call_to_call(score: Any) -> None:
    code = (
        "import asyncio\n"
        "LOOPS = set()\n"
        "async def score(completions, **kwargs):\n"
        "    LOOPS.add(asyncio.get_running_loop())\n"
        "    return [float(len(LOOPS))]\n"
    )
    run = score(code)
    assert [run(responses("a")).values for _ in range(2)] == [[1.0]] * 2


def test_a_file_that_changes_while_its_process_is_gone(score: Any, tmp_path: Path) -> None:
    code = "import os\ndef score(completions, **kwargs):\n"
    code += "    return os._exit(3) if completions[0] == 'bad' else [1.0]\n"
    run = score(code, on_failure="skip")
    run(responses("bad"))
    (tmp_path / "mine.py").write_text("def score(completions):\n    return [2.0]\n")
    (failure,) = run(responses("good")).failures
    assert "the file has changed since the run began" in failure.reason


# what a failure costs -------------------------------------------------------------------------

FAILS = {
    "raises": "    if 'bad' in completions:\n        raise ValueError('no')\n",
    "exits": "    if 'bad' in completions:\n        os._exit(3)\n",
    "hangs": "    if 'bad' in completions:\n        time.sleep(60)\n",
    "gives NaN": "    return [float('nan') if c == 'bad' else 1.0 for c in completions]\n",
    "gives too few": "    return [1.0 for c in completions if c != 'bad']\n",
    "is ended by its fork": "    if 'bad' in completions and os.fork() == 0:\n"
    "        os.kill(os.getppid(), 9)\n        os._exit(0)\n"
    "    time.sleep(0.3 * ('bad' in completions))\n",
}


@pytest.mark.parametrize("how", FAILS)
def test_a_failure_costs_its_response(how: str, score: Any) -> None:
    code = "import os, time\ndef score(completions, **kwargs):\n"
    code += FAILS[how] + "    return [1.0] * len(completions)\n"
    rows = responses("a", "b", "c", "bad", "d")
    timeout = 1.0 if how == "hangs" else 60.0
    score("def score(completions, **kwargs):\n    return [1.0]\n")(rows[:1])  # the process is there
    skipped = score(code, on_failure="skip", timeout=timeout)(rows)
    assert [math.isnan(value) for value in skipped.values] == [False] * 3 + [True, False]
    (failure,) = skipped.failures
    assert failure.place == "rows.jsonl:4"
    assert skipped.notes == {3: {"failed": failure.reason}}
    if how != "hangs":
        zero = score(code, on_failure="zero", timeout=timeout)(rows)
        assert zero.values == [1.0, 1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("how", ["exits", "hangs"])
def test_a_run_that_ends_names_the_row(how: str, score: Any) -> None:
    code = "import os, time\ndef score(completions, **kwargs):\n"
    code += FAILS[how] + "    return [1.0] * len(completions)\n"
    run = score(code, timeout=1.0 if how == "hangs" else 60.0)
    with pytest.raises(RewardError, match=r"; the response is to rows\.jsonl:4"):
        run(responses("a", "b", "c", "bad", "d"))


def searched(monkeypatch: pytest.MonkeyPatch, price: float) -> tuple[list[Any], Scores]:
    """The calls for 128 responses, every other one bad, each of which takes so many seconds."""
    clock, seen = [0.0], list[Any]()
    monkeypatch.setattr(failures.time, "monotonic", lambda: clock[0])

    def call(rows: Any, seconds: float) -> Scores:
        seen.append((len(rows), seconds))
        clock[0] += price
        if any(row.text == "bad" for row in rows):
            raise Unanswered("late")
        return Scores([1.0] * len(rows))

    rows = responses(*(["bad", "good"] * 64))
    return seen, tolerant(call, timeout=80.0, on_failure="zero")(rows)


def test_the_search_finds_every_good_response(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, found = searched(monkeypatch, 0.1)
    assert found.values == [0.0, 1.0] * 64
    assert len(found.failures) == 64
    assert seen[:3] == [(128, 80.0), (64, 40.0), (32, 20.0)]
    assert min(seconds for _, seconds in seen) == 5.0


def test_the_search_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, found = searched(monkeypatch, 30.0)
    assert len(seen) < 30
    assert 64 < len(found.failures) < 128
    assert found.failures[-1].reason == ("late; not asked alone: the search took 320 seconds")


def test_a_worker_may_take_half_of_the_memory(score: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignkit.runtime.worker._SHARE", 1e-3)
    code = "import time\ndef score(completions, **kwargs):\n    time.sleep(5)\n    return [1.0]\n"
    with pytest.raises(RewardError, match=r"took more than .* GB, half of the machine's memory"):
        score(code)(responses("a"))
