"""Where completions branch off from their prompt, and what happens to rows that are too long.

The branch point of a pair is the common token prefix of both tokenizations, or the first trained
token where that comes earlier: a tokenizer may join the last character of the prompt with the
first of a completion. Nothing after the last trained token is kept: no target could read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from alignkit.data.documents import Branch, Document, IdArray, common_start
from alignkit.data.report import DataReport
from alignkit.errors import DataError
from alignkit.packed import Role


def share_prompt(
    texts: Sequence[Branch], roles: Sequence[Role], row: int, margin: float
) -> Document:
    """One prompt with its completions.

    Args:
        texts: the prompt with each completion, and which tokens are trained.
        roles: of each completion.
        row: index of the data row.
        margin: how much better the chosen completion is.

    Returns:
        A document whose sequences are exactly the texts up to their last trained token.
    """
    first = [int(np.argmax(text.trained)) for text in texts]
    start = min(*first, common_start([text.ids for text in texts]))
    branches = [
        replace(text.part(start, int(np.flatnonzero(text.trained)[-1]) + 1), role=role)
        for text, role in zip(texts, roles, strict=True)
    ]
    return Document(texts[0].ids[:start], tuple(branches), row, margin)


def are_equal(branches: Sequence[Branch]) -> bool:
    """Whether these are two completions with the same tokens."""
    return len(branches) > 1 and np.array_equal(branches[0].ids, branches[1].ids)


def fit(
    document: Document, place: str, limit: int, too_long: str, bos: int | None, report: DataReport
) -> Document | None:
    """The document cut so that its longest sequence fits, or None if dropped; both are counted.

    Args:
        document: a prompt with its completions, a prompt alone, or a whole row as one branch
            without a prompt.
        place: `file:line`.
        limit: longest sequence, prompt and one completion, in tokens.
        too_long: `drop`, `truncate_left` (the prompt, or the whole row, loses its beginning),
            `truncate_right` (the completions lose their ends) or `error`.
        bos: id of the BOS token; kept where the beginning is cut off.
        report: counts what happened.

    Raises:
        DataError: the row is too long under `error`.
    """
    prompt, branches = document.prompt, document.branches
    whole = not len(prompt) and len(branches) == 1
    longest = max((len(branch.ids) for branch in branches), default=0)
    length = len(prompt) + longest
    report.measure(length, place)
    if length <= limit:
        return document
    if too_long == "error":
        raise _too_long(document, whole, f"{length} tokens", place, limit)
    if too_long == "drop":
        report.drop(f"longer than max_length = {limit} tokens", place)
        return None
    if too_long == "truncate_right":
        room = limit - len(prompt)
        lost_end = any(branch.trained[max(room, 0) :].any() for branch in branches)
        branches = tuple(branch.part(0, max(room, 0)) for branch in branches)
    elif whole:
        lost_end, branches = False, (_without_start(branches[0], limit, bos),)
    elif longest >= limit:
        report.drop(f"an answer alone fills max_length = {limit} tokens", place)
        return None
    else:
        lost_end, prompt = False, prompt[_last(prompt, limit - longest, bos)]
    if not all(branch.trained.any() for branch in branches):
        report.drop(f"the prompt alone fills max_length = {limit} tokens", place)
        return None
    if are_equal(branches):
        report.drop(f"the two answers are equal up to max_length = {limit} tokens", place)
        return None
    report.truncate(place, lost_end=lost_end)
    return replace(document, prompt=prompt, branches=branches)


def _too_long(document: Document, whole: bool, tokens: str, place: str, limit: int) -> DataError:
    what = "the row has" if whole else "prompt and answer have"
    if not document.branches:
        what = "the prompt has"
    return DataError(
        f"{place}: {what} {tokens}, more than data.max_length = {limit}",
        hint=f"raise data.max_length, shorten the {'row' if document.branches else 'prompt'}, "
        "or choose another data.too_long",
    )


def _without_start(row: Branch, size: int, bos: int | None) -> Branch:
    """The end of a row; nothing predicts its new first token."""
    kept = _last(row.ids, size, bos)
    trained = row.trained[kept]
    trained[0] = False
    return replace(row, ids=row.ids[kept], trained=trained)


def _last(ids: IdArray, size: int, bos: int | None) -> npt.NDArray[np.int64]:
    """Positions of the last `size` tokens; the first is BOS if the ids begin with it."""
    head = int(ids[0] == bos)
    return np.concatenate([np.arange(head), np.arange(len(ids) - size + head, len(ids))])
