"""Which tokens are trained: from characters, or a template's own markers, to a mask of tokens.

A token across the border of prompt and completion counts as part of the completion. After the
end-of-turn token nothing is trained: the line break that many templates put there is never
generated.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from alignkit.data.documents import Branch, IdArray
from alignkit.data.report import DataReport
from alignkit.data.spans import Span
from alignkit.errors import DataError


@dataclass(frozen=True)
class Rendered:
    """One row as text.

    Args:
        text: of the whole row.
        spans: characters of each trained turn.
        place: `file:line`.
        is_chat: rendered by a chat template, which writes its special tokens itself.
        mask: 1 for each token that the template marks as generated; None without markers.
        marked_turns: with a mask, whether each assistant turn is trained.
        left_out: characters of each turn that is not trained, where everything else is.
    """

    text: str
    spans: list[Span]
    place: str
    is_chat: bool
    mask: list[int] | None = None
    marked_turns: tuple[bool, ...] = ()
    left_out: tuple[Span, ...] = ()


Offsets = npt.NDArray[np.int64]
"""`[n, 2]` each token's first character in the text, and one past its last."""


@dataclass
class Masker:
    """Masks the rows of one source.

    Args:
        special_ids: tokens that can end a turn.
        eos: appended if a template ends the last turn without such a token; None appends nothing.
        everything: the whole row is trained.
        report: counts rows that do not teach the model to stop.
        stop_tokens: the tokens that have ended a trained turn so far.
    """

    special_ids: set[int]
    eos: int | None
    everything: bool
    report: DataReport
    stop_tokens: set[int] = field(default_factory=set)

    def mask(self, item: Rendered, ids: IdArray, offsets: Offsets) -> Branch:
        """The tokens of a text with their mask.

        Args:
            item: the text.
            ids: its tokens.
            offsets: their characters.

        Raises:
            DataError: the template's markers do not fit its tokens or its turns.
        """
        if item.mask is not None:
            runs = _marked_runs(item, item.mask, len(ids))
            limits = [len(item.text)] * len(runs)
        else:
            runs = [_token_run(offsets, *span) for span in item.spans]
            limits = [stop for _, stop in item.spans]
        trained = np.full(len(ids), self.everything)
        stopped = False
        for (begin, end), limit in zip(runs, limits, strict=True):
            end, stopped = self._trim(item, ids, offsets, begin, end, limit)
            trained[begin:end] = True
            if stopped:
                self.stop_tokens.add(int(ids[end - 1]))
        for span in item.left_out:
            trained[slice(*_token_run(offsets, *span))] = False
        open_end = bool(runs) and not stopped
        if open_end and item.is_chat and self.eos is not None and runs[-1][1] >= len(ids):
            ids, trained = np.append(ids, np.int32(self.eos)), np.append(trained, True)
            self.stop_tokens.add(int(self.eos))
            self.report.note(
                "the template ends no turn with a stop token; EOS was appended", item.place
            )
        elif open_end:
            self.report.note(
                "no stop token after the last answer: it does not teach the model to stop",
                item.place,
            )
        trained[:1] = False
        return Branch(ids, trained)

    def _trim(
        self, item: Rendered, ids: IdArray, offsets: Offsets, begin: int, end: int, limit: int
    ) -> tuple[int, bool]:
        """End of the turn: one past its end-of-turn token, and whether there is one.

        A token across `limit`, where the turn's characters end, may be a blank of this turn and a
        word of the next.
        """
        last = end
        while last > begin and int(ids[last - 1]) not in self.special_ids:
            start, stop = offsets[last - 1]
            if item.text[start : min(stop, limit)].strip():
                break
            last -= 1
        if last > begin and int(ids[last - 1]) in self.special_ids:
            return last, True
        marked = item.mask is not None
        if marked and begin < end < len(ids) and int(ids[end]) in self.special_ids:
            return end + 1, True  # markers often close before the end-of-turn token
        return end, False


def _marked_runs(item: Rendered, mask: list[int], length: int) -> list[tuple[int, int]]:
    """Token runs of the wanted turns, between the template's generation markers."""
    if len(mask) != length:
        raise DataError(
            f"{item.place}: the template's generation markers do not fit the tokens",
            hint="choose a template without markers (model.chat_template)",
        )
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(mask, bool), [0]])))
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


def _token_run(offsets: Offsets, begin: int, end: int) -> tuple[int, int]:
    """First and one past the last token that hold a character in `begin:end`."""
    inside = (offsets[:, 1] > begin) & (offsets[:, 0] < end)
    positions = np.flatnonzero(inside)
    return (int(positions[0]), int(positions[-1]) + 1) if len(positions) else (0, 0)
