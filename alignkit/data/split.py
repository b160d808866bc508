"""Rows and prompts -> a training and a held-out part, and what is in both."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from alignkit.data.dataset import TokenDataset
from alignkit.data.prompts import PromptSet
from alignkit.errors import DataError


def split_dataset(
    dataset: TokenDataset, fraction: float, seed: int
) -> tuple[TokenDataset, TokenDataset]:
    """Training and held-out part.

    Args:
        dataset: items to split.
        fraction: share of the distinct prompts that is held out, at least one; a row without a
            prompt of its own counts as one.
        seed: draws them.

    Returns:
        `(train, held_out)`; equal rows, completions of one prompt, and repeats of a weighted row
        stay on one side.
    """
    alone = dataset.bounds[:, 1] - dataset.bounds[:, 0] < 2  # BOS alone is not a prompt
    pairs = zip(alone, dataset.row_hashes(), dataset.prompt_hashes(), strict=True)
    keys = [row if single else prompt for single, row, prompt in pairs]
    held = _draw_held_out([keys[row] for row in dataset.order.tolist()], fraction, seed)
    if held.all():
        raise DataError(
            f"data.eval_fraction = {fraction} holds out all of the {len(dataset)} rows",
            hint="use a smaller fraction or more rows",
        )
    items = np.arange(len(dataset))
    first = np.unique(dataset.order[held], return_index=True)[1]
    train, held_out = dataset.subset(items[~held]), dataset.subset(np.sort(items[held][first]))
    places = [dataset.places[row] for row in held_out.order.tolist()]
    tokens, trained = int(held_out.lengths.sum()), int(held_out.num_trained.sum())
    train_report, held_report = dataset.report.split(places, tokens, trained)
    return dataclasses.replace(train, report=train_report), dataclasses.replace(
        held_out, report=held_report
    )


def count_overlap(train: TokenDataset, held_out: TokenDataset) -> int:
    """Number of held-out rows whose tokens equal a training row's."""
    known = train.row_hashes()
    seen = {known[row] for row in set(train.order.tolist())}
    held = held_out.row_hashes()
    return sum(held[row] in seen for row in set(held_out.order.tolist()))


def split_prompts(prompts: PromptSet, fraction: float, seed: int) -> tuple[PromptSet, PromptSet]:
    """Training and held-out part.

    Args:
        prompts: to split.
        fraction: share of the distinct prompts that is held out, at least one.
        seed: draws them.

    Returns:
        `(train, held_out)`; equal prompts stay on one side. A held-out row appears once,
        whatever its weight.

    Raises:
        DataError: nothing would be left to train on.
    """
    keys = [prompt.key for prompt in prompts.prompts]
    held = _draw_held_out(keys, fraction, seed)
    if held.all():
        raise DataError(
            f"data.eval_fraction = {fraction} holds out all of the {len(set(keys))} different "
            "prompts",
            hint="use a smaller fraction or more prompts",
        )
    once = _first_of_each_row(prompts, np.flatnonzero(held).tolist())
    train, held_out = prompts.subset(np.flatnonzero(~held)), prompts.subset(once)
    places = [prompt.place for prompt in held_out.prompts]
    train_report, held_report = prompts.report.split(
        places, sum(len(p.ids) for p in held_out.prompts)
    )
    return dataclasses.replace(train, report=train_report), dataclasses.replace(
        held_out, report=held_report
    )


def count_prompt_overlap(train: PromptSet, held_out: PromptSet) -> int:
    """Number of held-out rows whose prompt tokens equal a training row's."""
    known = {prompt.key for prompt in train.prompts}
    rows = _first_of_each_row(held_out, range(len(held_out)))
    return sum(held_out.prompts[index].key in known for index in rows)


def _first_of_each_row(prompts: PromptSet, indices: Iterable[int]) -> list[int]:
    """The indices without repetitions of weighted rows."""
    first: dict[tuple[str, bytes], int] = {}
    for index in indices:
        prompt = prompts.prompts[index]
        first.setdefault((prompt.place, prompt.key), index)
    return list(first.values())


def _draw_held_out(keys: Sequence[bytes], fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Which items are held out.

    Args:
        keys: of each item; those with equal keys stay on one side.
        fraction: share of the distinct keys that is held out, at least one.
        seed: draws them.
    """
    groups: dict[bytes, int] = {}
    group = [groups.setdefault(key, len(groups)) for key in keys]
    drawn = np.random.default_rng([seed, 11]).permutation(len(groups))
    return np.isin(group, drawn[: max(1, round(fraction * len(groups)))])
