"""Where answers leave their prompt, and what happens when prompt and answer are too long.

The branch point of a pair is the common token prefix of both tokenizations, or the first trained
token where that comes earlier: a tokenizer may join the last character of the prompt with the
first of an answer. Nothing after the last trained token is kept: no target could read it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from alignkit.data.documents import Branch, TokenizedDocument
from alignkit.data.masks import TokenizedRow
from alignkit.data.report import DataReport
from alignkit.errors import DataError
from alignkit.packed import Role


def branch_pair(chosen: TokenizedRow, rejected: TokenizedRow, margin: float) -> TokenizedDocument:
    """One prompt with two answers.

    Args:
        chosen: prompt and better answer, with trained tokens.
        rejected: prompt and worse answer, with trained tokens.
        margin: how much better.

    Returns:
        A document whose sequences are exactly the two rows up to their last trained token.
    """
    first = [int(np.argmax(row.trained)) for row in (chosen, rejected)]
    start = min(*first, _common_prefix(chosen, rejected))
    branches = (
        _branch(chosen, start, Role.CHOSEN),
        _branch(rejected, start, Role.REJECTED),
    )
    return TokenizedDocument(chosen.ids[:start], branches, chosen.place, margin)


def branch_labelled(row: TokenizedRow, *, desirable: bool) -> TokenizedDocument:
    """A prompt with one answer, whose role says whether it is desirable."""
    start = int(np.argmax(row.trained))
    role = Role.CHOSEN if desirable else Role.REJECTED
    return TokenizedDocument(row.ids[:start], (_branch(row, start, role),), row.place)


def _branch(row: TokenizedRow, start: int, role: Role) -> Branch:
    end = int(np.flatnonzero(row.trained)[-1]) + 1
    return Branch(row.ids[start:end], row.trained[start:end], role)


def _common_prefix(one: TokenizedRow, two: TokenizedRow) -> int:
    """Tokens that two rows have in common from the start."""
    length = min(len(one.ids), len(two.ids))
    differs = np.flatnonzero(one.ids[:length] != two.ids[:length])
    return int(differs[0]) if len(differs) else length


def fit_branches(
    document: TokenizedDocument, limit: int, too_long: str, bos: int | None, report: DataReport
) -> TokenizedDocument | None:
    """The document cut to its longest sequence, or None if it is dropped; both are counted.

    Args:
        document: prompt and answers.
        limit: longest sequence, prompt and one answer, in tokens.
        too_long: `drop`, `truncate_left` (the prompt loses its beginning), `truncate_right` (the
            answers lose their ends) or `error`.
        bos: kept at the start of a prompt that is cut.
        report: told what happened.

    Raises:
        DataError: the row is too long under `error`.
    """
    prompt, place = document.prompt, document.place
    longest = max(len(branch.ids) for branch in document.branches)
    length = len(prompt) + longest
    report.measure(length, place)
    if length <= limit:
        return document
    if too_long == "error":
        raise DataError(
            f"{place}: prompt and answer have {length} tokens, more than data.max_length = {limit}",
            hint="raise data.max_length, shorten the row, or choose another data.too_long",
        )
    if too_long == "drop":
        report.drop(f"longer than max_length = {limit} tokens", place)
        return None
    if too_long == "truncate_left":
        head = int(len(prompt) > 0 and int(prompt[0]) == bos)
        rest = limit - head - longest
        if rest < 1 - head:
            report.drop(f"an answer alone fills max_length = {limit} tokens", place)
            return None
        kept = np.concatenate([prompt[:head], prompt[len(prompt) - rest :]])
        report.truncate(place, lost_end=False)
        return replace(document, prompt=kept)
    room = limit - len(prompt)
    branches = tuple(
        replace(branch, ids=branch.ids[:room], trained=branch.trained[:room])
        for branch in document.branches
    )
    if room < 1 or not all(branch.trained.any() for branch in branches):
        report.drop(f"the prompt alone fills max_length = {limit} tokens", place)
        return None
    if len(branches) > 1 and np.array_equal(branches[0].ids, branches[1].ids):
        report.drop(f"the two answers are equal up to max_length = {limit} tokens", place)
        return None
    report.truncate(place, lost_end=True)
    return replace(document, branches=branches)
