"""A Modelfile for Ollama: the chat template in Ollama's language, and where a response stops.

The chat template is recognised by what it writes. It renders probe conversations, and a format is
accepted only if it writes the same characters for all of them; otherwise the Modelfile has no
TEMPLATE and the user is told.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from alignkit.rendering import RenderingError, render_chat

Turn = dict[str, str]


@dataclass(frozen=True)
class ChatFormat:
    """One way to write a conversation.

    Args:
        name: display name.
        render: turns -> text up to where the next response starts, without BOS.
        template: the same in Ollama's language.
        stop: text that ends a response.
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
        system: text that the template puts first if there is no system turn.
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
    user: tuple[str, str], assistant: tuple[str, str], last: str = ""
) -> Callable[[Sequence[Turn]], str]:
    """System text goes at the start of the user turn after it."""

    def render(turns: Sequence[Turn]) -> str:
        text, system = "", ""
        for turn in turns:
            if turn["role"] == "system":
                system = turn["content"] + "\n\n"
                continue
            head, tail = user if turn["role"] == "user" else assistant
            text += f"{head}{system}{turn['content']}{tail}"
            system = ""
        return text + last

    return render


def _asked_template(user: tuple[str, str], assistant: tuple[str, str], last: str = "") -> str:
    return (
        "{{- $told := false }}{{ range .Messages }}"
        f'{{{{ if eq .Role "system" }}}}{user[0]}{{{{ .Content }}}}\n\n{{{{ $told = true }}}}'
        f'{{{{ else if eq .Role "user" }}}}{{{{ if not $told }}}}{user[0]}{{{{ end }}}}'
        f"{{{{ $told = false }}}}{{{{ .Content }}}}{user[1]}{{{{ else }}}}"
        f"{assistant[0]}{{{{ .Content }}}}{assistant[1]}{{{{ end }}}}{{{{ end }}}}{last}"
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
"""What is recognised; Mistral's versions differ in spaces, and this one is that of 7B v0.3."""

_SYSTEM = {"role": "system", "content": "Zebra rules."}
_QUESTION = {"role": "user", "content": "What is 2 + 2?"}
_ANSWER = {"role": "assistant", "content": "It is 4."}
_AGAIN = {"role": "user", "content": "And 3 + 3?"}
PROBES = ((_QUESTION,), (_QUESTION, _ANSWER, _AGAIN))
"""Conversations that any template renders; one with a system turn is tried too."""


def recognise(tokenizer: PreTrainedTokenizerBase) -> Recognised | None:
    """The format of the model's chat template; None if it is not known or there is none.

    Args:
        tokenizer: with its chat template.
    """
    if not tokenizer.chat_template:
        return None
    rendered = [_render(tokenizer, probe) for probe in PROBES]
    with_system = _render(tokenizer, (_SYSTEM, _QUESTION))
    if any(text is None for text in rendered):
        return None
    bos = tokenizer.bos_token or ""
    # A template may open with BOS, and BOS may open a turn: the text is tried with and without it.
    for opener in dict.fromkeys(("", bos)):
        texts = [_without(text, opener) for text in rendered]
        system_text = _without(with_system, opener)
        for known in FORMATS:
            match = _match(known, texts, system_text)
            if match is not None:
                ids = tokenizer("a")["input_ids"]
                added = bool(ids) and ids[0] == tokenizer.bos_token_id
                found = Recognised(known, match, "" if added else opener)
                return found if _can_be_quoted(found) else None
    return None


def _can_be_quoted(found: Recognised) -> bool:
    """Whether a Modelfile can hold the model's own texts: none ends its quotation."""
    inside = re.search(r'["{]', found.bos) or '"""' in found.system or found.system.endswith('"')
    return not inside


def _render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn]) -> str | None:
    try:
        return render_chat(tokenizer, turns, add_generation_prompt=True)
    except RenderingError:
        return None


def _without(text: str | None, opener: str) -> str | None:
    if text is None or not text.startswith(opener):
        return None
    return text.removeprefix(opener)


def _match(known: ChatFormat, texts: Sequence[str | None], with_system: str | None) -> str | None:
    """The system text that makes a format write the same; None if none does."""
    if with_system is not None and with_system != known.render((_SYSTEM, _QUESTION)):
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
    """The system text that a template wrote without being given one."""
    before, _, after = known.render((_SYSTEM, _QUESTION)).partition(_SYSTEM["content"])
    if text is None or not (text.startswith(before) and text.endswith(after)):
        return ""
    return text[len(before) : len(text) - len(after)]


def write_modelfile(gguf_name: str, chat: Recognised | None, stops: Sequence[str]) -> str:
    """The text of a Modelfile.

    Args:
        gguf_name: name of the GGUF file next to it.
        chat: the format of the chat template; None leaves TEMPLATE out.
        stops: texts that end a response; the format's own is added.
    """
    lines = [f"FROM ./{gguf_name}"]
    every = list(stops)
    if chat is not None:
        lines.append(f'TEMPLATE """{chat.bos}{chat.format.template}"""')
        if chat.system:
            lines.append(f'SYSTEM """{chat.system}"""')
        every.append(chat.format.stop)
    stops = [text for text in dict.fromkeys(every) if not ('"' in text and "\n" in text)]
    if len(stops) < len(set(every)):  # Ollama would read the rest as an instruction
        lines.append("# a stop text with quotes and line breaks is left out")
    quoted = (text.replace("\\", "\\\\").replace('"', '\\"') for text in stops)
    lines += [f'PARAMETER stop "{text}"' for text in quoted]
    return "\n".join(lines) + "\n"
