"""Examples -> documents: token ids and the mask of trained tokens.

One batched pass of the tokenizer over whole texts; `masks.py` carries the mask over from
characters to tokens, `branches.py` finds where two completions diverge and cuts what is too long.
This module drops rows and counts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from alignkit.data.branches import are_equal, fit, share_prompt
from alignkit.data.documents import Branch, Document
from alignkit.data.examples import Example, RowKind
from alignkit.data.formats import Completion, Conversation, Text
from alignkit.data.masks import Masker, Rendered
from alignkit.data.report import DataReport
from alignkit.data.templates import ChatTemplate
from alignkit.data.texts import PLAIN_TEXT, encode_texts, note_doubts, special_tokens

TooLong = Literal["drop", "truncate_left", "truncate_right", "error"]
TrainOn = Literal["completions", "last_turn", "everything"]

_BATCH = 1000


@dataclass(frozen=True)
class TokenizeSettings:
    """How rows become tokens.

    Args:
        max_length: longest row in tokens.
        too_long: what happens to longer ones.
        train_on: which tokens carry loss; pairs and labelled rows train their completions.
        rows: what a row is: one completion, a pair of them, or a labelled one.
    """

    max_length: int
    too_long: TooLong
    train_on: TrainOn = "completions"
    rows: RowKind = "answers"


def tokenize_examples(
    examples: Sequence[Example], tokenizer: Any, settings: TokenizeSettings
) -> tuple[list[Document], DataReport]:
    """Tokens and mask of every row that can be trained on.

    Args:
        examples: parsed rows, all of one kind.
        tokenizer: a transformers tokenizer with its chat template set.
        settings: lengths and mask.

    Returns:
        The rows in order, without the dropped ones, each with its index in `examples`, and the
        counts of what happened.

    Raises:
        DataError: a row is too long under `too_long: error`, or the template refuses it.
        ModelError: conversations without a chat template, or a tokenizer without offsets.
    """
    report = DataReport(rows=len(examples))
    texts = [text for example in examples for text in example.texts]
    masked = iter(_mask_texts(texts, tokenizer, settings, report))
    documents: list[Document] = []
    for row, example in enumerate(examples):
        own = [next(masked) for _ in example.texts]
        document = _document(row, example, own, tokenizer, settings, report)
        if document is not None:
            documents.append(document)
            report.tokens += document.num_tokens
            report.trained_tokens += sum(int(b.trained.sum()) for b in document.branches)
    report.kept = len(documents)
    return documents, report


def _document(
    row: int,
    example: Example,
    texts: list[Branch],
    tokenizer: Any,
    settings: TokenizeSettings,
    report: DataReport,
) -> Document | None:
    """The document of one row; None if it is dropped, which is counted."""
    place, single = example.place, settings.rows == "answers"
    if example.unusable:
        report.drop(example.unusable, place)
        return None
    if not all(text.trained.any() for text in texts):
        if single:
            report.measure(len(texts[0].ids), place)
        report.drop("nothing to train on", place)
        return None
    if single:  # a row may train several turns, so no prompt is split off
        document = Document(np.zeros(0, np.int32), tuple(texts), row)
    else:
        if tokenizer.chat_template and isinstance(example.texts[0], Completion):
            report.note(PLAIN_TEXT, place)
        document = share_prompt(texts, example.roles, row, example.margin)
        if are_equal(document.branches):
            report.drop("the two answers are equal", place)
            return None
    bos = tokenizer.bos_token_id
    return fit(document, place, settings.max_length, settings.too_long, bos, report)


def _mask_texts(
    texts: list[Text], tokenizer: Any, settings: TokenizeSettings, report: DataReport
) -> list[Branch]:
    """Every text as tokens with its mask, whatever its length."""
    template = ChatTemplate(tokenizer) if any(isinstance(t, Conversation) for t in texts) else None
    specials = special_tokens(tokenizer)
    masker = Masker(
        special_ids=set(specials.values()),
        eos=tokenizer.eos_token_id,
        everything=settings.train_on == "everything",
        report=report,
    )
    masked: list[Branch] = []
    for start in range(0, len(texts), _BATCH):
        batch = texts[start : start + _BATCH]
        rendered = [_render(text, tokenizer, template, settings) for text in batch]
        for text, item in zip(batch, rendered, strict=True):
            note_doubts(text, item.text, specials, template, report)
            if isinstance(text, Conversation) and text.messages[-1].role != "assistant":
                report.note("the last turn is not the assistant's; it is not trained", text.place)
        encoded = encode_texts(rendered, tokenizer)
        masked += [masker.mask(item, *t) for item, t in zip(rendered, encoded, strict=True)]
    report.stop_tokens = sorted(masker.stop_tokens)
    return masked


def _render(
    text: Text, tokenizer: Any, template: ChatTemplate | None, settings: TokenizeSettings
) -> Rendered:
    if isinstance(text, Completion):
        eos = tokenizer.eos_token or ""
        end = "" if text.completion.endswith(eos) else eos
        full = text.prompt + text.completion + end
        return Rendered(full, [(len(text.prompt), len(full))], text.place, False)
    assert template is not None
    if settings.train_on == "everything":
        full = template.render(template.messages(text), text)
        return Rendered(full, [(0, len(full))], text.place, True)
    last_only = settings.train_on == "last_turn"
    if template.has_markers and not last_only:
        full, mask = _render_markers(text, template)
        wanted = tuple(turn.trained for turn in text.messages if turn.role == "assistant")
        return Rendered(full, [], text.place, True, mask, wanted)
    full, spans = template.spans(text, last_only=last_only)
    return Rendered(full, spans, text.place, True)


def _render_markers(example: Conversation, template: ChatTemplate) -> tuple[str, list[int]]:
    """Text and token mask of a template that marks what the assistant generates."""
    output = template.tokenizer.apply_chat_template(
        template.messages(example),
        tools=list(example.tools) or None if template.knows_tools else None,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    text = template.render(template.messages(example), example)
    return text, list(output["assistant_masks"])
