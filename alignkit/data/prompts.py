"""Sources -> prompts: what a policy responds to, with all that a reward function may need."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from alignkit.data.branches import fit
from alignkit.data.dataset import tokenizer_identity
from alignkit.data.documents import Document
from alignkit.data.formats import Completion, Text
from alignkit.data.masks import Rendered
from alignkit.data.prompt_rows import parse_prompts
from alignkit.data.report import DataReport
from alignkit.data.sources import Row, Source, load_source, mix_sources
from alignkit.data.spans import RenderedTurns
from alignkit.data.templates import ChatTemplate, written_out
from alignkit.data.texts import PLAIN_TEXT, encode_texts, note_bos, note_doubts, special_tokens
from alignkit.data.tokenize import TooLong
from alignkit.errors import DataError
from alignkit.recipe.rows import SourceSpec

Turns = list[dict[str, Any]]
"""Turns with `role`, `content` and what else they have; tool calls are written into the content."""

PROMPT_FORMAT = 1
"""Increased whenever the same rows would become other prompts."""


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Args:
        ids: `[p]` tokens that the model reads, the generation prompt included; at least 1.
        shown: what a reward function gets, never truncated: the plain text, or the turns.
        answer: the row's own answer (the chosen one of a pair); None if it has none, or one that
            is labelled undesirable.
        columns: the row's values, after `columns` renamed them.
        place: `file:line`.
    """

    ids: npt.NDArray[np.int32]
    shown: str | Turns
    answer: str | None
    columns: dict[str, Any]
    place: str

    @property
    def key(self) -> bytes:
        """Equal for prompts with equal tokens."""
        return self.ids.tobytes()


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one epoch.

    Args:
        prompts: in order; prompts with a weight above 1 appear repeatedly.
        report: what happened to the rows.
        fingerprint: hash of the sources' content and of all settings that shaped the prompts.
    """

    prompts: tuple[Prompt, ...]
    report: DataReport
    fingerprint: str

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, item: int) -> Document:
        """A prompt as a document without completions."""
        return Document(self.prompts[item].ids, (), item)

    @property
    def places(self) -> list[str]:
        """`file:line` of each prompt."""
        return [prompt.place for prompt in self.prompts]

    @property
    def content(self) -> str:
        """The fingerprint: files count by their content."""
        return self.fingerprint

    def subset(self, indices: Iterable[int]) -> PromptSet:
        """The same set with only these prompts, in this order."""
        picked = tuple(self.prompts[int(index)] for index in indices)
        return dataclasses.replace(self, prompts=picked)


def load_prompts(
    specs: Sequence[SourceSpec], tokenizer: Any, *, max_length: int, too_long: TooLong, seed: int
) -> PromptSet:
    """Prompts of all sources.

    Args:
        specs: at least one source, of completions, pairs or prompts alone.
        tokenizer: transformers tokenizer, chat template set.
        max_length: longest prompt in tokens, at least 2.
        too_long: what happens to longer ones; `truncate_right` would cut off the question.
        seed: draws the rows of fractional weights.

    Returns:
        At least one prompt.

    Raises:
        DataError: a source cannot be read, a row has no prompt, or no row is left.
        ModelError: conversations without a chat template.
    """
    if too_long == "truncate_right":
        raise DataError(
            "data.too_long: prompts keep their end, where the question stands, got truncate_right",
            hint="truncate_left keeps the end, drop leaves the row out",
        )
    report, prompts, counts, keys = DataReport(prompts=True), [], [], []
    for spec in specs:
        source = load_source(spec)
        loaded, part = _tokenize(source.rows, spec.format, tokenizer, max_length, too_long)
        prompts += loaded
        counts.append(len(loaded))
        keys.append(_source_key(source, spec))
        report.merge(part)
    _note_repeats(prompts, report)
    order = mix_sources(specs, counts, seed, report)
    weights, identity = [spec.weight for spec in specs], tokenizer_identity(tokenizer)
    mixture = json.dumps([PROMPT_FORMAT, keys, weights, seed, identity, max_length, too_long])
    fingerprint = hashlib.sha256(mixture.encode()).hexdigest()
    return PromptSet(tuple(prompts[row] for row in order), report, fingerprint)


def _source_key(source: Source, spec: SourceSpec) -> list[Any]:
    return [source.fingerprint, spec.take, sorted(spec.columns.items()), spec.format]


def _note_repeats(prompts: list[Prompt], report: DataReport) -> None:
    seen: set[bytes] = set()
    for prompt in prompts:
        if prompt.key in seen:
            report.note("the same prompt as an earlier row's", prompt.place)
        seen.add(prompt.key)


def _tokenize(
    rows: list[Row], row_format: str, tokenizer: Any, max_length: int, too_long: TooLong
) -> tuple[list[Prompt], DataReport]:
    """The prompts of one source that are not dropped, and the counts of what happened."""
    report = DataReport(rows=len(rows), prompts=True)
    parsed = parse_prompts(rows, row_format)
    plain = all(isinstance(prompt, Completion) for prompt, _ in parsed)
    template = None if plain else ChatTemplate(tokenizer)
    specials, bos = special_tokens(tokenizer), tokenizer.bos_token_id
    rendered = [_render(prompt, template) for prompt, _ in parsed]
    encoded = encode_texts(rendered, tokenizer)
    note_bos(rendered, [ids for ids, _ in encoded], tokenizer, report)
    prompts = []
    for number, (item, (ids, _)) in enumerate(zip(rendered, encoded, strict=True)):
        prompt, answer = parsed[number]
        note_doubts(prompt, item.text, specials, template, report)
        if tokenizer.chat_template and not item.is_chat:
            report.note(PLAIN_TEXT, item.place)
        if not len(ids):
            raise DataError(
                f"{item.place}: the row has no prompt: the tokenizer makes no token of "
                f"{item.text!r}",
                hint="remove the row",
            )
        kept = fit(Document(ids, (), number), item.place, max_length, too_long, bos, report)
        if kept is not None:
            columns = dict(rows[number].values)
            prompts.append(Prompt(kept.prompt, _shown(prompt), answer, columns, item.place))
            report.tokens += kept.num_tokens
    report.kept = len(prompts)
    return prompts, report


def _render(prompt: Text, template: ChatTemplate | None) -> Rendered:
    """The prompt as the model reads it, ready for the assistant."""
    if isinstance(prompt, Completion):
        return Rendered(prompt.prompt, [], prompt.place, is_chat=False)
    assert template is not None
    if prompt.messages[-1].role == "assistant":  # the beginning of the answer
        text = RenderedTurns(template, prompt).prompt()
    else:
        text = template.render(template.messages(prompt), prompt, generation_prompt=True)
    return Rendered(text, [], prompt.place, is_chat=True)


def _shown(prompt: Text) -> str | Turns:
    if isinstance(prompt, Completion):
        return prompt.prompt
    turns = prompt.messages
    return [{"role": turn.role, "content": written_out(turn), **turn.more} for turn in turns]
