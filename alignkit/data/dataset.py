"""Sources -> one TokenDataset: parsed, tokenized, cached by content, mixed by weight."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alignkit.data.documents import Branch, Document, TokenizedDocument
from alignkit.data.report import DataReport
from alignkit.data.sources import Source, load_source, mix_sources
from alignkit.data.tokenize import TokenizeSettings, parse_rows, tokenize_examples
from alignkit.errors import DataError
from alignkit.files import replace_file
from alignkit.packed import IntArray, Role
from alignkit.recipe.rows import SourceSpec

CACHE_FORMAT = 2
"""Raised whenever the same rows would be tokenized differently."""


@dataclass(frozen=True)
class TokenDataset(Sequence[Document]):
    """Tokenized rows in one flat array. `n` rows of `B` branches, `m` items.

    Args:
        ids: `[T]` ids of all rows, one after another, each prompt before its branches.
        trained: `[T]` mask of trained tokens.
        bounds: `[n, B + 2]` where the prompt, each branch and the row end: row `r` has its prompt
            in `bounds[r, 0]:bounds[r, 1]` and branch `k` in `bounds[r, k + 1]:bounds[r, k + 2]`.
        roles: `[n, B]` the `Role` of each branch.
        margins: `[n]` how much better the chosen answer is; 0 where the row does not say.
        order: `[m]` row of each dataset item; rows of a weight above 1 stand here repeatedly.
        places: `file:line` of each row.
        report: what happened on the way.
        fingerprint: hash of everything that determined the tokens.
        partners: `[n, 2]` of each row another row and how many tokens of its first branch follow
            this row's prompt as a mismatched branch; None gives no such branch.
        references: `[n, branches]` log-probs under the reference model, the mismatched branch
            last; NaN where a row was not scored, None where none was.
    """

    ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    bounds: IntArray
    roles: npt.NDArray[np.int8]
    margins: npt.NDArray[np.float64]
    order: IntArray
    places: list[str]
    report: DataReport
    fingerprint: str
    partners: IntArray | None = None
    references: npt.NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, item: Any) -> Any:
        return self.document(int(self.order[item]))

    def document(self, row: int) -> Document:
        """The document of a row, whether or not an item uses it."""
        ends = self.bounds[row]
        branches = [
            Branch(self.ids[a:b], self.trained[a:b], Role(role))
            for a, b, role in zip(ends[1:-1], ends[2:], self.roles[row].tolist(), strict=True)
        ]
        if self.partners is not None:
            other, length = self.partners[row].tolist()
            begin = self.bounds[other, 1]
            piece = slice(begin, begin + length)
            branches.append(Branch(self.ids[piece], self.trained[piece], Role.MISMATCHED))
        if self.references is not None:
            known = self.references[row].tolist()
            branches = [
                dataclasses.replace(branch, reference=value)
                for branch, value in zip(branches, known, strict=True)
            ]
        prompt = self.ids[ends[0] : ends[1]]
        return Document(prompt, tuple(branches), row, float(self.margins[row]))

    @property
    def num_rows(self) -> int:
        """Rows, whether or not an item uses them: `n`."""
        return len(self.bounds)

    @property
    def lengths(self) -> IntArray:
        """`[m]` tokens of each item, as often as the model reads them."""
        rows: IntArray = self.bounds[:, -1] - self.bounds[:, 0]
        if self.partners is not None:
            rows = rows + self.partners[:, 1]
        return rows[self.order].astype(np.int64)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, a prompt and one of its answers."""
        pieces = np.diff(self.bounds, axis=1)[self.order]
        return int((pieces[:, 0] + pieces[:, 1:].max(axis=1)).max())

    @property
    def num_trained(self) -> IntArray:
        """`[m]` trained tokens of each item."""
        before = np.concatenate([[0], np.cumsum(self.trained)])
        rows: IntArray = before[self.bounds[:, -1]] - before[self.bounds[:, 0]]
        return rows[self.order].astype(np.int64)

    def subset(self, items: IntArray) -> TokenDataset:
        """The same rows with only these items."""
        return dataclasses.replace(self, order=self.order[items])

    def row_hashes(self) -> list[bytes]:
        """Hash of each row's tokens; equal rows have equal hashes."""
        spans = zip(self.bounds[:, 0], self.bounds[:, -1], strict=True)
        return [hashlib.sha256(self.ids[a:b].tobytes()).digest() for a, b in spans]

    def prompt_hashes(self) -> list[bytes]:
        """Hash of each row's prompt tokens."""
        spans = zip(self.bounds[:, 0], self.bounds[:, 1], strict=True)
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
            examples = parse_rows(source.rows, spec.format, settings.rows)
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
    order = mix_sources(specs, counts, seed)
    mixture = json.dumps([keys, [spec.weight for spec in specs], seed])
    fingerprint = hashlib.sha256(mixture.encode()).hexdigest()
    return _flatten(rows, order, report, fingerprint)


