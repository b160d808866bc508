"""A Modelfile for Ollama: the chat template in its own language, and where an answer stops.

The chat template is recognised by what it writes. It renders probe conversations, and a format is
taken only if it writes the same characters for all of them; otherwise the Modelfile has no
TEMPLATE and the user is told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jinja2
from transformers import PreTrainedTokenizerBase

Turn = dict[str, str]


@dataclass(frozen=True)
class ChatFormat:
    """One way to write a conversation.

    Args:
        name: for people.
        render: turns -> text up to where the next answer starts, without BOS.
        template: the same in Ollama's language.
        stop: text that ends an answer.
    """

    name: str
    render: Callable[[Sequence[Turn]], str]
    template: str
    stop: str


@dataclass(frozen=True)
class Recognised:
    """The format a chat template writes.

    Args:
        format: which one.
        system: text that the template puts first where there is no system turn.
        bos: text that the template writes first but the tokenizer does not add.
    """

    format: ChatFormat
    system: str = ""
    bos: str = ""


def _turns(opener: str, between: str, closer: str) -> Callable[[Sequence[Turn]], str]:
    def render(turns: Sequence[Turn]) -> str:
        parts = [f"{opener}{t['role']}{between}{t['content']}{closer}" for t in turns]
        return "".join(parts) + f"{opener}assistant{between}"

    return render


def _turns_template(opener: str, between: str, closer: str) -> str:
    turn = f"{opener}{{{{ .Role }}}}{between}{{{{ .Content }}}}{closer}"
    return f"{{{{- range .Messages }}}}{turn}{{{{ end }}}}{opener}assistant{between}"


def _asked(
    question: tuple[str, str], answer: tuple[str, str], last: str = ""
) -> Callable[[Sequence[Turn]], str]:
    """System text stands at the head of the question after it."""

    def render(turns: Sequence[Turn]) -> str:
        text, system = "", ""
        for turn in turns:
            if turn["role"] == "system":
                system = turn["content"] + "\n\n"
                continue
            head, tail = question if turn["role"] == "user" else answer
            text += f"{head}{system}{turn['content']}{tail}"
            system = ""
        return text + last

    return render


def _asked_template(question: tuple[str, str], answer: tuple[str, str], last: str = "") -> str:
    return (
        "{{- $told := false }}{{ range .Messages }}"
        f'{{{{ if eq .Role "system" }}}}{question[0]}{{{{ .Content }}}}\n\n{{{{ $told = true }}}}'
        f'{{{{ else if eq .Role "user" }}}}{{{{ if not $told }}}}{question[0]}{{{{ end }}}}'
        f"{{{{ $told = false }}}}{{{{ .Content }}}}{question[1]}"
        f"{{{{ else }}}}{answer[0]}{{{{ .Content }}}}{answer[1]}{{{{ end }}}}{{{{ end }}}}{last}"
    )


_CHATML = ("<|im_start|>", "\n", "<|im_end|>\n")
_LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>")
_GEMMA = (
    ("<start_of_turn>user\n", "<end_of_turn>\n"),
    ("<start_of_turn>model\n", "<end_of_turn>\n"),
    "<start_of_turn>model\n",
)
_MISTRAL = ("[INST] ", "[/INST]"), (" ", "</s>")

FORMATS = (
    ChatFormat("ChatML", _turns(*_CHATML), _turns_template(*_CHATML), "<|im_end|>"),
    ChatFormat("Llama 3", _turns(*_LLAMA3), _turns_template(*_LLAMA3), "<|eot_id|>"),
    ChatFormat("Gemma", _asked(*_GEMMA), _asked_template(*_GEMMA), "<end_of_turn>"),
    ChatFormat("Mistral", _asked(*_MISTRAL), _asked_template(*_MISTRAL), "</s>"),
)
"""What is recognised; of Mistral's versions, which differ in spaces, that of 7B v0.3."""

_SYSTEM = {"role": "system", "content": "Zebra rules."}
_QUESTION = {"role": "user", "content": "What is 2 + 2?"}
_ANSWER = {"role": "assistant", "content": "It is 4."}
_AGAIN = {"role": "user", "content": "And 3 + 3?"}
PROBES = ((_QUESTION,), (_QUESTION, _ANSWER, _AGAIN))
"""Conversations any template renders; a system turn is tried besides."""


def recognise(tokenizer: PreTrainedTokenizerBase) -> Recognised | None:
    """The format of the model's chat template; None where it is not known or there is none.

    Args:
        tokenizer: with its chat template.
    """
    if not tokenizer.chat_template:
        return None
    found = [_render(tokenizer, probe) for probe in PROBES]
    told = _render(tokenizer, (_SYSTEM, _QUESTION))
    if any(text is None for text in found):
        return None
    bos = tokenizer.bos_token or ""
    # A template may open with BOS, and BOS may be what opens a turn: first as it is, then without.
    for opener in dict.fromkeys(("", bos)):
        texts = [_without(text, opener) for text in found]
        system_text = _without(told, opener)
        for known in FORMATS:
            match = _match(known, texts, system_text)
            if match is not None:
                ids = tokenizer("a")["input_ids"]
                added = bool(ids) and ids[0] == tokenizer.bos_token_id
                return Recognised(known, match, "" if added else opener)
    return None


def _render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn]) -> str | None:
    try:
        return str(
            tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
        )
    except (jinja2.TemplateError, ValueError, TypeError):  # it refuses such a conversation
        return None


def _without(text: str | None, opener: str) -> str | None:
    if text is None or not text.startswith(opener):
        return None
    return text.removeprefix(opener)


def _match(known: ChatFormat, texts: Sequence[str | None], told: str | None) -> str | None:
    """The system text that makes a format write the same; None where none does."""
    if told is not None and told != known.render((_SYSTEM, _QUESTION)):
        return None
    for system in ("", _default_system(known, texts[0])):
        first = [{"role": "system", "content": system}] if system else []
        if all(
            text == known.render([*first, *probe])
            for text, probe in zip(texts, PROBES, strict=True)
        ):
            return system
    return None


def _default_system(known: ChatFormat, text: str | None) -> str:
    """What stands in the system turn of a text that was given none."""
    before, _, after = known.render((_SYSTEM, _QUESTION)).partition(_SYSTEM["content"])
    if text is None or not (text.startswith(before) and text.endswith(after)):
        return ""
    return text[len(before) : len(text) - len(after)]


def write_modelfile(gguf_name: str, found: Recognised | None, stops: Sequence[str]) -> str:
    """The text of a Modelfile.

    Args:
        gguf_name: of the file beside it.
        found: the format of the chat template; None leaves TEMPLATE out.
        stops: texts that end an answer; the format's own is added.
    """
    lines = [f"FROM ./{gguf_name}"]
    every = list(stops)
    if found is not None:
        lines.append(f'TEMPLATE """{found.bos}{found.format.template}"""')
        if found.system:
            lines.append(f'SYSTEM """{found.system}"""')
        every.append(found.format.stop)
    quoted = (text.replace("\\", "\\\\").replace('"', '\\"') for text in dict.fromkeys(every))
    lines += [f'PARAMETER stop "{text}"' for text in quoted]
    return "\n".join(lines) + "\n"
