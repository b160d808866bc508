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
from alignkit.errors import DataError, ModelError

PLACEHOLDER = re.compile(r"\{\{\s*[A-Za-z_][\w .-]{0,40}\s*\}\}")
_MARKS = re.compile(r"<\|(?!endoftext)[A-Za-z_]\w{1,30}\|>|<(?:start|end)_of_turn>|\[/?INST\]")
"""Marks of the usual chat templates, whether or not the tokenizer knows them."""
RENDERED = "the text already holds marks of a chat template"
NO_BOS = (
    "the chat template writes no BOS, which this tokenizer puts before plain text; models that "
    "were trained with one may need it (model.chat_template)"
)
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
        for key in text.left_out:
            report.note(f"`{key}` is left out: plain text has no place for it", text.place)
    else:
        parts = [message.content for message in text.messages]
        assert template is not None
        _note_turns(text, rendered, template, report)
    content = "\n".join(parts)
    placeholder = PLACEHOLDER.search(content)
    if placeholder:
        report.note(f"placeholder left in the text: {placeholder.group(0)}", text.place)
    if isinstance(text, Conversation) and any(special in content for special in specials):
        report.note("the text holds special tokens of this tokenizer", text.place)
    elif _MARKS.search(content):
        report.note(RENDERED, text.place)


def _note_turns(
    text: Conversation, rendered: str, template: ChatTemplate, report: DataReport
) -> None:
    """Note what a conversation has that the template does not write as it is."""
    if template.flattens(text):
        report.note("tool calls written as text: the template has none", text.place)
    if not all(is_written(turn, rendered) for turn in template.messages(text)):
        report.note("the template leaves out or changes what a turn says", text.place)
    keys = {(key, value) for turn in text.messages for key, value in _plain(turn.more)}
    calls = [call for turn in text.messages for call in turn.tool_calls]
    keys |= {(key, value) for call in calls for key, value in _plain(call) if key not in _CALL}
    for key in sorted({key for key, value in keys if not template.hands_on(key, value, rendered)}):
        report.note(f"the template leaves out `{key}` of a turn", text.place)
    if any(turn.is_empty and not turn.given and turn.role != "assistant" for turn in text.messages):
        report.note("a turn is empty", text.place)
    if any(turn.marked and turn.role != "assistant" for turn in text.messages):
        report.note("a turn that is not the assistant's is marked for training", text.place)
    if any(_holds_null(call["function"]["arguments"]) for call in calls):
        report.note("null in the arguments of a tool call is written as it is", text.place)


_CALL = ("type", "function")


def _plain(values: dict[str, Any]) -> list[tuple[str, str | None]]:
    """Keys with the text of their values; None for a value that is not text."""
    return [(key, value if isinstance(value, str) else None) for key, value in values.items()]


def _holds_null(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is None or any(map(_holds_null, inner))


def adds_bos(tokenizer: Any) -> bool:
    """Whether plain text of this tokenizer starts with BOS."""
    return bool(tokenizer.bos_token) and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def note_bos(
    rendered: list[Rendered], ids: list[IdArray], tokenizer: Any, report: DataReport
) -> None:
    """Note the chats that start without the BOS that plain text of the tokenizer has."""
    if not any(item.is_chat for item in rendered) or not adds_bos(tokenizer):
        return
    for item, own in zip(rendered, ids, strict=True):
        if item.is_chat and len(own) and own[0] != tokenizer.bos_token_id:
            report.note(NO_BOS, item.place)


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
        if not is_chat and adds_bos(tokenizer):
            texts = [text.removeprefix(bos) for text in texts]
        for number in numbers:
            _require_characters(rendered[number])
        output = _call(tokenizer, texts, add_special_tokens=not is_chat)
        for position, number in enumerate(numbers):
            removed = len(rendered[number].text) - len(texts[position])
            ids = np.asarray(output["input_ids"][position], np.int32)
            offsets = np.asarray(output["offset_mapping"][position]).reshape(-1, 2)
            if not is_chat and len(ids) and ids[-1] == eos and offsets[-1, 0] == offsets[-1, 1]:
                ids, offsets = ids[:-1], offsets[:-1]  # the tokenizer added EOS to a plain text
            encoded[number] = ids, offsets + removed
    return [encoded[number] for number in range(len(rendered))]


def _require_characters(item: Rendered) -> None:
    """Refuse half characters, which come from the command line; files are checked when read."""
    try:
        item.text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{item.place}: holds half of a character", hint="write it as UTF-8 text"
        ) from None


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
