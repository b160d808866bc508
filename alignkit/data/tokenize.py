"""Examples -> token ids and the mask of trained tokens.

One batched pass of the tokenizer over whole texts; the mask is carried over from characters to
tokens by their offsets. A token that stands across the border of an answer counts as part of it.
After the end-of-turn token nothing is trained: the line break that many templates put there is
never generated.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from alignkit.data.formats import Completion, Conversation, Example
from alignkit.data.report import DataReport
from alignkit.data.templates import ChatTemplate, Span, is_written
from alignkit.errors import DataError, ModelError

TooLong = Literal["drop", "truncate_left", "truncate_right", "error"]
TrainOn = Literal["completions", "last_turn", "everything"]

PLACEHOLDER = re.compile(r"\{\{\s*[A-Za-z_][\w .-]{0,40}\s*\}\}")
_BATCH = 1000


@dataclass(frozen=True)
class TokenizeSettings:
    """How rows become tokens.

    Args:
        max_length: longest row in tokens.
        too_long: what happens to longer ones.
        train_on: which tokens carry loss.
    """

    max_length: int
    too_long: TooLong
    train_on: TrainOn


@dataclass(frozen=True)
class TokenizedRow:
    """One row as tokens.

    Args:
        ids: `[n]` token ids.
        trained: `[n]` True where the token is a target; never at position 0.
        place: `file:line`.
    """

    ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    place: str


@dataclass(frozen=True)
class _Rendered:
    text: str
    spans: list[Span]
    place: str
    is_chat: bool
    mask: list[int] | None = None
    marked_turns: tuple[bool, ...] = ()  # of a mask: whether each assistant turn is wanted


def tokenize_examples(
    examples: list[Example], tokenizer: Any, settings: TokenizeSettings
) -> tuple[list[TokenizedRow], DataReport]:
    """Tokens and mask of every row that can be trained on.

    Args:
        examples: parsed rows.
        tokenizer: a transformers tokenizer with its chat template set.
        settings: lengths and mask.

    Returns:
        The rows in order, without the dropped ones, and the counts of what happened.

    Raises:
        DataError: a row is too long under `too_long: error`, or the template refuses it.
        ModelError: conversations without a chat template, or a tokenizer without offsets.
    """
    report = DataReport(rows=len(examples))
    template = (
        ChatTemplate(tokenizer) if any(isinstance(e, Conversation) for e in examples) else None
    )
    specials = _special_tokens(tokenizer)
    rows: list[TokenizedRow] = []
    for start in range(0, len(examples), _BATCH):
        batch = examples[start : start + _BATCH]
        rendered = [_render(example, tokenizer, template, settings) for example in batch]
        for example, item in zip(batch, rendered, strict=True):
            _inspect_text(example, item.text, specials, template, report)
        for row in _encode(rendered, tokenizer, settings, set(specials.values()), report):
            fitted = _fit(row, settings, tokenizer, report)
            if fitted is not None:
                rows.append(fitted)
    report.kept = len(rows)
    report.tokens = sum(len(row.ids) for row in rows)
    report.trained_tokens = sum(int(row.trained.sum()) for row in rows)
    return rows, report


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """Text -> id of every token that the tokenizer never splits and marks as special."""
    added = {
        token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def _inspect_text(
    example: Example,
    rendered: str,
    specials: dict[str, int],
    template: ChatTemplate | None,
    report: DataReport,
) -> None:
    if isinstance(example, Completion):
        texts = [example.prompt, example.completion.rstrip()]
    else:
        texts = [message.content for message in example.messages]
        assert template is not None
        if template.flattens(example):
            report.note("tool calls written as text: the template has none", example.place)
        if not all(is_written(turn, rendered) for turn in template.messages(example)):
            report.note("the template leaves out or changes what a turn says", example.place)
        if example.messages[-1].role != "assistant":
            report.note("the last turn is not the assistant's; it is not trained", example.place)
    text = "\n".join(texts)
    found = PLACEHOLDER.search(text)
    if found:
        report.note(f"placeholder left in the text: {found.group(0)}", example.place)
    if isinstance(example, Conversation) and any(special in text for special in specials):
        report.note("the text holds special tokens of this tokenizer", example.place)


def _render(
    example: Example, tokenizer: Any, template: ChatTemplate | None, settings: TokenizeSettings
) -> _Rendered:
    if isinstance(example, Completion):
        eos = tokenizer.eos_token or ""
        end = "" if example.completion.endswith(eos) else eos
        text = example.prompt + example.completion + end
        return _Rendered(text, [Span(len(example.prompt), len(text))], example.place, False)
    assert template is not None
    if settings.train_on == "everything":
        text = template.render(template.messages(example), example)
        return _Rendered(text, [Span(0, len(text))], example.place, True)
    last_only = settings.train_on == "last_turn"
    if template.has_markers and not last_only:
        text, mask = _render_markers(example, template)
        wanted = tuple(turn.trained for turn in example.messages if turn.role == "assistant")
        return _Rendered(text, [], example.place, True, mask, wanted)
    text, spans = template.spans(example, last_only=last_only)
    return _Rendered(text, spans, example.place, True)


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


def _encode(
    rendered: list[_Rendered],
    tokenizer: Any,
    settings: TokenizeSettings,
    special_ids: set[int],
    report: DataReport,
) -> list[TokenizedRow]:
    encoded: dict[int, tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]] = {}
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
                ids, offsets = ids[:-1], offsets[:-1]  # the tokenizer adds EOS to ours
            encoded[number] = (ids, offsets + removed)
    stops = _Stops(special_ids, set(report.stop_tokens))
    rows = [
        _mask(item, *encoded[n], tokenizer, settings, stops, report)
        for n, item in enumerate(rendered)
    ]
    report.stop_tokens = sorted(stops.seen)
    return rows


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


@dataclass
class _Stops:
    special: set[int]
    seen: set[int]


def _mask(
    item: _Rendered,
    ids: npt.NDArray[np.int32],
    offsets: npt.NDArray[np.int64],
    tokenizer: Any,
    settings: TokenizeSettings,
    stops: _Stops,
    report: DataReport,
) -> TokenizedRow:
    everything = settings.train_on == "everything"
    marked = item.mask is not None
    if marked:
        runs = _marked_runs(item, len(ids))
    else:
        runs = [_token_run(offsets, span) for span in item.spans]
    trained = np.full(len(ids), everything)
    stopped = False
    for begin, end in runs:
        end, stopped = _trim(ids, offsets, item.text, begin, end, stops.special, marked)
        trained[begin:end] = True
        if stopped:
            stops.seen.add(int(ids[end - 1]))
    eos = tokenizer.eos_token_id
    if item.is_chat and runs and not stopped and eos is not None and runs[-1][1] >= len(ids):
        ids, trained = np.append(ids, np.int32(eos)), np.append(trained, True)
        stops.seen.add(int(eos))
        report.note("the template ends no turn with a stop token; EOS was appended", item.place)
    elif runs and not stopped:
        report.note("no stop token after the last answer: it does not teach to stop", item.place)
    trained[:1] = False
    return TokenizedRow(ids, trained, item.place)


def _marked_runs(item: _Rendered, length: int) -> list[tuple[int, int]]:
    """Token runs between the template's generation markers, of the wanted turns."""
    if len(item.mask or []) != length:
        raise DataError(f"{item.place}: the template's generation markers do not fit the tokens")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(item.mask, bool), [0]])))
    runs = [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    if all(item.marked_turns):
        return runs
    if len(runs) != len(item.marked_turns):
        raise DataError(
            f"{item.place}: the template marks {len(runs)} runs of generated tokens for "
            f"{len(item.marked_turns)} assistant turns, so single turns cannot be left out",
            hint="choose a template without markers (model.chat_template)",
        )
    return [run for run, wanted in zip(runs, item.marked_turns, strict=True) if wanted]


def _token_run(offsets: npt.NDArray[np.int64], span: Span) -> tuple[int, int]:
    """First and one past the last token that hold a character of the span."""
    inside = (offsets[:, 1] > span.begin) & (offsets[:, 0] < span.end)
    positions = np.flatnonzero(inside)
    return (int(positions[0]), int(positions[-1]) + 1) if len(positions) else (0, 0)


def _trim(
    ids: npt.NDArray[np.int32],
    offsets: npt.NDArray[np.int64],
    text: str,
    begin: int,
    end: int,
    special_ids: set[int],
    from_markers: bool,
) -> tuple[int, bool]:
    """End of the turn: one past its end-of-turn token, and whether there is one."""
    last = end
    while last > begin and int(ids[last - 1]) not in special_ids:
        start, stop = offsets[last - 1]
        if text[start:stop].strip():
            break
        last -= 1
    if last > begin and int(ids[last - 1]) in special_ids:
        return last, True
    if from_markers and begin < end < len(ids) and int(ids[end]) in special_ids:
        return end + 1, True  # markers often close before the end-of-turn token
    return end, False


def _fit(
    row: TokenizedRow, settings: TokenizeSettings, tokenizer: Any, report: DataReport
) -> TokenizedRow | None:
    length, limit = len(row.ids), settings.max_length
    report.lengths.append(length)
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
    report.truncated += 1
    report.lost_ends += lost_end
    return TokenizedRow(ids, trained, row.place)
