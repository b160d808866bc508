"""Files that a table cannot hold as text: binary, damaged or large ones.

Each function takes the path and the further keys of the file's mapping.
"""

from __future__ import annotations

import gzip as gzip_module
import json
import pickle
import struct
from pathlib import Path
from typing import Any


def repeat(path: Path, text: str, times: int, before: str = "", after: str = "") -> None:
    """A text many times over."""
    path.write_text(before + text * times + after, encoding="utf-8")


def numbered(path: Path, line: str, times: int, before: str = "") -> None:
    """A line many times over, with its number in place of N."""
    lines = (line.replace("N", str(number)) for number in range(times))
    path.write_text(before + "\n".join(lines) + "\n", encoding="utf-8")


def nested(path: Path, depth: int, before: str = "", after: str = "") -> None:
    """Brackets in brackets."""
    path.write_text(before + "[" * depth + "]" * depth + after, encoding="utf-8")


def encoded(path: Path, text: str, encoding: str) -> None:
    """A text in some encoding."""
    path.write_bytes(text.encode(encoding))


def hexadecimal(path: Path, digits: str) -> None:
    """These bytes."""
    path.write_bytes(bytes.fromhex(digits))


def gzipped(path: Path, text: str, keep: int | None = None) -> None:
    """A gzip file, cut after `keep` bytes."""
    path.write_bytes(gzip_module.compress(text.encode())[:keep])


def gzip_bomb(path: Path, megabytes: int) -> None:
    """A small gzip file of a great many spaces, in parts of 10 MB."""
    path.write_bytes(gzip_module.compress(b" " * 10**7) * (megabytes // 10))


def parquet(path: Path, rows: list[dict[str, Any]], keep: int | None = None) -> None:
    """A parquet file of rows, cut after `keep` bytes."""
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    if keep is not None:
        path.write_bytes(path.read_bytes()[:keep])


def parquet_bad_utf8(path: Path) -> None:
    """A text column whose bytes are no UTF-8."""
    import pyarrow
    import pyarrow.parquet

    def column(text: bytes) -> Any:
        offsets = pyarrow.py_buffer(struct.pack("<2i", 0, len(text)))
        return pyarrow.StringArray.from_buffers(1, offsets, pyarrow.py_buffer(text))

    columns = {"prompt": column(b"good"), "completion": column(b"bad \xff\xfe bytes")}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def cut(path: Path, keep: float) -> None:
    """The file that stands there, cut: to so many bytes, or to a share below 1."""
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep >= 1 else len(content) * keep)])


def flip(path: Path, at: int, bit: int = 7) -> None:
    """The file that stands there with one bit flipped."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(bytes(content))


def zeros(path: Path, count: int) -> None:
    """Nothing but NULs."""
    path.write_bytes(bytes(count))


def weights(
    path: Path,
    drop: str = "",
    add: str = "",
    reshape: str = "",
    fill: float | None = None,
    only: str = "",
) -> None:
    """The safetensors file that stands there with a tensor less, more, of another shape or value.

    Args:
        path: the file.
        drop: part of the names of tensors that go.
        add: name of a tensor that comes.
        reshape: part of the names of tensors that lose their last row.
        fill: value of all numbers of the tensors in `only`.
        only: part of their names.
    """
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {n: w for n, w in load_file(path).items() if not drop or drop not in n}
    if add:
        tensors[add] = torch.zeros(4)
    for name, weight in tensors.items():
        if reshape and reshape in name:
            tensors[name] = weight[:-1].clone()
        if fill is not None and only in name:
            tensors[name] = torch.full_like(weight, fill)
    save_file(tensors, path, metadata={"format": "pt"})


def pickled(path: Path) -> None:
    """A pickle that would run a command."""

    class Runs:
        def __reduce__(self) -> Any:
            return (open, (str(path.parent / "ran"), "w"))

    path.write_bytes(pickle.dumps(Runs()))


def safetensors_header(path: Path, size: int) -> None:
    """A safetensors file whose header claims to be of some size."""
    path.write_bytes(struct.pack("<Q", size) + b"{}")


def long_row(path: Path, characters: int) -> None:
    """One good row, and one with a very long answer."""
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "ab " * characters}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def more_tokens(path: Path, tokens: list[str]) -> None:
    """The tokenizer of a model folder with tokens that its model has no rows for."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(tokens)
    tokenizer.save_pretrained(path)


def big_endian(path: Path) -> None:
    """The magic number of a GGUF file, and nothing sensible after it."""
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60))


def chain(path: Path, length: int) -> None:
    """Recipes that extend one another; the last extends recipe.yaml."""
    for number in range(length):
        parent = f"{path.name}.{number + 1}" if number + 1 < length else "recipe.yaml"
        here = path if number == 0 else path.with_name(f"{path.name}.{number}")
        here.write_text(f"extends: {parent}\n", encoding="utf-8")


def replace(path: Path, old: str, new: str) -> None:
    """The text that stands there with a part replaced."""
    text = path.read_text(encoding="utf-8")
    assert old in text, (path, old)
    path.write_text(text.replace(old, new), encoding="utf-8")


def index(path: Path, weights: str, shown: str) -> None:
    """An index that says that all weights of a file stand in another.

    Args:
        path: of the index.
        weights: a file in the folder above.
        shown: name in the index.
    """
    from safetensors import safe_open

    with safe_open(path.parent.parent / weights, "pt") as file:
        names = dict.fromkeys(file.keys(), shown)
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": names})
    path.write_text(text, encoding="utf-8")


def grown_embedding(path: Path, base: str, rows: int) -> None:
    """The adapter that stands there, with a base's embedding that has some rows more.

    Args:
        path: its safetensors file.
        base: model folder.
        rows: how many come.
    """
    import torch
    from safetensors.torch import load_file, save_file

    embedding = load_file(Path(base) / "model.safetensors")["model.embed_tokens.weight"]
    grown = torch.cat([embedding, embedding[:rows]])
    tensors = load_file(path) | {"base_model.model.model.embed_tokens.weight": grown}
    save_file(tensors, path, metadata={"format": "pt"})
