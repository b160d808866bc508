"""Examples -> documents: token ids and the mask of trained tokens.

One batched pass of the tokenizer over whole texts; `masks.py` carries the mask over from
characters to tokens, `branches.py` finds where two answers part. Here is what is dropped and
counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from alignkit.data.branches import branch_labelled, branch_pair, fit_branches
from alignkit.data.documents import Branch, TokenizedDocument
from alignkit.data.formats import Completion, Conversation, Example, parse_answers
from alignkit.data.masks import Masker, Rendered, TokenizedRow
from alignkit.data.preferences import Labelled, Pair, Unusable, parse_labelled, parse_pairs
from alignkit.data.report import DataReport
from alignkit.data.sources import Row
from alignkit.data.templates import ChatTemplate, Span
from alignkit.data.texts import PLAIN_TEXT, encode_texts, note_doubts, special_tokens
from alignkit.errors import DataError

TooLong = Literal["drop", "truncate_left", "truncate_right", "error"]
TrainOn = Literal["completions", "last_turn", "everything"]
RowKind = Literal["answers", "pairs", "labelled"]

_BATCH = 1000


@dataclass(frozen=True)
class TokenizeSettings:
    """How rows become tokens.

    Args:
        max_length: longest row in tokens.
        too_long: what happens to longer ones.
        train_on: which tokens carry loss; pairs and labelled rows train their answers.
        rows: what a row is: one answer, a pair of answers, or a labelled answer.
    """

    max_length: int
    too_long: TooLong
    train_on: TrainOn = "completions"
    rows: RowKind = "answers"


AnyExample = Example | Pair | Labelled | Unusable


def parse_rows(rows: list[Row], row_format: str, kind: RowKind) -> list[AnyExample]:
    """Every row as an example of the wanted kind.

    Args:
        rows: of one source, at least one.
        row_format: a format that has this kind, or `auto`.
        kind: what the stage trains on.

    Raises:
        DataError: a row does not fit.
    """
    if kind == "pairs":
        return list(parse_pairs(rows, row_format))
    if kind == "labelled":
        return list(parse_labelled(rows, row_format))
    return list(parse_answers(rows, row_format))


def tokenize_examples(
    examples: Sequence[AnyExample], tokenizer: Any, settings: TokenizeSettings
) -> tuple[list[TokenizedDocument], DataReport]:
    """Tokens and mask of every row that can be trained on.

    Args:
        examples: parsed rows, all of one kind.
        tokenizer: a transformers tokenizer with its chat template set.
        settings: lengths and mask.

    Returns:
        The rows in order, without the dropped ones, and the counts of what happened.

    Raises:
        DataError: a row is too long under `too_long: error`, or the template refuses it.
        ModelError: conversations without a chat template, or a tokenizer without offsets.
    """
    report = DataReport(rows=len(examples))
    texts = [text for example in examples for text in _texts(example)]
    masked = iter(_mask_texts(texts, tokenizer, settings, report))
    documents: list[TokenizedDocument] = []
    for example in examples:
        rows = [next(masked) for _ in _texts(example)]
        document = _document(example, rows, tokenizer, settings, report)
        if document is not None:
            documents.append(document)
    report.kept = len(documents)
    for document in documents:
        report.tokens += len(document.prompt) + sum(len(b.ids) for b in document.branches)
        report.trained_tokens += sum(int(b.trained.sum()) for b in document.branches)
    return documents, report


def _texts(example: AnyExample) -> list[Example]:
    """The texts that the model would read for one row."""
    if isinstance(example, Unusable):
        return []
    if isinstance(example, Pair):
        return [example.chosen, example.rejected]
    return [example.example] if isinstance(example, Labelled) else [example]


def _document(
    example: AnyExample,
    rows: list[TokenizedRow],
    tokenizer: Any,
    settings: TokenizeSettings,
    report: DataReport,
) -> TokenizedDocument | None:
    """The document of one row; None if it is dropped, which is counted."""
    if isinstance(example, Unusable):
        report.drop(example.reason, example.place)
        return None
    if not isinstance(example, Pair | Labelled):
        fitted = _fit(rows[0], settings, tokenizer, report)
        if fitted is None:
            return None
        return TokenizedDocument(
            np.zeros(0, np.int32), (Branch(fitted.ids, fitted.trained),), fitted.place
        )
    if not all(row.trained.any() for row in rows):
        report.drop("nothing to train on", example.place)
        return None
    if tokenizer.chat_template and isinstance(_texts(example)[0], Completion):
        report.note(PLAIN_TEXT, example.place)
    if isinstance(example, Pair):
        document = branch_pair(rows[0], rows[1], example.margin)
        if np.array_equal(document.branches[0].ids, document.branches[1].ids):
            report.drop("the two answers are equal", example.place)
            return None
    else:
        document = branch_labelled(rows[0], desirable=example.desirable)
    return fit_branches(
        document, settings.max_length, settings.too_long, tokenizer.bos_token_id, report
    )


def _mask_texts(
    texts: list[Example], tokenizer: Any, settings: TokenizeSettings, report: DataReport
) -> list[TokenizedRow]:
    """Every text as tokens with its mask, whatever its length."""
    template = ChatTemplate(tokenizer) if any(isinstance(t, Conversation) for t in texts) else None
    specials = special_tokens(tokenizer)
    masker = Masker(
        special_ids=set(specials.values()),
        eos=tokenizer.eos_token_id,
        everything=settings.train_on == "everything",
        report=report,
    )
    rows: list[TokenizedRow] = []
    for start in range(0, len(texts), _BATCH):
        batch = texts[start : start + _BATCH]
        rendered = [_render(text, tokenizer, template, settings) for text in batch]
        for text, item in zip(batch, rendered, strict=True):
            note_doubts(text, item.text, specials, template, report)
            if isinstance(text, Conversation) and text.messages[-1].role != "assistant":
                report.note("the last turn is not the assistant's; it is not trained", text.place)
        encoded = encode_texts(rendered, tokenizer)
        rows += [masker.mask(item, tokens) for item, tokens in zip(rendered, encoded, strict=True)]
    report.stop_tokens = sorted(masker.stop_tokens)
    return rows


def _render(
    example: Example, tokenizer: Any, template: ChatTemplate | None, settings: TokenizeSettings
) -> Rendered:
    if isinstance(example, Completion):
        eos = tokenizer.eos_token or ""
        end = "" if example.completion.endswith(eos) else eos
        text = example.prompt + example.completion + end
        return Rendered(text, [Span(len(example.prompt), len(text))], example.place, False)
    assert template is not None
    if settings.train_on == "everything":
        text = template.render(template.messages(example), example)
        return Rendered(text, [Span(0, len(text))], example.place, True)
    last_only = settings.train_on == "last_turn"
    if template.has_markers and not last_only:
        text, mask = _render_markers(example, template)
        wanted = tuple(turn.trained for turn in example.messages if turn.role == "assistant")
        return Rendered(text, [], example.place, True, mask, wanted)
    text, spans = template.spans(example, last_only=last_only)
    return Rendered(text, spans, example.place, True)


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


def _fit(
    row: TokenizedRow, settings: TokenizeSettings, tokenizer: Any, report: DataReport
) -> TokenizedRow | None:
    length, limit = len(row.ids), settings.max_length
    report.measure(length, row.place)
    if not row.trained.any():
        report.drop("nothing to train on", row.place)
        return None
    if length <= limit:
        return row
    if settings.too_long == "error":
        raise DataError(
            f"{row.place}: the row has {length} tokens, more than data.max_length = {limit}",
            hint="raise data.max_length, shorten the row, or choose another data.too_long",
        )
    if settings.too_long == "drop":
        report.drop(f"longer than max_length = {limit} tokens", row.place)
        return None
    if settings.too_long == "truncate_right":
        ids, trained = row.ids[:limit], row.trained[:limit]
        lost_end = bool(row.trained[limit:].any())
    else:
        has_bos = int(row.ids[0]) == tokenizer.bos_token_id
        head, rest = int(has_bos), limit - int(has_bos)
        ids = np.concatenate([row.ids[:head], row.ids[-rest:]])
        trained = np.concatenate([row.trained[:head], row.trained[-rest:]])
        trained[0] = False
        lost_end = False
    if not trained.any():
        report.drop(f"the prompt alone fills max_length = {limit} tokens", row.place)
        return None
    report.truncate(row.place, lost_end=lost_end)
    return TokenizedRow(ids, trained, row.place)