def split_dataset(
    dataset: TokenDataset, fraction: float, seed: int
) -> tuple[TokenDataset, TokenDataset]:
    """Training and held-out part.

    Args:
        dataset: items to split.
        fraction: share of the different prompts that is held out, at least one; of the different
            rows where a row has no prompt of its own.
        seed: draws them.

    Returns:
        `(train, held_out)`; equal rows, answers to one prompt, and repeats of a weighted row stay
        on one side.
    """
    alone = dataset.bounds[:, 1] - dataset.bounds[:, 0] < 2  # BOS is no prompt
    pairs = zip(alone, dataset.row_hashes(), dataset.prompt_hashes(), strict=True)
    hashes = [row if single else prompt for single, row, prompt in pairs]
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
    train, held_out = dataset.subset(items[~held]), dataset.subset(np.sort(items[held][first]))
    places = [dataset.places[row] for row in held_out.order.tolist()]
    tokens, trained = int(held_out.lengths.sum()), int(held_out.num_trained.sum())
    told, rest = dataset.report.split(places, tokens, trained)
    return dataclasses.replace(train, report=told), dataclasses.replace(held_out, report=rest)


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


def _read_cache(path: Path) -> tuple[list[TokenizedDocument], DataReport] | None:
    if not path.is_file():
        return None
    try:
        with np.load(path) as stored:
            arrays = {key: stored[key] for key in stored.files}
        meta = json.loads(arrays.pop("meta").tobytes())
        report, places = DataReport(**meta["report"]), meta["places"]
        flat = TokenDataset(
            **arrays, order=np.arange(len(places)), places=places, report=report, fingerprint=""
        )
        documents = [flat.document(row) for row in range(len(places))]
    except (OSError, ValueError, KeyError, TypeError, EOFError, IndexError, zipfile.BadZipFile):
        return None  # written by a broken disk or another release: make it again
    rows = [
        TokenizedDocument(found.prompt, found.branches, place, found.margin)
        for found, place in zip(documents, places, strict=True)
    ]
    return rows, report


def _write_cache(path: Path, rows: list[TokenizedDocument], report: DataReport) -> None:
    """Store the tokens; a cache that cannot be written is no reason to stop."""
    meta = {"places": [row.place for row in rows], "report": dataclasses.asdict(report)}
    flat = _flatten(rows, np.arange(len(rows)), report, "")
    with contextlib.suppress(OSError), replace_file(path) as written:
        np.savez(
            written,
            ids=flat.ids,
            trained=flat.trained,
            bounds=flat.bounds,
            roles=flat.roles,
            margins=flat.margins,
            meta=np.frombuffer(json.dumps(meta).encode(), np.uint8),
        )


def _flatten(
    rows: list[TokenizedDocument], order: IntArray, report: DataReport, fingerprint: str
) -> TokenDataset:
    pieces = [(row.prompt, *(branch.ids for branch in row.branches)) for row in rows]
    width = len(pieces[0]) if pieces else 2
    lengths = np.asarray([[len(piece) for piece in row] for row in pieces], np.int64)
    ends = np.cumsum(lengths.reshape(-1)).reshape(-1, width)
    starts = np.concatenate([[0], ends[:-1, -1]]) if len(ends) else np.zeros(0, np.int64)
    empty_ids, empty_mask = np.zeros(0, np.int32), np.zeros(0, bool)
    masks = [
        mask
        for row in rows
        for mask in (np.zeros(len(row.prompt), bool), *(b.trained for b in row.branches))
    ]
    return TokenDataset(
        ids=np.concatenate([piece for row in pieces for piece in row] or [empty_ids]),
        trained=np.concatenate(masks or [empty_mask]),
        bounds=np.concatenate([starts[:, None], ends], axis=1).astype(np.int64),
        roles=np.asarray(
            [[branch.role for branch in row.branches] for row in rows], np.int8
        ).reshape(len(rows), width - 1),
        margins=np.asarray([row.margin for row in rows], np.float64),
        order=order,
        places=[row.place for row in rows],
        report=report,
        fingerprint=fingerprint,
    )
