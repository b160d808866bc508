"""Sources -> prompts: what a policy answers, with all that a reward function may need."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from alignkit.data.dataset import tokenizer_identity
from alignkit.data.documents import Document
from alignkit.data.formats import Completion, Example
from alignkit.data.masks import Rendered
from alignkit.data.prompt_rows import PromptRow, parse_prompts
from alignkit.data.report import DataReport
from alignkit.data.sources import Source, load_source, mix_sources
from alignkit.data.templates import ChatTemplate, written_out
from alignkit.data.texts import PLAIN_TEXT, encode_texts, note_doubts, special_tokens
from alignkit.data.tokenize import TooLong
from alignkit.errors import DataError
from alignkit.recipe.rows import SourceSpec

Turns = list[dict[str, str]]
"""Turns as `{"role", "content"}`; calls of tools are written into the content."""

PROMPT_FORMAT = 1
"""Raised whenever the same rows would become other prompts."""


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Args:
        ids: `[p]` tokens that the model reads, the generation prompt included; at least 1.
        shown: what a reward function gets, never truncated: the plain text, or the turns.
        answer: the row's own answer, the chosen one of a pair; None where it has none, or one
            that is labelled undesirable.
        columns: the row's values, after `columns` renamed them.
        place: `file:line`.
    """

    ids: npt.NDArray[np.int32]
    shown: str | Turns
    answer: str | None
    columns: dict[str, Any]
    place: str


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one epoch.

    Args:
        prompts: in order; prompts of a weight above 1 stand here repeatedly.
        report: what happened on the way.
        fingerprint: hash of the sources' content and of all that made prompts of it.
    """

    prompts: tuple[Prompt, ...]
    report: DataReport
    fingerprint: str

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, item: int) -> Document:
        """A prompt as a document without answers."""
        return Document(self.prompts[item].ids, (), item)

    @property
    def places(self) -> list[str]:
        """`file:line` of each prompt."""
        return [prompt.place for prompt in self.prompts]

    def subset(self, indices: Iterable[int]) -> PromptSet:
        """The same set with only these prompts, in this order."""
        picked = tuple(self.prompts[int(index)] for index in indices)
        return dataclasses.replace(self, prompts=picked)


def load_prompts(
    specs: Sequence[SourceSpec], tokenizer: Any, *, max_length: int, too_long: TooLong, seed: int
) -> PromptSet:
    """Prompts of all sources.

    Args:
        specs: at least one source, of answers, pairs or prompts alone.
        tokenizer: transformers tokenizer, chat template set.
        max_length: longest prompt in tokens, at least 2.
        too_long: what happens to longer ones; `truncate_right` would cut off the question.
        seed: draws the rows of fractional weights.

    Returns:
        At least one prompt.

    Raises:
        DataError: a source cannot be read, a row asks nothing, or no row is left.
        ModelError: conversations without a chat template.
    """
    if too_long == "truncate_right":
        raise DataError(
            "data.too_long: prompts keep their end, where the question stands, got truncate_right",
            hint="truncate_left keeps the end, drop leaves the row out",
        )
    identity = tokenizer_identity(tokenizer)
    report, found, counts, keys = DataReport(prompts=True), [], [], []
    for spec in specs:
        source = load_source(spec)
        rows = parse_prompts(source.rows, spec.format)
        prompts, part = _tokenize(rows, tokenizer, max_length, too_long)
        found += prompts
        counts.append(len(prompts))
        keys.append(_source_key(source, spec))
        report.merge(part)
    if not found:
        raise DataError(
            f"{', '.join(spec.label for spec in specs)}: no prompt is left: "
            f"{'; '.join(report.lines()[1:])}",
            hint="raise data.max_length, or choose another data.too_long",
        )
    _note_repeats(found, report)
    order = mix_sources(specs, counts, seed)
    weights = [spec.weight for spec in specs]
    made = json.dumps([PROMPT_FORMAT, keys, weights, seed, identity, max_length, too_long])
    fingerprint = hashlib.sha256(made.encode()).hexdigest()
    return PromptSet(tuple(found[row] for row in order), report, fingerprint)


def _source_key(source: Source, spec: SourceSpec) -> list[Any]:
    return [source.fingerprint, spec.take, sorted(spec.columns.items()), spec.format]


def _note_repeats(prompts: list[Prompt], report: DataReport) -> None:
    seen: set[bytes] = set()
    for prompt in prompts:
        if _key(prompt) in seen:
            report.note("the same prompt as an earlier row's", prompt.place)
        seen.add(_key(prompt))


def _tokenize(
    rows: list[PromptRow], tokenizer: Any, max_length: int, too_long: TooLong
) -> tuple[list[Prompt], DataReport]:
    """The prompts of one source that are not dropped, and the counts of what happened."""
    report = DataReport(rows=len(rows), prompts=True)
    plain = [isinstance(row.asked, Completion) for row in rows]
    template = None if all(plain) else ChatTemplate(tokenizer)
    specials = special_tokens(tokenizer)
    rendered = [_render(row.asked, template) for row in rows]
    prompts = []
    for row, item, tokens in zip(rows, rendered, encode_texts(rendered, tokenizer), strict=True):
        note_doubts(row.asked, item.text, specials, template, report)
        if tokenizer.chat_template and not item.is_chat:
            report.note(PLAIN_TEXT, item.place)
        if not len(tokens.ids):
            raise DataError(
                f"{item.place}: the row has no prompt: the tokenizer makes no token of "
                f"{item.text!r}",
                hint="remove the row",
            )
        ids = _fit(tokens.ids, item.place, tokenizer.bos_token_id, max_length, too_long, report)
        if ids is not None:
            shown = _shown(row.asked)
            prompts.append(Prompt(ids, shown, row.answer, dict(row.row.values), item.place))
            report.tokens += len(ids)
    report.kept = len(prompts)
    return prompts, report


def _render(asked: Example, template: ChatTemplate | None) -> Rendered:
    """The prompt as the model reads it, ready for the assistant."""
    if isinstance(asked, Completion):
        return Rendered(asked.prompt, [], asked.place, is_chat=False)
    assert template is not None
    text = template.render(template.messages(asked), asked, generation_prompt=True)
    return Rendered(text, [], asked.place, is_chat=True)


def _shown(asked: Example) -> str | Turns:
    if isinstance(asked, Completion):
        return asked.prompt
    return [{"role": turn.role, "content": written_out(turn)} for turn in asked.messages]


def _fit(
    ids: npt.NDArray[np.int32],
    place: str,
    bos: int | None,
    limit: int,
    too_long: TooLong,
    report: DataReport,
) -> npt.NDArray[np.int32] | None:
    """The prompt cut to its longest length; None if it is dropped. Both are counted."""
    report.measure(len(ids), place)
    if len(ids) <= limit:
        return ids
    if too_long == "error":
        raise DataError(
            f"{place}: the prompt has {len(ids)} tokens, more than data.max_length = {limit}",
            hint="raise data.max_length, shorten the prompt, or choose another data.too_long",
        )
    if too_long == "drop":
        report.drop(f"longer than max_length = {limit} tokens", place)
        return None
    head = int(int(ids[0]) == bos)
    report.truncate(place, lost_end=False)
    return np.concatenate([ids[:head], ids[len(ids) - limit + head :]])


def split_prompts(prompts: PromptSet, fraction: float, seed: int) -> tuple[PromptSet, PromptSet]:
    """Training and held-out part.

    Args:
        prompts: to split.
        fraction: share of the different prompts that is held out, at least one.
        seed: draws them.

    Returns:
        `(train, held_out)`; equal prompts stay on one side. Held-out rows stand there once,
        whatever their weight.

    Raises:
        DataError: nothing would be left to train on.
    """
    groups: dict[bytes, int] = {}
    group = [groups.setdefault(_key(prompt), len(groups)) for prompt in prompts.prompts]
    drawn = np.random.default_rng([seed, 11]).permutation(len(groups))
    held = np.isin(group, drawn[: max(1, round(fraction * len(groups)))])
    if held.all():
        raise DataError(
            f"data.eval_fraction = {fraction} holds out all of the {len(groups)} different prompts",
            hint="use a smaller fraction or more prompts",
        )
    once = _first_of_each_row(prompts, np.flatnonzero(held).tolist())
    train, held_out = prompts.subset(np.flatnonzero(~held)), prompts.subset(once)
    places = [prompt.place for prompt in held_out.prompts]
    told, rest = prompts.report.split(places, sum(len(p.ids) for p in held_out.prompts))
    return dataclasses.replace(train, report=told), dataclasses.replace(held_out, report=rest)


def count_prompt_overlap(train: PromptSet, held_out: PromptSet) -> int:
    """Held-out rows whose prompt tokens also stand in the training rows."""
    known = {_key(prompt) for prompt in train.prompts}
    rows = _first_of_each_row(held_out, range(len(held_out)))
    return sum(_key(held_out.prompts[index]) in known for index in rows)


def _first_of_each_row(prompts: PromptSet, indices: Iterable[int]) -> list[int]:
    """The indices without those of rows that a weight repeats."""
    first: dict[tuple[str, bytes], int] = {}
    for index in indices:
        prompt = prompts.prompts[index]
        first.setdefault((prompt.place, _key(prompt)), index)
    return list(first.values())


def _key(prompt: Prompt) -> bytes:
    """Equal for prompts that the model reads alike."""
    return prompt.ids.tobytes()
