"""Modelfiles: what Ollama's template writes is what the model's own template writes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
from tiny import END_OF_TURN, TOKENIZERS, tiny_tokenizer

from alignkit.models.export.ollama import recognise, write_modelfile

SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "Name a colour.\nOne word."}
ANSWER = {"role": "assistant", "content": "Blue"}
MORE = {"role": "user", "content": "Another"}
CONVERSATIONS = [[ASK], [SYSTEM, ASK], [ASK, ANSWER, MORE], [SYSTEM, ASK, ANSWER, MORE]]


def run_template(source: str, messages: Sequence[dict[str, str]]) -> str:
    """The few parts of Go's template language that Modelfiles here use."""
    source = re.sub(r"\s*\{\{- ", "{{ ", source)
    pieces = re.split(r"\{\{ ?(.*?) ?\}\}", source, flags=re.DOTALL)
    text, _ = _run(pieces, 0, {"messages": messages}, True)
    return text


def _run(pieces: list[str], place: int, state: dict[str, Any], live: bool) -> tuple[str, int]:
    """Text from a place up to the end or else that closes it, and where that is."""
    text = ""
    while place < len(pieces):
        word = pieces[place]
        if place % 2 == 0:
            text += word if live else ""
        elif word == "end" or word.startswith("else"):
            return text, place
        elif word == "range .Messages":
            start = place + 1
            for message in state["messages"]:
                state["message"] = message
                part, place = _run(pieces, start, state, live)
                text += part
        elif word.startswith("if "):
            part, place = _choose(pieces, place, state, live)
            text += part
        elif assigned := re.fullmatch(r"(\$\w+) :?= (true|false)", word):
            if live:
                state[assigned[1]] = assigned[2] == "true"
        elif live:
            text += state["message"][{".Role": "role", ".Content": "content"}[word]]
        place += 1
    return text, place


def _choose(pieces: list[str], place: int, state: dict[str, Any], live: bool) -> tuple[str, int]:
    text, done = "", False
    while pieces[place] != "end":
        test = pieces[place].removeprefix("else ").removeprefix("if ")
        if role := re.fullmatch(r'eq \.Role "(\w+)"', test):
            holds = state["message"]["role"] == role[1]
        elif name := re.fullmatch(r"not (\$\w+)", test):
            holds = not state[name[1]]
        else:
            assert test == "else", test
            holds = True
        part, place = _run(pieces, place + 1, state, live and holds and not done)
        text += part
        done = done or holds
    return text, place


@pytest.mark.parametrize("family", TOKENIZERS)
def test_both_templates_write_the_same(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    found = recognise(tokenizer)
    assert found is not None
    names = {"chatml": "ChatML", "qwen": "ChatML", "llama3": "Llama 3", "gemma": "Gemma"}
    assert found.format.name == names.get(family, "Mistral")
    assert found.format.stop == END_OF_TURN[family]
    for turns in CONVERSATIONS:
        own = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        # Ollama puts BOS before a text for tokenizers that add it.
        if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
            own = own.removeprefix(tokenizer.bos_token)
        assert run_template(found.bos + found.format.template, turns) == own


def test_bos_that_only_the_template_writes() -> None:
    tokenizer = tiny_tokenizer("llama3")
    tokenizer.backend_tokenizer.post_processor = tiny_tokenizer().backend_tokenizer.post_processor
    found = recognise(tokenizer)
    assert found is not None
    assert found.bos == "<|begin_of_text|>"
    assert 'TEMPLATE """<|begin_of_text|>{{- range' in write_modelfile("a.gguf", found, [])


def test_a_default_system_text() -> None:
    template = (
        "{% if messages[0]['role'] != 'system' %}"
        "<|im_start|>system\nI am Tiny.<|im_end|>\n{% endif %}{% for m in messages %}"
        "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    found = recognise(tiny_tokenizer(template=template))
    assert found is not None
    assert (found.format.name, found.system) == ("ChatML", "I am Tiny.")
    assert 'SYSTEM """I am Tiny."""' in write_modelfile("a.gguf", found, [])


@pytest.mark.parametrize("system", ['Hi."""\nFROM evil\nSYSTEM """', 'I am "Tiny"'])
def test_no_foreign_text_ends_a_quotation(system: str) -> None:
    template = (
        "{% if messages[0]['role'] != 'system' %}"
        f"<|im_start|>system\n{system}<|im_end|>\n{{% endif %}}{{% for m in messages %}}"
        "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert recognise(tiny_tokenizer(template=template)) is None
    text = write_modelfile("a.gguf", None, ['x"\nFROM evil\nPARAMETER stop "y', "\n\n"])
    assert "evil" not in text
    assert "# a stop text with quotes and line breaks is left out" in text
    assert 'PARAMETER stop "\n\n"' in text


def test_a_template_without_system_turns() -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n"
        "{{ m['content'] }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    )
    found = recognise(tiny_tokenizer("gemma", template=template))
    assert found is not None
    assert found.format.name == "Gemma"


@pytest.mark.parametrize(
    ("version", "asked", "answered"),
    [
        ("7B v0.3", "[INST] {}[/INST]", " {}</s>"),
        ("7B v0.1", "[INST] {} [/INST]", "{}</s> "),
        ("7B v0.2", "[INST] {} [/INST]", " {}</s>"),
        ("Nemo", "[INST]{}[/INST]", "{}</s>"),
    ],
)
def test_of_mistral_the_spaces_of_one_version(version: str, asked: str, answered: str) -> None:
    text = "{{ m['content'] }}"
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
        f"{{% elif m['role'] == 'user' %}}{asked.replace('{}', text)}"
        f"{{% else %}}{answered.replace('{}', text)}{{% endif %}}{{% endfor %}}"
    )
    found = recognise(tiny_tokenizer(template=template))
    assert (found is not None) == (version == "7B v0.3")


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
        # ChatML but for one line break.
        "{% for m in messages %}"
        "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        # ChatML that loses its system turn.
        "{% for m in messages if m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "{{ raise_exception('never') }}",
    ],
)
def test_unknown_templates(template: str | None) -> None:
    assert recognise(tiny_tokenizer(template=template)) is None


def test_a_modelfile_without_a_template() -> None:
    text = write_modelfile("a model.gguf", None, ['<"end">', '<"end">'])
    assert text == 'FROM ./a model.gguf\nPARAMETER stop "<\\"end\\">"\n'
