"""A row as tokens: a prompt and the completions that share it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from alignkit.packed import Role

IdArray = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Branch:
    """One completion, or a whole text before its prompt is split off.

    Args:
        ids: `[n]` token ids.
        trained: `[n]` True where the token is a target; never at position 0 of a whole text.
        role: what the objective takes the completion for.
        reference: log-prob of its targets under the reference model; NaN if unknown.
    """

    ids: IdArray
    trained: Mask
    role: Role = Role.CHOSEN
    reference: float = math.nan

    def part(self, begin: int, end: int) -> Branch:
        """The tokens in `begin:end`."""
        return dataclasses.replace(self, ids=self.ids[begin:end], trained=self.trained[begin:end])


@dataclass(frozen=True)
class Document:
    """A prompt and the completions that share it.

    Args:
        prompt: `[p]` token ids; if empty, no branch may train its first token.
        branches: at least one completion; none for a prompt alone.
        row: index of the data row.
        margin: how much better the chosen completion is; 0 if the row does not say.
    """

    prompt: IdArray
    branches: tuple[Branch, ...]
    row: int
    margin: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens of this document, including a start that it may share with others."""
        return len(self.prompt) + sum(len(branch.ids) for branch in self.branches)

    def only(self, *roles: Role) -> Document:
        """The document with the branches of these roles."""
        kept = tuple(branch for branch in self.branches if branch.role in roles)
        return dataclasses.replace(self, branches=kept)


def common_start(texts: Sequence[IdArray]) -> int:
    """Number of first tokens that all texts (at least one) share."""
    shortest = min(len(text) for text in texts)
    differs = np.zeros(shortest + 1, np.bool_)
    differs[-1] = True
    for text in texts[1:]:
        differs[:-1] |= text[:shortest] != texts[0][:shortest]
    return int(differs.argmax())
