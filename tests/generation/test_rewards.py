"""Functions and servers as rewards: what they get, what they may give, and every fault by name."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.errors import RewardError
from alignkit.generation.rewards import asking
from alignkit.generation.rewards import function as reward_function
from alignkit.generation.rewards.build import build_score
from alignkit.generation.rewards.responses import Response, checked
from alignkit.recipe.assets import assets_root
from alignkit.recipe.rewards import FunctionReward, UrlReward
from alignkit.runtime.worker import Worker

TURNS = [{"role": "user", "content": "Two?"}]
RESPONSES = [
    Response("One?", "1", {"prompt": "One?", "answer": "1", "level": 3}, "rows.jsonl:1", [7, 8]),
    Response(TURNS, "22", {"level": 4, "answer": "2", "topic": "sums"}, "rows.jsonl:2"),
]


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(asking, "_PAUSE", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def function(code: str, name: str = "score", file: str = "mine.py") -> FunctionReward:
    path = Path(file).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code, encoding="utf-8")
    return FunctionReward(function=f"{path}:{name}")


def scored(code: str) -> list[float]:
    return build_score(function(code))(RESPONSES).values


def fault(act: Callable[[], Any]) -> str:
    with pytest.raises(RewardError) as caught:
        act()
    return str(caught.value)


# what a function gets -------------------------------------------------------------------------


def test_a_function_gets_lists_by_name() -> None:
    code = "import json, pathlib\ndef score(completions, prompts, **columns):\n"
    code += "    seen = json.dumps([prompts, completions, columns])\n"
    code += "    pathlib.Path('seen.json').write_text(seen)\n    return [0.5, 1]\n"
    values = scored(code)
    assert values == [0.5, 1.0]
    assert all(type(value) is float for value in values)
    # columns that both rows have, in the order of the first
    prompts, completions, columns = json.loads(Path("seen.json").read_text(encoding="utf-8"))
    assert (prompts, completions) == (["One?", TURNS], ["1", "22"])
    assert columns.pop("completion_ids") == [[7, 8], []]
    assert list(columns.items()) == [("answer", ["1", "2"]), ("level", [3, 4])]


def test_a_function_gets_only_the_columns_that_it_names() -> None:
    code = "def score(prompts, completions, answer, topic=None):\n"
    code += (
        "    return [float(c == a) if topic is None else 9 for c, a in zip(completions, answer)]"
    )
    assert scored(code) == [1.0, 0.0]


def test_columns_that_are_called_like_the_parameters_are_left_out() -> None:
    rows = [Response("p", "c", {"prompts": 1, "completions": 2, "x": 3}, "rows.jsonl:1")]
    code = "def score(prompts, completions, **columns):\n"
    code += "    assert (prompts, completions) == (['p'], ['c'])\n    return columns['x'][:1] * "
    code += "(list(columns) == ['completion_ids', 'x'])"
    assert build_score(function(code))(rows).values == [3.0]


def test_a_file_runs_once_and_its_folder_is_importable_meanwhile(tmp_path: Path) -> None:
    Path("beside_mine.py").write_text("LENGTHS = {'1': 10.0}\n", encoding="utf-8")
    code = (
        "import dataclasses, sys\nfrom beside_mine import LENGTHS\nRUNS = [0]\n"
        "@dataclasses.dataclass\nclass Made:\n    value: 'float' = 2.0\n"
        "def score(prompts, completions):\n"
        "    RUNS[0] += 1\n    return [LENGTHS.get(c, Made().value) for c in completions]\n"
        "def runs(prompts, completions):\n    return [RUNS[0] for c in completions]\n"
    )
    before = list(sys.path)
    spec = function(code)
    assert build_score(spec)(RESPONSES).values == [10.0, 2.0]
    assert build_score(spec)(RESPONSES).values == [10.0, 2.0]
    # the other function sees the same module
    other = FunctionReward(function=spec.function.replace(":score", ":runs"))
    assert build_score(other)(RESPONSES).values == [2.0, 2.0]
    assert sys.path == before
    assert not list(tmp_path.glob("__pycache__/mine*"))


def test_files_of_one_name_are_two_modules() -> None:
    code = "def score(prompts, completions):\n    return [{}] * 2\n"
    one, two = (function(code.format(n), file=f"{n}/mine.py") for n in (1, 2))
    assert build_score(one)(RESPONSES).values == [1.0, 1.0]
    assert build_score(two)(RESPONSES).values == [2.0, 2.0]
    assert "mine" not in sys.modules


def test_no_responses_are_not_handed_on() -> None:
    assert build_score(function("def score(prompts, completions):\n    1 / 0\n"))([]).values == []


@pytest.mark.parametrize(
    "result",
    [
        "[0.5, 1]",
        "(0.5, True)",
        "numpy.array([0.5, 1.0], dtype='float32')",
        "[numpy.float32(0.5), numpy.bool_(True)]",
        "torch.tensor([0.5, 1.0], dtype=torch.bfloat16, requires_grad=True)",
        "[torch.tensor(0.5), torch.tensor(1)]",
        "[fractions.Fraction(1, 2), 1]",
    ],
)
def test_kinds_of_results(result: str) -> None:
    code = (
        f"import fractions, numpy, torch\ndef score(prompts, completions):\n    return {result}\n"
    )
    assert scored(code) == [0.5, 1.0]


def test_the_shipped_example() -> None:
    path = assets_root() / "data_templates" / "rewards" / "length_and_tone.py"
    score = build_score(FunctionReward(function=f"{path}:score"))
    answers = ["word " * 20, "word " * 60, "word " * 15, "word " * 70, "", "Sorry" + " word" * 29]
    rows = [Response("p", answer, {"topic": "a"}, "rows.jsonl:1") for answer in answers]
    # 1 from 20 to 60 words; a distance of d words costs d / 20; an apology costs 1
    assert score(rows).values == pytest.approx([1, 1, 0.75, 0.5, 0, 0], abs=1e-12)


# what a function does beside ------------------------------------------------------------------

SCORES = "def score(prompts, completions):\n    {}\n    return [1, 2]\n"


def test_a_function_reaches_neither_the_folder_nor_the_output_of_the_run(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(reward_function, "_WORKER", Worker())
    code = "import os, torch\ntorch.set_grad_enabled(False)\nos.chdir('/')\n"
    code += SCORES.format("print('NOISE'); torch.set_default_dtype(torch.float64); os.chdir('/')")
    score = build_score(function(code))
    assert [score(RESPONSES).values, score(RESPONSES).values] == [[1.0, 2.0]] * 2
    assert Path.cwd() == tmp_path
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() is torch.float32
    printed = capfd.readouterr()
    assert "NOISE" not in printed.out
    assert "NOISE" in printed.err


def test_each_call_starts_in_the_folder_of_the_run() -> None:
    code = "import os\ndef score(prompts, completions):\n"
    code += "    here = os.getcwd()\n    os.chdir('/')\n    return [len(here)] * 2\n"
    score = build_score(function(code))
    assert score(RESPONSES).values == score(RESPONSES).values == [float(len(str(Path.cwd())))] * 2


@pytest.mark.parametrize(
    ("act", "said"),
    {
        "os._exit(3)": "ended its process with exit code 3",
        "os.kill(os.getpid(), 11)": "was ended by SIGSEGV",
        "os.kill(os.getpid(), 9)": "was ended by SIGKILL",
        "os.kill(os.getpid(), 40)": "was ended by signal 40",
        "os.closerange(3, 100)": "ended its process with exit code 1",
        "time.sleep(60)": "gave no result within 1 seconds",
        "[None for _ in iter(int, 1)]": "gave no result within 1 seconds",
    }.items(),
)
def test_a_function_that_ends_or_hangs(act: str, said: str) -> None:
    # the file is loaded within seconds, the call is given half of one
    other = build_score(function(SCORES.format("pass"), file="other.py"))
    assert other(RESPONSES).values == [1.0, 2.0]
    spec = function("import os, time\n" + SCORES.format(act))
    score = build_score(spec.model_copy(update={"timeout": 1.0}))
    message = fault(lambda: score(RESPONSES))
    assert message.startswith(f"mine.py:score: {said}; the response is to rows.jsonl:1\nhint: ")
    # another process takes over, and knows what the run has loaded
    function("import os, time\n" + SCORES.format("pass"))
    assert build_score(spec)(RESPONSES).values == [1.0, 2.0]


@pytest.mark.parametrize("kind", ["GeneratorExit", "KeyboardInterrupt", "BaseException"])
def test_whatever_a_function_raises_has_its_line(kind: str) -> None:
    assert fault(lambda: scored(SCORES.format(f"raise {kind}('no')"))) == (
        f"mine.py:2: score raised {kind}: no, given 2 completions\n"
        f"hint: the line is `raise {kind}('no')`"
    )


def test_a_function_ends_with_the_run(tmp_path: Path) -> None:
    code = "import os, pathlib, time\ndef score(prompts, completions):\n"
    code += "    pathlib.Path('pid').write_text(str(os.getpid()))\n    time.sleep(60)\n"
    spec = function(code)
    run = (
        "from alignkit.generation.rewards.build import build_score\n"
        "from alignkit.generation.rewards.responses import Response\n"
        "from alignkit.recipe.rewards import FunctionReward\n"
        f"build_score(FunctionReward(function={spec.function!r}))([Response('a', 'b', {{}}, 'c')])"
    )
    process = subprocess.Popen([sys.executable, "-c", run])
    until(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text() != "")
    process.kill()
    process.wait()
    worker = Path("/proc") / (tmp_path / "pid").read_text()
    until(lambda: not worker.exists() or " Z " in (worker / "stat").read_text())


def until(done: Callable[[], bool]) -> None:
    for _ in range(600):
        if done():
            return
        time.sleep(0.05)
    raise AssertionError("not within 30 seconds")


# faults of a function -------------------------------------------------------------------------

SHAPE = "hint: write def score(prompts, completions, **columns)"
FAULTS = {
    # Case -> code, the whole message. All but the last group are found before training.
    "a syntax error": (
        "x = 1\ndef score(:\n    pass\n",
        "mine.py:2: cannot be imported: SyntaxError: invalid syntax (mine.py, line 2)\n"
        "hint: the line is `def score(:`",
    ),
    "an error on import": (
        "\nLIMITS = {}\nTOP = LIMITS['top']\n",
        "mine.py:3: cannot be imported: KeyError: 'top'\nhint: the line is `TOP = LIMITS['top']`",
    ),
    "a package that is missing": (
        "import nowhere_to_be_found\n",
        "mine.py:1: cannot be imported: ModuleNotFoundError: No module named "
        "'nowhere_to_be_found'\nhint: install nowhere_to_be_found, or put it into .",
    ),
    "an exit": (
        "import sys\nsys.exit('done')\n",
        "mine.py:2: cannot be imported: SystemExit: done\nhint: the line is `sys.exit('done')`",
    ),
    "a file that nests too deeply": (
        "x = " + "[" * 3000 + "]" * 3000 + "\n",
        "mine.py{any}: cannot be imported: {any}\nhint: {any}",
    ),
    "a file that is no text": (
        "x = '\0'\n",
        "mine.py: cannot be imported: {any}\nhint: `python mine.py` shows the whole error",
    ),
    "another name": (
        "def scores(prompts, completions):\n    pass\n",
        "mine.py: has no function 'score'\nhint: did you mean scores?",
    ),
    "other names": (
        "from math import sqrt\nfrom shutil import copy\ndef f(): ...\ndef g(): ...\n",
        "mine.py: has no function 'score'\nhint: functions in it: f, g",
    ),
    "no names": ("", "mine.py: has no function 'score'\nhint: functions in it: none"),
    "no function": ("score = [1]\n", f"mine.py: score must be a function, got list\n{SHAPE}"),
    "neither parameter": (
        "def score(*texts): ...\n",
        "mine.py: score has no parameter completions\n"
        f"{SHAPE}; columns may also be named one by one",
    ),
    "a column that no row has": (
        "def score(prompts, completions, gold): ...\n",
        "mine.py:score wants 'gold', a column that not every row has\n"
        "hint: the rows have answer, level; give the parameter a default, or add the column",
    ),
    "a column that one row has": (
        "def score(prompts, completions, topic, **columns): ...\n",
        "mine.py:score wants 'topic', a column that not every row has\n"
        "hint: the rows have answer, level; give the parameter a default, or add the column",
    ),
    "an error": (
        "import json\ndef score(prompts, completions):\n    return _each(completions)\n"
        "def _each(texts):\n    return [json.loads(t + ']') for t in texts]\n",
        "mine.py:5: score raised JSONDecodeError: Extra data: line 1 column 2 (char 1), given 2 "
        "completions\nhint: the line is `return [json.loads(t + ']') for t in texts]`",
    ),
    "an error without words": (
        "def score(prompts, completions):\n    raise NotImplementedError\n",
        "mine.py:2: score raised NotImplementedError, given 2 completions\n"
        "hint: the line is `raise NotImplementedError`",
    ),
    "an exit in the function": (
        "def score(prompts, completions):\n    raise SystemExit(3)\n",
        "mine.py:2: score raised SystemExit: 3, given 2 completions\n"
        "hint: the line is `raise SystemExit(3)`",
    ),
    "parameters that have no name to call them by": (
        "def score(prompts, completions, /, **columns):\n    return [1, 2]\n",
        "mine.py: score raised TypeError: {any}, given 2 completions\n"
        "hint: it is called as def score(prompts, completions, **columns)",
    ),
    "no result": (
        "def score(prompts, completions):\n    [1.0, 2.0]\n",
        "mine.py:score: must give a list of numbers, got nothing\nhint: one number for each "
        "completion; arrays and tensors of one dimension are fine, and a function needs a return",
    ),
}
NUMBERS = "\nhint: one number for each completion; arrays and tensors of one dimension are fine"
FINITE = "\nhint: give None where the reward does not apply, or 0; scores are counted from 0"
COUNT = "\nhint: keep the order of the completions, and score the bad ones too"
RESULTS = {
    "0.5": f"must give a list of numbers, got float{NUMBERS}",
    "{'a': 1}": f"must give a list of numbers, got dict{NUMBERS}",
    "'12'": f"must give a list of numbers, got str{NUMBERS}",
    "(1 for _ in completions)": f"must give a list of numbers, got generator{NUMBERS}",
    "torch.tensor(1.0)": f"must give a list of numbers, got Tensor{NUMBERS}",
    "[1]": f"must give 2 scores, one for each completion, got 1{COUNT}",
    "[1, 2, 3]": f"must give 2 scores, one for each completion, got 3{COUNT}",
    "['1', 2]": f"score 0 must be a finite number, got '1'; its row is rows.jsonl:1{FINITE}",
    "[1, float('nan')]": (
        f"score 1 must be a finite number, got nan; its row is rows.jsonl:2{FINITE}"
    ),
    "[float('-inf'), 1]": (
        f"score 0 must be a finite number, got -inf; its row is rows.jsonl:1{FINITE}"
    ),
    "numpy.array([0.5, numpy.inf])": (
        f"score 1 must be a finite number, got inf; its row is rows.jsonl:2{FINITE}"
    ),
    "torch.tensor([torch.nan, 1])": (
        f"score 0 must be a finite number, got nan; its row is rows.jsonl:1{FINITE}"
    ),
    "numpy.ones((2, 1))": (
        f"score 0 must be a finite number, got [1.0]; its row is rows.jsonl:1{FINITE}"
    ),
    "[1, 1j]": f"score 1 must be a finite number, got 1j; its row is rows.jsonl:2{FINITE}",
    "[10**400, 1]": (
        f"score 0 must be a finite number, got 1{'0' * 56}...; its row is rows.jsonl:1{FINITE}"
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_of_a_function(case: str) -> None:
    code, message = FAULTS[case]
    pattern = re.escape(message).replace(r"\{any\}", ".+")
    said = fault(lambda: scored(code))
    assert re.fullmatch(pattern, said), said


@pytest.mark.parametrize("result", RESULTS)
def test_results_that_are_no_scores(result: str) -> None:
    code = f"import numpy, torch\ndef score(prompts, completions):\n    return {result}\n"
    assert fault(lambda: scored(code)) == f"mine.py:score: {RESULTS[result]}"


def test_a_file_that_has_gone() -> None:
    spec = FunctionReward(function=f"{Path('gone.py').resolve()}:score")
    assert fault(lambda: build_score(spec)) == (
        "gone.py: the file of the reward function does not exist\n"
        "hint: put it back, or name another in the recipe"
    )


def test_a_file_that_failed_is_run_again_once_it_is_mended() -> None:
    spec = function("import nowhere_to_be_found\n")
    before = list(sys.path)
    fault(lambda: build_score(spec))
    assert sys.path == before
    function("def score(prompts, completions):\n    return [1, 1]  # fixed\n")
    assert build_score(spec)(RESPONSES).values == [1.0, 1.0]


def test_checked_names_its_source() -> None:
    score = checked("the reward model", lambda responses: [1.0, float("nan")])
    assert fault(lambda: score(RESPONSES)).startswith("the reward model: score 1 must be a finite")
    assert checked("x", lambda responses: [1, 2])(RESPONSES).values == [1.0, 2.0]


# servers --------------------------------------------------------------------------------------


class Server:
    """A reward server whose answers are set by the test, and that keeps what it was asked."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        self.late = 0.0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append((self.path, dict(self.headers), None))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.asked.append((self.path, dict(self.headers), json.loads(body)))
                time.sleep(outer.late)
                answer = outer.answers.pop(0)
                if answer is None:  # hang up
                    self.close_connection = True
                    return
                status, body, *location = answer
                self.send_response(status)
                for place in location:
                    self.send_header("Location", place)
                self.end_headers()
                with contextlib.suppress(OSError):  # the client did not wait
                    for part in [body] if isinstance(body, bytes) else body:
                        self.wfile.write(part)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def test_a_server_gets_json_and_gives_scores(server: Server) -> None:
    server.answers = [(200, b'{"scores": [0.5, 2], "seconds": 1}')]
    assert build_score(UrlReward(url=server.url))(RESPONSES).values == [0.5, 2.0]
    ((path, headers, body),) = server.asked
    assert path == "/score"
    assert headers["Content-Type"] == "application/json"
    assert body == {
        "prompts": ["One?", TURNS],
        "completions": ["1", "22"],
        "columns": {"answer": ["1", "2"], "level": [3, 4]},
    }


