"""Texts -> token ids, and what looks wrong in them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from alignkit.data.documents import IdArray
from alignkit.data.formats import Completion, Conversation, Text
from alignkit.data.masks import Offsets, Rendered
from alignkit.data.report import DataReport
from alignkit.data.templates import ChatTemplate, is_written
from alignkit.errors import ModelError

PLACEHOLDER = re.compile(r"\{\{\s*[A-Za-z_][\w .-]{0,40}\s*\}\}")
PLAIN_TEXT = "plain text: the model's chat template is not used"


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Text -> id of every token that the tokenizer never splits and marks as special."""
    added = {
        token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def note_doubts(
    text: Text,
    rendered: str,
    specials: dict[str, int],
    template: ChatTemplate | None,
    report: DataReport,
) -> None:
    """Note what looks wrong in a text that is used.

    Args:
        text: of the row.
        rendered: as the model reads it.
        specials: text -> id of the tokenizer's special tokens.
        template: that rendered a conversation.
        report: gets the notes.
    """
    if isinstance(text, Completion):
        parts = [text.prompt, text.completion.rstrip()]
    else:
        parts = [message.content for message in text.messages]
        assert template is not None
        if template.flattens(text):
            report.note("tool calls written as text: the template has none", text.place)
        if not all(is_written(turn, rendered) for turn in template.messages(text)):
            report.note("the template leaves out or changes what a turn says", text.place)
    content = "\n".join(parts)
    placeholder = PLACEHOLDER.search(content)
    if placeholder:
        report.note(f"placeholder left in the text: {placeholder.group(0)}", text.place)
    if isinstance(text, Conversation) and any(special in content for special in specials):
        report.note("the text holds special tokens of this tokenizer", text.place)


def encode_texts(rendered: list[Rendered], tokenizer: Any) -> list[tuple[IdArray, Offsets]]:
    """Ids and character offsets of each text; chats already hold their special tokens.

    Args:
        rendered: texts of chats and plain texts.
        tokenizer: a fast transformers tokenizer.

    Raises:
        ModelError: a tokenizer without offsets.
    """
    encoded: dict[int, tuple[IdArray, Offsets]] = {}
    bos, eos = tokenizer.bos_token, tokenizer.eos_token_id
    for is_chat in (True, False):
        numbers = [n for n, item in enumerate(rendered) if item.is_chat is is_chat]
        if not numbers:
            continue
        texts = [rendered[n].text for n in numbers]
        if not is_chat and bos and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
            texts = [text.removeprefix(bos) for text in texts]
        output = _call(tokenizer, texts, add_special_tokens=not is_chat)
        for position, number in enumerate(numbers):
            removed = len(rendered[number].text) - len(texts[position])
            ids = np.asarray(output["input_ids"][position], np.int32)
            offsets = np.asarray(output["offset_mapping"][position]).reshape(-1, 2)
            if not is_chat and len(ids) and ids[-1] == eos and offsets[-1, 0] == offsets[-1, 1]:
                ids, offsets = ids[:-1], offsets[:-1]  # the tokenizer added EOS to a plain text
            encoded[number] = ids, offsets + removed
    return [encoded[number] for number in range(len(rendered))]


def _call(tokenizer: Any, texts: list[str], *, add_special_tokens: bool) -> Any:
    if not tokenizer.is_fast:
        raise ModelError(
            f"{type(tokenizer).__name__} has no character offsets, which the prompt mask needs",
            hint="save the tokenizer as a fast one (tokenizer.json) and name that folder",
        )
    return tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
