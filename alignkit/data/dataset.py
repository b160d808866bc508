"""Sources -> one TokenDataset: parsed, tokenized, cached by content, mixed by weight."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alignkit.data.formats import parse_rows
from alignkit.data.masks import TokenizedRow
from alignkit.data.report import DataReport
from alignkit.data.sources import Source, load_source, mix_rows
from alignkit.data.tokenize import TokenizeSettings, tokenize_examples
from alignkit.errors import DataError
from alignkit.packed import IntArray
from alignkit.recipe.schema import SourceSpec

CACHE_FORMAT = 1
"""Raised whenever the same rows would be tokenized differently."""


@dataclass(frozen=True)
class Branch:
    """One completion.

    Args:
        ids: `[n]` token ids.
        trained: `[n]` True where the token is a target.
    """

    ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Document:
    """A prompt and the completions that share it.

    Args:
        prompt: `[p]` token ids; may be empty, then no branch may train its first token.
        branches: at least one completion.
        row: index of the data row.
    """

    prompt: npt.NDArray[np.int32]
    branches: tuple[Branch, ...]
    row: int

    @property
    def num_tokens(self) -> int:
        """Tokens the model reads for this document."""
        return len(self.prompt) + sum(len(branch.ids) for branch in self.branches)


@dataclass(frozen=True)
class TokenDataset(Sequence[Document]):
    """Tokenized rows in one flat array.

    Args:
        ids: `[T]` ids of all rows, one after another.
        trained: `[T]` mask of trained tokens.
        offsets: `[n + 1]` where each row starts.
        order: `[m]` row of each dataset item; rows of a weight above 1 stand here repeatedly.
        places: `file:line` of each row.
        report: what happened on the way.
        fingerprint: hash of everything that determined the tokens.
    """

    ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    offsets: IntArray
    order: IntArray
    places: list[str]
    report: DataReport
    fingerprint: str

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, item: Any) -> Any:
        row = int(self.order[item])
        begin, end = self.offsets[row], self.offsets[row + 1]
        branch = Branch(self.ids[begin:end], self.trained[begin:end])
        return Document(np.zeros(0, np.int32), (branch,), row)

    @property
    def lengths(self) -> IntArray:
        """`[m]` tokens of each item."""
        return np.diff(self.offsets)[self.order].astype(np.int64)

    @property
    def num_trained(self) -> IntArray:
        """`[m]` trained tokens of each item."""
        before = np.concatenate([[0], np.cumsum(self.trained)])
        return np.diff(before[self.offsets])[self.order].astype(np.int64)

    def subset(self, items: IntArray) -> TokenDataset:
        """The same rows with only these items."""
        return dataclasses.replace(self, order=self.order[items])

    def row_hashes(self) -> list[bytes]:
        """Hash of each row's tokens; equal rows have equal hashes."""
        spans = zip(self.offsets[:-1], self.offsets[1:], strict=True)
        return [hashlib.sha256(self.ids[a:b].tobytes()).digest() for a, b in spans]


def load_dataset(
    specs: Sequence[SourceSpec], tokenizer: Any, settings: TokenizeSettings, seed: int, cache: Path
) -> TokenDataset:
    """Tokens of all sources.

    Args:
        specs: at least one source.
        tokenizer: transformers tokenizer, chat template set.
        settings: lengths and mask.
        seed: draws the rows of fractional weights.
        cache: folder where the tokens of each source are kept by content.

    Returns:
        A dataset with at least one item.

    Raises:
        DataError: a source cannot be read, or no row is left.
    """
    identity = tokenizer_identity(tokenizer)
    report, rows, counts, keys = DataReport(), [], [], []
    for spec in specs:
        source = load_source(spec)
        key = _cache_key(source, spec, identity, settings)
        cached = _read_cache(cache / f"{key}.npz")
        if cached is None:
            examples = parse_rows(source.rows, spec.format)
            cached = tokenize_examples(examples, tokenizer, settings)
            _write_cache(cache / f"{key}.npz", *cached)
        source_rows, source_report = cached
        rows += source_rows
        counts.append(len(source_rows))
        keys.append(key)
        report.merge(source_report)
    if not rows:
        reasons = "; ".join(report.lines()[1:])
        raise DataError(
            f"{', '.join(spec.label for spec in specs)}: no row is left to train on: {reasons}",
            hint="raise data.max_length, or choose another data.too_long",
        )
    weights = [spec.weight for spec in specs]
    order = mix_rows(counts, weights, seed)
    if not len(order):
        raise DataError(
            f"{', '.join(spec.label for spec in specs)}: the weights draw no row from "
            f"{', '.join(map(str, counts))}",
            hint="raise the weights of the sources",
        )
    mixture = json.dumps([keys, weights, seed])
    fingerprint = hashlib.sha256(mixture.encode()).hexdigest()
    return _flatten(rows, order, report, fingerprint)


