"""Examples -> documents: token ids and the mask of trained tokens.

One batched pass of the tokenizer over whole texts; `masks.py` carries the mask over from
characters to tokens, `branches.py` finds where two completions diverge and cuts what is too long.
This module drops rows and counts them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from alignkit.data.branches import are_equal, fit, share_prompt
from alignkit.data.documents import Branch, Document
from alignkit.data.examples import Example, RowKind
from alignkit.data.formats import Completion, Conversation, Text
from alignkit.data.masks import Masker, Rendered
from alignkit.data.report import DataReport
from alignkit.data.spans import RenderedTurns
from alignkit.data.templates import ChatTemplate
from alignkit.data.texts import PLAIN_TEXT, encode_texts, note_bos, note_doubts, special_tokens
from alignkit.data.turns import Message
from alignkit.errors import DataError

TooLong = Literal["drop", "truncate_left", "truncate_right", "error"]
TrainOn = Literal["completions", "last_turn", "everything"]

UNKNOWN = "trained tokens are unknown to the tokenizer"

_BATCH = 1000
_FAR, _SMALL = 1000, 1_000_000
"""Characters that no token has, and characters that are always tokenized."""


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
    examples = [_bounded(example, settings) for example in examples]
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


def _bounded(example: Example, settings: TokenizeSettings) -> Example:
    """The example, unusable if its text is so long that even to tokenize it would take gigabytes.

    Raises:
        DataError: it is, and rows that are too long are not dropped.
    """
    longest = max((text.num_characters for text in example.texts), default=0)
    if longest <= max(_FAR * settings.max_length, _SMALL):
        return example
    limit = f"max_length = {settings.max_length} tokens"
    if settings.too_long == "drop":
        return replace(example, texts=(), roles=(), unusable=f"far longer than {limit}")
    raise DataError(
        f"{example.place}: the row has {longest:,} characters, far more than data.{limit} can hold",
        hint="split the row, or set data.too_long: drop",
    )


def probe_template(tokenizer: Any) -> DataReport:
    """What a question with its answer becomes: how answers end, and what is said about it.

    Args:
        tokenizer: a transformers tokenizer.

    Returns:
        A report of no rows; without a chat template, or where it refuses them, an empty one.
    """
    report = DataReport()
    turns = (Message("user", "a"), Message("assistant", "b"))
    if tokenizer.chat_template:
        with contextlib.suppress(DataError):
            texts: list[Text] = [Conversation(turns, (), "")]
            _mask_texts(texts, tokenizer, TokenizeSettings(10**9, "error"), report)
    return report


def answer_ends(tokenizer: Any, trained: Sequence[int] = ()) -> list[int]:
    """Ids that end an answer, wherever one is trained, sampled, merged or exported.

    Args:
        tokenizer: with its chat template.
        trained: ids that ended the answers of rows.

    Returns:
        Those, what ends an assistant's turn in the chat template, and EOS.
    """
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return sorted({*map(int, trained), *probe_template(tokenizer).stop_tokens, *eos})


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
    if example.doubt:
        report.note(example.doubt, place)
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
        note_bos(rendered, [ids for ids, _ in encoded], tokenizer, report)
        for item, (ids, offsets) in zip(rendered, encoded, strict=True):
            masked.append(masker.mask(item, ids, offsets))
            _note_unknown(item, masked[-1], tokenizer, report)
    report.stop_tokens = sorted(masker.stop_tokens)
    return masked


def _note_unknown(item: Rendered, row: Branch, tokenizer: Any, report: DataReport) -> None:
    """Note an answer with characters that the tokenizer cannot write.

    Families without such characters name another token for them: EOS, or one that texts hold.
    """
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown == tokenizer.eos_token_id or tokenizer.unk_token in item.text:
        return
    if (row.ids[row.trained] == unknown).any():
        report.note(UNKNOWN, item.place)


def _render(
    text: Text, tokenizer: Any, template: ChatTemplate | None, settings: TokenizeSettings
) -> Rendered:
    if isinstance(text, Completion):
        eos = tokenizer.eos_token or ""
        end = "" if text.completion.rstrip().endswith(eos) else eos
        full = text.prompt + text.completion + end
        return Rendered(full, [(len(text.prompt), len(full))], text.place, False)
    assert template is not None
    if settings.train_on == "everything":
        rendered = RenderedTurns(template, text)
        left_out = tuple(rendered.left_out())
        whole = [(0, len(rendered.full))]
        return Rendered(rendered.full, whole, text.place, True, left_out=left_out)
    last_only = settings.train_on == "last_turn"
    begun = any(turn.given for turn in text.messages)
    if template.has_markers and not last_only and not begun:
        full, mask = template.marked(text)
        wanted = tuple(
            turn.trained and number >= text.context
            for number, turn in enumerate(text.messages)
            if turn.role == "assistant"
        )
        return Rendered(full, [], text.place, True, mask, wanted)
    rendered = RenderedTurns(template, text)
    return Rendered(rendered.full, rendered.trained(last_only=last_only), text.place, True)