ANSWER = '\nhint: it gets {"prompts", "completions", "columns"} and answers {"scores": [0.5, …]}'
ANSWERS = {
    b"<html>\n hello": f"must answer JSON, got '<html> hello'{ANSWER}",
    b"": f"must answer JSON, got ''{ANSWER}",
    b"[1, 2]": f"must answer an object, got list{ANSWER}",
    b'{"score": [1, 2]}': f"must answer an object with `scores`, got score{ANSWER}",
    b"{}": f"must answer an object with `scores`, got nothing in it{ANSWER}",
    b'{"scores": [1]}': f"must give 2 scores, one for each completion, got 1{COUNT}",
    b'{"scores": null}': (
        f"must give a list of numbers, got nothing{NUMBERS}, and a function needs a return"
    ),
    b'{"scores": ["a", 1]}': (
        f"score 0 must be a finite number, got 'a'; its row is rows.jsonl:1{FINITE}"
    ),
    b'{"scores": [1e400, 1]}': (
        f"score 0 must be a finite number, got inf; its row is rows.jsonl:1{FINITE}"
    ),
    b'{"scores": ' + b"[" * 3000 + b"]" * 3000 + b"}": (
        f"must answer JSON, got '{{\"scores\": {'[' * 106}...'{ANSWER}"
    ),
    b"\xff\xfe\x00": f"must answer JSON, got '\ufffd\ufffd\\x00'{ANSWER}",
    b'{"scores": {"a": 1}}': f"must give a list of numbers, got dict{NUMBERS}",
    b'{"scores": [NaN, 1]}': (
        f"score 0 must be a finite number, got nan; its row is rows.jsonl:1{FINITE}"
    ),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_that_are_no_scores(server: Server, answer: bytes) -> None:
    server.answers = [(200, answer)]
    said = fault(lambda: build_score(UrlReward(url=server.url))(RESPONSES).values)
    assert said == f"{server.url}: {ANSWERS[answer]}"
    assert len(server.asked) == 1


def test_an_http_error_is_not_tried_again(server: Server) -> None:
    server.answers = [(500, b"out of\nmemory " + b"x" * 500)]
    said = fault(lambda: build_score(UrlReward(url=server.url))(RESPONSES).values)
    assert said == (
        f"{server.url}: answered HTTP 500 Internal Server Error: 'out of memory {'x' * 103}...'\n"
        "hint: see the server's own log"
    )
    assert len(server.asked) == 1


def test_a_lost_connection_is_tried_once_more(server: Server) -> None:
    server.answers = [None, (200, b'{"scores": [1, 2]}')]
    assert build_score(UrlReward(url=server.url))(RESPONSES).values == [1.0, 2.0]
    assert len(server.asked) == 2
    server.answers = [None, None]
    said = fault(lambda: build_score(UrlReward(url=server.url))(RESPONSES).values)
    assert said == (
        f"{server.url}: cannot be reached, tried twice: Remote end closed connection without "
        "response\nhint: start the server, or check reward.url"
    )
    assert len(server.asked) == 4


def test_a_late_answer(server: Server) -> None:
    server.late, server.answers = 0.5, [(200, b"{}")]
    said = fault(lambda: build_score(UrlReward(url=server.url, timeout=0.05))(RESPONSES).values)
    assert said == (
        f"{server.url}: gave no answer within 0.05 seconds\n"
        "hint: raise reward.timeout, or lower rollout.prompts_per_step"
    )
    assert len(server.asked) == 1


def test_nobody_listens_and_secrets_are_not_shown(server: Server) -> None:
    server.close()
    server.close = lambda: None  # type: ignore[method-assign]
    spec = UrlReward(url=f"{server.url}?token=hidden")
    said = fault(lambda: build_score(spec)(RESPONSES).values)
    assert said == (
        f"{server.url}?…: cannot be reached, tried twice: Connection refused\n"
        "hint: start the server, or check reward.url"
    )


def drip(seconds: float) -> Iterator[bytes]:
    """One byte after the other, each soon enough for the timeout of a socket."""
    while True:
        time.sleep(seconds)
        yield b" "


def test_the_deadline_is_for_the_whole_call(server: Server) -> None:
    server.answers, started = [(200, drip(0.05))], time.monotonic()
    said = fault(lambda: build_score(UrlReward(url=server.url, timeout=0.3))(RESPONSES).values)
    assert "gave no answer within 0.3 seconds" in said
    assert time.monotonic() - started < 5.0


def test_the_deadline_holds_for_names_that_are_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: time.sleep(3.0))
    spec = UrlReward(url="http://slow.invalid/score", timeout=0.1)
    assert "gave no answer within 0.1 seconds" in fault(lambda: build_score(spec)(RESPONSES).values)


def test_an_endless_answer_is_not_read(server: Server) -> None:
    server.answers = [(200, iter(lambda: b"x" * (1 << 20), b""))]
    said = fault(lambda: build_score(UrlReward(url=server.url))(RESPONSES).values)
    assert said == (
        f"{server.url}: answered more than 1,179,648 bytes, which is not read further\n"
        "hint: answer the scores and nothing else"
    )


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("place", ["/internal?key=secret", "ftp://127.0.0.1/scores", "file:///etc"])
def test_no_redirection_is_followed(server: Server, status: int, place: str) -> None:
    server.answers = [(status, b'{"scores": [1, 2]}', place)]
    said = fault(lambda: build_score(UrlReward(url=server.url))(RESPONSES).values)
    shown = place.partition("?")[0]
    assert f"answered HTTP {status}: it redirects to '{shown}" in said
    assert "secret" not in said or place.startswith("/")
    assert len(server.asked) == 1


def test_an_address_from_a_run_folder_lacks_its_query() -> None:
    said = fault(lambda: build_score(UrlReward(url="http://localhost:1/a?…")))
    assert "is not the whole address: a run does not store the query" in said
