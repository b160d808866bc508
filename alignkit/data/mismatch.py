"""KTO's mismatched completions: each prompt with the completion of another row."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from alignkit.data.dataset import TokenDataset
from alignkit.packed import IntArray


def with_mismatched(dataset: TokenDataset, max_length: int, seed: int) -> TokenDataset:
    """The dataset with one mismatched branch for every row.

    Args:
        dataset: rows of one completion each.
        max_length: longest sequence in tokens; a mismatched completion is cut there.
        seed: draws the partners.

    Returns:
        The same items; the report counts the completions that were cut and the rows that got no
        partner with another prompt.
    """
    partners = draw_partners(dataset, seed)
    prompts = dataset.bounds[:, 1] - dataset.bounds[:, 0]
    completions = (dataset.bounds[:, 2] - dataset.bounds[:, 1])[partners]
    room = np.maximum(max_length - prompts, 1)
    report = dataclasses.replace(dataset.report, notes=dict(dataset.report.notes))
    hashes = dataset.prompt_hashes()
    for row in np.unique(dataset.order).tolist():
        if completions[row] > room[row]:
            report.note("its mismatched answer is cut to max_length", dataset.places[row])
        if hashes[row] == hashes[int(partners[row])]:
            report.note("no other prompt to take a mismatched answer from", dataset.places[row])
    lengths = np.minimum(completions, room)
    digest = hashlib.sha256(f"{dataset.fingerprint}:{max_length}:{seed}".encode())
    return dataclasses.replace(
        dataset,
        partners=np.stack([partners, lengths], axis=1).astype(np.int64),
        report=report,
        fingerprint=digest.hexdigest(),
    )


def draw_partners(dataset: TokenDataset, seed: int) -> IntArray:
    """A partner for each row, with another prompt wherever there is one.

    Args:
        dataset: `n` rows; only those that an item uses are paired, so that no held-out completion
            enters.
        seed: draws them.

    Returns:
        `[n]` rows; an unused row is its own partner.
    """
    used = np.unique(dataset.order)
    count = len(used)
    drawn = used[np.random.default_rng([seed, 13]).permutation(count)]
    hashes = dataset.prompt_hashes()
    partners = np.arange(dataset.num_rows)
    if len({hashes[row] for row in used.tolist()}) == 1:
        partners[drawn] = np.roll(drawn, 1)
        return partners.astype(np.int64)
    for position, row in enumerate(drawn.tolist()):
        others = (int(drawn[(position + step) % count]) for step in range(1, count))
        partners[row] = next(other for other in others if hashes[other] != hashes[row])
    return partners.astype(np.int64)
