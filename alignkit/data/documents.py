"""A row as tokens: a prompt and the answers that share it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from alignkit.packed import Role


@dataclass(frozen=True)
class Branch:
    """One completion.

    Args:
        ids: `[n]` token ids.
        trained: `[n]` True where the token is a target.
        role: what the answer is to the objective.
        reference: log-prob of its targets under the reference model; NaN where it is not known.
    """

    ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    role: Role = Role.CHOSEN
    reference: float = math.nan


@dataclass(frozen=True)
class Document:
    """A prompt and the completions that share it.

    Args:
        prompt: `[p]` token ids; may be empty, then no branch may train its first token.
        branches: at least one completion.
        row: index of the data row.
        margin: how much better the chosen answer is; 0 where the row does not say.
    """

    prompt: npt.NDArray[np.int32]
    branches: tuple[Branch, ...]
    row: int
    margin: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens of this document, a start that it may share with others included."""
        return len(self.prompt) + sum(len(branch.ids) for branch in self.branches)

    def only(self, *roles: Role) -> Document:
        """The document with the branches of these roles."""
        kept = tuple(branch for branch in self.branches if branch.role in roles)
        return dataclasses.replace(self, branches=kept)


@dataclass(frozen=True)
class TokenizedDocument:
    """A document and where it stands.

    Args:
        prompt: `[p]` token ids.
        branches: its answers.
        place: `file:line`.
        margin: how much better the chosen answer is.
    """

    prompt: npt.NDArray[np.int32]
    branches: tuple[Branch, ...]
    place: str
    margin: float = 0.0
