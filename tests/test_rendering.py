"""Chat templates get so much time and memory, and leave the process as it was."""

from __future__ import annotations

import resource
import signal
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from alignkit.rendering import RenderingError, render_chat

QUESTION = [{"role": "user", "content": "a"}]
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def tokenizer_with(template: str) -> Any:
    """What `render_chat` needs of a tokenizer: transformers' own rendering of a template."""

    def apply(turns: list[dict[str, Any]], *, tokenize: bool, **options: Any) -> str:
        assert not tokenize
        return str(render_jinja_template([turns], chat_template=template, **options)[0][0])

    return SimpleNamespace(apply_chat_template=apply)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 5000000000 }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ [0] * 3000000000 }}",
        "{% set n = namespace(x='a' * 99999) %}{% for a in range(60) %}{% set n.x = n.x + n.x %}"
        "{% endfor %}{{ n.x }}",
    ],
    ids=["repeat", "format", "list", "doubled"],
)
def test_memory_of_a_template_is_bounded(template: str) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(RenderingError, match=r"takes more than 1\.1 GB of memory for one chat\n"):
        render_chat(tokenizer_with(template), QUESTION)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.parametrize("template", [LOOPS, "{{ 3 ** 99999999 % 7 }}"], ids=["loops", "power"])
def test_time_of_a_template_is_bounded(template: str) -> None:
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(RenderingError, match=r"takes more than 0\.2 seconds for one chat\n"):
        render_chat(tokenizer_with(template), QUESTION, seconds=0.2)
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_what_a_template_raises_is_a_sentence() -> None:
    rule = "the chat template refuses the conversation: no system"
    with pytest.raises(RenderingError, match=rule):
        render_chat(tokenizer_with("{{ raise_exception('no system') }}"), QUESTION)
    with pytest.raises(RenderingError, match="maximum recursion depth"):
        render_chat(tokenizer_with("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"), QUESTION)


def test_another_thread_renders_too() -> None:
    texts: list[str] = []
    tokenizer = tokenizer_with("{{ messages[0].content }}")
    thread = threading.Thread(target=lambda: texts.append(render_chat(tokenizer, QUESTION)))
    thread.start()
    thread.join()
    assert texts == ["a"]
