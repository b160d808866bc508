"""Sources -> one TokenDataset: parsed, tokenized, cached by content, mixed by weight."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import itertools
import json
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alignkit.data.documents import Branch, Document
from alignkit.data.examples import parse_rows
from alignkit.data.report import DataReport
from alignkit.data.sources import Source, load_source, mix_sources
from alignkit.data.tokenize import TokenizeSettings, tokenize_examples
from alignkit.errors import FileError
from alignkit.files import replace_file
from alignkit.packed import IntArray, Role
from alignkit.recipe.rows import SourceSpec

CACHE_FORMAT = 5
"""Increased whenever the same rows would be tokenized differently: cached tokens are made anew."""
_KEY_FORMAT = 2
"""Part of the fingerprints of runs, which must stay resumable: a run compares its tokens too."""


@dataclass(frozen=True)
class TokenDataset(Sequence[Document]):
    """Tokenized rows in one flat array. `n` rows of `B` branches, `m` items.

    Args:
        ids: `[T]` ids of all rows, one after another, each prompt before its branches.
        trained: `[T]` mask of trained tokens.
        bounds: `[n, B + 2]` where the prompt, each branch and the row end: row `r` has its prompt
            in `bounds[r, 0]:bounds[r, 1]` and branch `k` in `bounds[r, k + 1]:bounds[r, k + 2]`.
        roles: `[n, B]` the `Role` of each branch.
        margins: `[n]` how much better the chosen completion is; 0 if the row does not say.
        order: `[m]` row of each dataset item; rows with a weight above 1 appear repeatedly.
        places: `file:line` of each row.
        report: what happened to the rows.
        fingerprint: hash of everything that determined the tokens.
        partners: `[n, 2]` for each row another row, and how many tokens of its first branch follow
            this row's prompt as a mismatched branch; None: no such branch.
        references: `[n, branches]` log-probs under the reference model, the mismatched branch
            last; NaN for a row that was not scored, None if no row was.
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
        edges = self.bounds[row].tolist()
        prompt, *pieces = (slice(begin, end) for begin, end in itertools.pairwise(edges))
        roles = self.roles[row].tolist()
        if self.partners is not None:
            other, length = self.partners[row].tolist()
            begin = int(self.bounds[other, 1])
            pieces.append(slice(begin, begin + length))
            roles.append(Role.MISMATCHED)
        known = self.references
        references = [math.nan] * len(pieces) if known is None else known[row].tolist()
        branches = tuple(
            Branch(self.ids[piece], self.trained[piece], Role(role), reference)
            for piece, role, reference in zip(pieces, roles, references, strict=True)
        )
        return Document(self.ids[prompt], branches, row, float(self.margins[row]))

    @property
    def num_rows(self) -> int:
        """Rows, whether or not an item uses them: `n`."""
        return len(self.bounds)

    @property
    def lengths(self) -> IntArray:
        """`[m]` tokens of each item, a mismatched branch included."""
        rows: IntArray = self.bounds[:, -1] - self.bounds[:, 0]
        if self.partners is not None:
            rows = rows + self.partners[:, 1]
        return rows[self.order].astype(np.int64)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, a prompt and one of its completions."""
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

    @property
    def content(self) -> str:
        """Hash of the tokens, masks and order themselves, whatever files they came from."""
        digest = hashlib.sha256()
        for name in ("ids", "trained", "bounds", "roles", "margins", "order", "partners"):
            array = getattr(self, name)
            if array is not None:
                digest.update(f"{name}:{array.dtype}:{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

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
    report, parts, keys = DataReport(), [], []
    for spec in specs:
        source = load_source(spec)
        key = _cache_key(source, spec, identity, settings)
        stored = hashlib.sha256(f"{key}:{CACHE_FORMAT}".encode()).hexdigest()
        path = cache / f"{stored}.npz"
        part = _read_cache(path)
        if part is None:
            examples = parse_rows(source.rows, spec.format, settings.rows)
            documents, counts = tokenize_examples(examples, tokenizer, settings)
            part = _flatten(documents, [examples[d.row].place for d in documents], counts)
            _write_cache(path, part)
        parts.append(part)
        keys.append(key)
        report.merge(part.report)
    order = mix_sources(specs, [part.num_rows for part in parts], seed, report)
    mixture = json.dumps([keys, [spec.weight for spec in specs], seed])
    fingerprint = hashlib.sha256(mixture.encode()).hexdigest()
    return dataclasses.replace(_join(parts), order=order, report=report, fingerprint=fingerprint)


def tokenizer_identity(tokenizer: Any) -> str:
    """Hash of all that the tokenizer does to text, its chat template included, and its date."""
    parts = [str(tokenizer.chat_template), str(tokenizer.eos_token), str(tokenizer.bos_token)]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts.append(backend.to_str() if backend is not None else str(tokenizer.get_vocab()))
    if "strftime_now" in parts[0]:
        parts.append(datetime.date.today().isoformat())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _cache_key(source: Source, spec: SourceSpec, identity: str, settings: TokenizeSettings) -> str:
    parts = {
        "format": _KEY_FORMAT,
        "content": source.fingerprint,
        "label": spec.label,  # places name the file
        "take": spec.take,
        "columns": spec.columns,
        "row_format": spec.format,
        "tokenizer": identity,
        "settings": dataclasses.asdict(settings),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read_cache(path: Path) -> TokenDataset | None:
    if not path.is_file():
        return None
    try:
        with np.load(path) as stored:
            arrays = {key: stored[key] for key in stored.files}
        meta = json.loads(arrays.pop("meta").tobytes())
        places, report = meta["places"], DataReport(**meta["report"])
        order = np.arange(len(places))
        part = TokenDataset(**arrays, order=order, places=places, report=report, fingerprint="")
        return part if _is_sound(part) else None
    except (OSError, ValueError, KeyError, TypeError, EOFError, IndexError, zipfile.BadZipFile):
        return None  # damaged, or written by another release: tokenize again


def _is_sound(part: TokenDataset) -> bool:
    """Whether arrays that were read from a file fit together."""
    rows, width = part.roles.shape
    edges = np.concatenate([[0], part.bounds.reshape(-1), [len(part.ids)]])
    shapes = part.bounds.shape, part.margins.shape, part.trained.shape, (len(part.places),)
    return (
        shapes == ((rows, width + 2), (rows,), part.ids.shape, (rows,))
        and bool((np.diff(edges) >= 0).all())
        and bool(np.isin(part.roles, list(Role)).all())
    )


def _write_cache(path: Path, part: TokenDataset) -> None:
    """Store the tokens; a failed write does not stop the run."""
    meta = {"places": part.places, "report": dataclasses.asdict(part.report)}
    arrays = {
        name: getattr(part, name) for name in ("ids", "trained", "bounds", "roles", "margins")
    }
    with contextlib.suppress(OSError, FileError), replace_file(path) as written:
        np.savez(written, **arrays, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8))


def _flatten(documents: list[Document], places: list[str], report: DataReport) -> TokenDataset:
    """The rows of one source."""
    prompts = [Branch(d.prompt, np.zeros(len(d.prompt), bool)) for d in documents]
    pieces = [b for p, d in zip(prompts, documents, strict=True) for b in (p, *d.branches)]
    rows, width = len(documents), len(documents[0].branches) if documents else 1
    edges = np.cumsum([0, *(len(piece.ids) for piece in pieces)], dtype=np.int64)
    roles = np.asarray([[branch.role for branch in d.branches] for d in documents], np.int8)
    return TokenDataset(
        ids=np.concatenate([np.zeros(0, np.int32), *(piece.ids for piece in pieces)]),
        trained=np.concatenate([np.zeros(0, bool), *(piece.trained for piece in pieces)]),
        bounds=edges[np.arange(rows)[:, None] * (width + 1) + np.arange(width + 2)],
        roles=roles.reshape(rows, width),
        margins=np.asarray([d.margin for d in documents], np.float64),
        order=np.arange(rows),
        places=places,
        report=report,
        fingerprint="",
    )


def _join(parts: list[TokenDataset]) -> TokenDataset:
    """The rows of all sources, one after another; order, report and fingerprint are not joined."""
    parts = [
        part for part in parts if part.num_rows
    ]  # without rows the number of branches is unknown
    starts = np.cumsum([0, *(len(part.ids) for part in parts[:-1])])
    return dataclasses.replace(
        parts[0],
        ids=np.concatenate([part.ids for part in parts]),
        trained=np.concatenate([part.trained for part in parts]),
        bounds=np.concatenate([p.bounds + n for p, n in zip(parts, starts, strict=True)]),
        roles=np.concatenate([part.roles for part in parts]),
        margins=np.concatenate([part.margins for part in parts]),
        places=[place for part in parts for place in part.places],
    )