def split_dataset(
    dataset: TokenDataset, fraction: float, seed: int
) -> tuple[TokenDataset, TokenDataset]:
    """Training and held-out part.

    Args:
        dataset: items to split.
        fraction: share of the rows that is held out, at least one row.
        seed: draws them.

    Returns:
        `(train, held_out)`; equal rows, and repeats of a weighted row, stay on one side.
    """
    hashes = dataset.row_hashes()
    groups: dict[bytes, int] = {}
    used = np.unique(dataset.order)  # a weight below 1 leaves rows out
    group = {int(row): groups.setdefault(hashes[row], len(groups)) for row in used}
    drawn = np.random.default_rng([seed, 11]).permutation(len(groups))
    held_groups = drawn[: max(1, round(fraction * len(groups)))]
    held = np.isin([group[int(row)] for row in dataset.order], held_groups)
    if held.all():
        raise DataError(
            f"data.eval_fraction = {fraction} holds out all of the {len(dataset)} rows",
            hint="use a smaller fraction or more rows",
        )
    items = np.arange(len(dataset))
    first = np.unique(dataset.order[held], return_index=True)[1]
    return dataset.subset(items[~held]), dataset.subset(np.sort(items[held][first]))


def count_overlap(train: TokenDataset, held_out: TokenDataset) -> int:
    """Held-out rows whose tokens also stand in the training rows."""
    known = train.row_hashes()
    seen = {known[row] for row in set(train.order.tolist())}
    held = held_out.row_hashes()
    return sum(held[row] in seen for row in set(held_out.order.tolist()))


def tokenizer_identity(tokenizer: Any) -> str:
    """Hash of all that the tokenizer does to text, its chat template included."""
    parts = [str(tokenizer.chat_template), str(tokenizer.eos_token), str(tokenizer.bos_token)]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts.append(backend.to_str() if backend is not None else str(tokenizer.get_vocab()))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _cache_key(source: Source, spec: SourceSpec, identity: str, settings: TokenizeSettings) -> str:
    parts = {
        "format": CACHE_FORMAT,
        "content": source.fingerprint,
        "label": source.label,  # places name the file
        "take": spec.take,
        "columns": spec.columns,
        "row_format": spec.format,
        "tokenizer": identity,
        "settings": dataclasses.asdict(settings),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read_cache(path: Path) -> tuple[list[TokenizedRow], DataReport] | None:
    if not path.is_file():
        return None
    try:
        with np.load(path) as stored:
            arrays = {key: stored[key] for key in stored.files}
        meta = json.loads(arrays["meta"].tobytes())
        offsets = arrays["offsets"]
        rows = [
            TokenizedRow(arrays["ids"][a:b], arrays["trained"][a:b], place)
            for a, b, place in zip(offsets[:-1], offsets[1:], meta["places"], strict=True)
        ]
        return rows, DataReport(**meta["report"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None  # written by a broken disk or another release: make it again


def _write_cache(path: Path, rows: list[TokenizedRow], report: DataReport) -> None:
    """Store the tokens; a cache that cannot be written is no reason to stop."""
    meta = {"places": [row.place for row in rows], "report": dataclasses.asdict(report)}
    flat = _flatten(rows, np.arange(len(rows)), report, "")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            written = Path(folder) / path.name
            np.savez(
                written,
                ids=flat.ids,
                trained=flat.trained,
                offsets=flat.offsets,
                meta=np.frombuffer(json.dumps(meta).encode(), np.uint8),
            )
            os.replace(written, path)


def _flatten(
    rows: list[TokenizedRow], order: IntArray, report: DataReport, fingerprint: str
) -> TokenDataset:
    lengths = [len(row.ids) for row in rows]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    empty_ids, empty_mask = np.zeros(0, np.int32), np.zeros(0, bool)
    ids = np.concatenate([row.ids for row in rows] or [empty_ids])
    trained = np.concatenate([row.trained for row in rows] or [empty_mask])
    places = [row.place for row in rows]
    return TokenDataset(ids, trained, offsets, order, places, report, fingerprint)
