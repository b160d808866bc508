"""Mathematics, programs, schemas and judges: what is right, what is wrong, and what is refused."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_rewards import Server

from alignkit.errors import RewardError
from alignkit.generation.rewards import asking, programs
from alignkit.generation.rewards import schema as schemas
from alignkit.generation.rewards.build import build_score
from alignkit.generation.rewards.responses import Response
from alignkit.recipe.rewards import JudgeReward
from alignkit.recipe.rules import CodeReward, JsonSchemaReward, MathReward
from alignkit.runtime.confined import NotConfined


def rows(*pairs: tuple[str, Any], column: str = "answer") -> list[Response]:
    return [
        Response("Why?", text, {column: value}, f"rows.jsonl:{number + 1}")
        for number, (text, value) in enumerate(pairs)
    ]


def fault(spec: Any, some: list[Response]) -> str:
    with pytest.raises(RewardError) as caught:
        build_score(spec)(some)
    return str(caught.value)


# mathematics ----------------------------------------------------------------------------------


def test_expressions_are_compared_and_not_their_letters() -> None:
    score = build_score(MathReward(rule="math"))
    found = score(
        rows(
            (r"So the answer is $\frac{1}{2}$.", "0.5"),
            (r"\boxed{\frac{2}{4}}", r"\frac{1}{2}"),
            (r"We get $x = 3$, so \boxed{3}", "3"),
            ("It is 72.", "18 * 4 = #### 72"),
            (r"\boxed{(x+1)^2}", "x^2 + 2x + 1"),
            (r"\boxed{4}", "3"),
            ("I do not know", "3"),
            ("", "3"),
        )
    ).values
    assert found == [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]


def test_a_row_without_an_expression() -> None:
    assert fault(MathReward(rule="math"), rows(("3", "####"))) == (
        "rows.jsonl:1: the reward rule `math` finds no expression in 'answer'\n"
        "hint: name another column with reward.column, or remove the row"
    )


# programs -------------------------------------------------------------------------------------

TESTS = ["assert double(2) == 4", "assert double(-1) == -2"]
PROGRAMS = {
    "def double(x):\n    return 2 * x": 1.0,
    "Here it is:\n```python\ndef double(x):\n    return x + x\n```\nIt adds.": 1.0,
    "```bash\npip install x\n```\nHere:\n```python\ndef double(x):\n    return 2 * x\n```": 1.0,
    "```\ndef double(x):\n    return 5\n```\nor\n```python\ndouble = lambda x: 2 * x\n```": 1.0,
    "def double(x):\n    return 4": 0.0,
    "def double(x:": 0.0,
    "import sys\nsys.exit(0)": 0.0,
    "import os\nos._exit(0)": 0.0,
    "import os\nos._exit(77)": 0.0,
    "def double(x: int):\n    return 2 * x\nassert double.__annotations__ == {'x': int}": 1.0,
    "while True:\n    pass": 0.0,
    "def double(x):\n    return input()": 0.0,
    "import os\nos.write(int(os.sys.argv[1]), b'0' * 32)\nos._exit(0)": 0.0,
}


@pytest.mark.parametrize("confined", [True, False])
def test_programs_that_pass_their_tests(confined: bool) -> None:
    score = build_score(CodeReward(rule="code", timeout=2.0, confined=confined))
    some = rows(*((text, TESTS) for text in PROGRAMS), column="tests")
    assert score(some).values == list(PROGRAMS.values())
    one = rows(("double = lambda x: 2 * x", "\n".join(TESTS)), column="tests")
    assert score(one).values == [1.0]


HARMS = {
    "the network": "import socket\nsocket.create_connection(('{host}', {port}), 1)",
    "a file of mine": "import os\nos.remove('{file}')",
    "another file": "open('{file}2', 'w').write('x')",
    "the environment": "import os\nassert 'HOME' in os.environ or 'PATH' in os.environ",
    "other processes": "import os\nos.kill({pid}, 0)",
    "what they are called": "import os\nassert os.path.exists('/proc/{pid}/cmdline')",
    "a writable system": "import ctypes\nlibc = ctypes.CDLL(None)\n"
    "assert libc.mount(b'none', b'/', b'none', 32 | 4096, None) == 0",
    "the host's /tmp": "import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.umount(b'/tmp') == 0",
    "rights of a namespace": "import ctypes\nlibc = ctypes.CDLL(None)\n"
    "assert libc.unshare(0x10020000) == 0\n"
    "assert 0 in (libc.umount(b'/tmp'), libc.mount(b'none', b'/', b'none', 32 | 4096, None))",
    "sockets of services": "import os\nassert os.listdir('/run')",
    "memory": "x = ' ' * (2 << 30)",
    "memory of many": "import os, time\nfor _ in range(8):\n    if os.fork() == 0:\n"
    "        x = 'x' * (200 << 20)\n        time.sleep(3)\n        os._exit(0)\ntime.sleep(3)",
    "further namespaces": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "sockets": "import socket\nsocket.socket(socket.AF_UNIX)",
    "devices": "import os\nassert len(os.listdir('/dev')) > 3",
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_program_can_do_no_harm(harm: str, tmp_path: Path) -> None:
    server = Server()
    mine = tmp_path / "mine.txt"
    mine.write_text("x", encoding="utf-8")
    host, port = server.server.server_address[:2]
    code = HARMS[harm].format(host=host, port=port, file=mine, pid=os.getpid())
    score = build_score(CodeReward(rule="code", timeout=5.0))
    try:
        harmed, fine = score(
            rows((code, "pass"), ("open('/tmp/own', 'w').write('x')", "pass"), column="tests")
        ).values
    finally:
        server.close()
    assert (harmed, fine) == (0.0, 1.0)
    assert mine.exists()
    assert not list(tmp_path.glob("*2"))


@pytest.mark.parametrize("confined", [True, False])
def test_what_a_program_starts_ends_with_it(confined: bool) -> None:
    score = build_score(CodeReward(rule="code", timeout=1.0, confined=confined))
    code = (
        "import ctypes, os\nos.setsid()\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\n"
        "if os.fork() == 0:\n    os.setsid()\nos.execv('/bin/sleep', ['sleep', '31.4159'])"
    )
    assert score(rows((code, "pass"), column="tests")).values == [0.0]
    running = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in running if "31.4159" in command]


def test_a_program_leaves_no_shared_memory() -> None:
    code = "import ctypes\nassert ctypes.CDLL(None).shmget(0x5EAF00D, 100, 0o1666) >= 0"
    score = build_score(CodeReward(rule="code"))
    assert score(rows((code, "pass"), column="tests")).values == [1.0]
    keys = [line.split()[0] for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]
    assert str(0x5EAF00D) not in keys


@pytest.mark.parametrize("tests", [[], "", " ", 3])
def test_a_row_without_tests(tests: Any) -> None:
    message = fault(CodeReward(rule="code"), rows(("", tests), column="tests"))
    assert message.startswith("rows.jsonl:1: the reward rule `code` finds no tests in 'tests'")


def test_a_system_that_confines_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> bool:
        raise NotConfined

    monkeypatch.setattr(programs, "passes", refuse)
    message = fault(CodeReward(rule="code"), rows(("x = 1", "pass"), column="tests"))
    assert message.startswith("the reward rule `code` cannot confine programs here")
    assert message.endswith("in a machine that may be lost, reward.confined: false")


# schemas --------------------------------------------------------------------------------------

SCHEMA = {"type": "object", "required": ["age"], "properties": {"age": {"type": "integer"}}}


def test_json_that_a_schema_allows(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA), encoding="utf-8")
    texts = [
        '{"age": 3}',
        '```json\n{"age": 3}\n```',
        '{"age": "3"}',
        "{}",
        "age: 3",
        "",
        "[" * 9999,
        '{"age": NaN}',
        '{"age": 1e400}',
    ]
    some = rows(*((text, "") for text in texts))
    score = build_score(JsonSchemaReward(rule="json_schema", file=str(file)))
    assert score(some).values == [1.0, 1.0, *[0.0] * 7]
    each = build_score(JsonSchemaReward(rule="json_schema", column="answer"))
    pairs = [('{"age": 3}', SCHEMA), ("[]", '{"type": "array"}'), ("3", {"type": "string"})]
    assert each(rows(*pairs)).values == [1.0, 1.0, 0.0]


def test_a_schema_that_never_comes_to_an_end(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text('{"pattern": "^(a+)+$"}', encoding="utf-8")
    spec = JsonSchemaReward(rule="json_schema", file=str(file), timeout=0.5)
    message = fault(spec, rows((f'"{"a" * 40}!"', "")))
    assert "takes more than 0.5 seconds" in message
    file.write_text('{"properties": {"x": {"multipleOf": 0.01}}}', encoding="utf-8")
    assert build_score(spec)(rows((f'{{"x": {"9" * 401}}}', ""))).values == [0.0]


def test_what_is_no_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "schema.json"
    file.write_text('{"type": "number of things"}', encoding="utf-8")
    with pytest.raises(
        RewardError, match=r"schema\.json: is not a JSON schema: 'number of things'"
    ):
        build_score(JsonSchemaReward(rule="json_schema", file=str(file)))
    file.write_text("{", encoding="utf-8")
    with pytest.raises(RewardError, match=r"schema\.json: cannot be read as JSON"):
        build_score(JsonSchemaReward(rule="json_schema", file=str(file)))
    each = JsonSchemaReward(rule="json_schema", column="answer")
    assert fault(each, rows(("1", "{"))).startswith("rows.jsonl:1: 'answer' is not JSON")
    monkeypatch.setattr(schemas, "jsonschema", None)
    with pytest.raises(RewardError, match="needs the package jsonschema") as caught:
        build_score(each)
    assert caught.value.hint == "pip install 'alignkit[json]'"


def test_a_schema_fetches_nothing(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text('{"$ref": "http://127.0.0.1:9/other.json"}', encoding="utf-8")
    score = build_score(JsonSchemaReward(rule="json_schema", file=str(file)))
    with pytest.raises(RewardError, match="names another schema"):
        score(rows(("1", "")))


# judges ---------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(asking, "_PAUSE", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Server()
    yield running
    running.close()


def judge(server: Server, **fields: Any) -> JudgeReward:
    address = server.url.removesuffix("/score") + "/v1"
    given = {"model": "big", "rubric": "Short and true.", "at_once": 1, **fields}
    return JudgeReward(judge=address, **given)


def reply(text: str) -> tuple[int, bytes]:
    return 200, json.dumps({"choices": [{"message": {"content": text}}]}).encode()


def test_a_judge_is_asked_and_its_replies_are_kept(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THE_KEY", "secret")
    server.answers = [reply("True, but long.\nScore: 7"), reply("**Score:** 2.5 of 10")]
    found = build_score(judge(server, api_key="THE_KEY"))(rows(("Yes.", ""), ("No.", "")))
    assert found.values == [0.7, 0.25]
    assert found.notes[0] == {"reply": "True, but long.\nScore: 7"}
    path, headers, body = server.asked[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["temperature"]) == ("big", 0.0)
    system, user = body["messages"]
    assert "Short and true." in system["content"]
    assert "Yes." in user["content"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (reply("I cannot say."), "no `Score: N` between 0 and 10 in the reply"),
        (reply("Score: -3"), "the score -3 between 0 and 10 in the reply"),
        (reply("the underscore 9 of it"), "no `Score: N` between 0 and 10 in the reply"),
        (reply("Score: 11"), "the score 11 between 0 and 10 in the reply"),
        ((200, b"{}"), "answers no chat completion: '{}'"),
        ((500, b"busy"), "answered HTTP 500 Internal Server Error: 'busy'"),
    ],
)
def test_a_reply_without_a_score(answer: tuple[int, bytes], reason: str, server: Server) -> None:
    server.answers = [answer, reply("Score: 5")] * 2
    some = rows(("a", ""), ("b", ""))
    found = build_score(judge(server))(some)
    assert math.isnan(found.values[0])
    assert found.values[1] == 0.5
    assert found.failures[0].place == "rows.jsonl:1"
    assert found.failures[0].reason.endswith(reason)
    server.answers = [answer, reply("Score: 5")]
    assert build_score(judge(server, on_failure="zero"))(some).values == [0.0, 0.5]
    server.answers = [answer, reply("Score: 5")]
    message = fault(judge(server, on_failure="stop"), some)
    assert message.startswith("rows.jsonl:1: 1 of 2 responses could not be judged: ")


def test_the_address_of_a_judge_may_have_a_query(server: Server) -> None:
    server.answers = [reply("\ud83d Score: 3\nScore: 4")]
    address = server.url.removesuffix("/score") + "/v1/?version=3"
    found = build_score(JudgeReward(judge=address, model="m", rubric="r"))(rows(("a", "")))
    assert found.values == [0.4]
    assert server.asked[0][0] == "/v1/chat/completions?version=3"
    json.dumps(found.notes[0], ensure_ascii=False).encode()


def test_what_a_judge_needs(server: Server, tmp_path: Path) -> None:
    message = fault(judge(server, api_key="NOT_SET_ANYWHERE"), rows(("a", "")))
    assert message.startswith("reward.api_key names NOT_SET_ANYWHERE, an environment variable")
    file = tmp_path / "rubric.md"
    file.write_text("Only true ones.", encoding="utf-8")
    server.answers = [reply("Score: 1")]
    build_score(judge(server, rubric=str(file)))(rows(("a", "")))
    assert "Only true ones." in server.asked[0][2]["messages"][0]["content"]
