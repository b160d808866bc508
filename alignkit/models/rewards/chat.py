"""How a classifier reads a chat: where its text ends, and which token pads rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignkit.rendering import render_chat


def choose_padding(tokenizer: PreTrainedTokenizerBase, stop_tokens: Sequence[int]) -> str | None:
    """A special token that neither ends a completion nor occurs in a chat.

    Args:
        tokenizer: with its chat template.
        stop_tokens: ids that end a completion.
    """
    used = {tokenizer.eos_token, tokenizer.bos_token, *tokenizer.convert_ids_to_tokens(stop_tokens)}
    template = str(tokenizer.chat_template or "")
    own = [tokenizer.pad_token, tokenizer.unk_token]
    others = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    for token in [*own, *others]:
        if token is not None and token not in used and token not in template:
            return str(token)
    return None


def missing_end(tokenizer: PreTrainedTokenizerBase, stop_tokens: Sequence[int]) -> str:
    """EOS if completions were trained to end with it and the chat template does not write it."""
    stops = tokenizer.convert_ids_to_tokens(list(stop_tokens))
    if not tokenizer.chat_template or tokenizer.eos_token not in stops:
        return ""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = render_chat(tokenizer, turns).rstrip()
    return "" if text.endswith(tuple(stops)) else str(tokenizer.eos_token)


def end_at_turn(template: str | dict[str, str] | None, tail: str = "") -> Any:
    """A chat template whose text ends with the last turn's last token, not with a line break.

    Args:
        template: Jinja source, or several by name; None if there is none.
        tail: written after that.
    """
    if template is None:
        return None
    if isinstance(template, dict):
        return {name: end_at_turn(text, tail) for name, text in template.items()}
    end = f" ~ {json.dumps(tail)}" if tail else ""
    return f"{{%- set whole -%}}{template}{{%- endset -%}}{{{{- whole.rstrip(){end} -}}}}"
