"""Files as a failing disk, a power cut or a careless hand leaves them."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

Damage = Callable[[Path, random.Random], None]


def flip(path: Path, rng: random.Random) -> None:
    """One bit is another."""
    content = bytearray(path.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(content))


def high_bit(path: Path, rng: random.Random) -> None:
    """The highest bit of a byte is another: text is no UTF-8 any more."""
    content = bytearray(path.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 128
    path.write_bytes(bytes(content))


def zero(path: Path, rng: random.Random) -> None:
    """The length is right and all bytes are NUL."""
    path.write_bytes(bytes(path.stat().st_size))


def cut(path: Path, rng: random.Random) -> None:
    """The end is missing."""
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(max(len(content), 1))])


def empty(path: Path, rng: random.Random) -> None:
    """Nothing is in it."""
    path.write_bytes(b"")


def delete(path: Path, rng: random.Random) -> None:
    """It is gone."""
    path.unlink()


def wrong_json(path: Path, rng: random.Random) -> None:
    """It holds JSON of another kind."""
    values = ["[]", "null", "5", '"text"', "{}", "[1, 2]", '{"step": "two"}', "true", "[{}]"]
    path.write_text(rng.choice(values), encoding="utf-8")


def other_text(path: Path, rng: random.Random) -> None:
    """It holds something else altogether."""
    path.write_bytes(rng.randbytes(200))


def folder_instead(path: Path, rng: random.Random) -> None:
    """A folder has its name."""
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Damage] = {
    "flipped": flip,
    "high bit": high_bit,
    "zeros": zero,
    "cut": cut,
    "empty": empty,
    "deleted": delete,
    "other JSON": wrong_json,
    "noise": other_text,
    "a folder": folder_instead,
}
"""Name -> what is done to a file."""


def newest(run: Path) -> Path:
    """Folder of the newest checkpoint."""
    return max((run / "checkpoints").glob("step-[0-9]*"))


def _gone(run: Path) -> None:
    shutil.rmtree(newest(run))


def _file_of_a_later_step(run: Path) -> None:
    (run / "checkpoints" / "step-999999").write_text("", encoding="utf-8")


def _empty_later_step(run: Path) -> None:
    (run / "checkpoints" / "step-999999").mkdir()


def _no_number(run: Path) -> None:
    (run / "checkpoints" / "step-later").mkdir()


def _all_gone(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def _file_instead(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("", encoding="utf-8")


def _half_written(run: Path) -> None:
    shutil.copytree(newest(run), run / "checkpoints" / ".writing-step-000006-abc" / "step-000006")


FOLDERS: dict[str, Callable[[Path], None]] = {
    "newest checkpoint gone": _gone,
    "a file with the name of a later checkpoint": _file_of_a_later_step,
    "an empty later checkpoint": _empty_later_step,
    "a checkpoint without a number": _no_number,
    "no checkpoints": _all_gone,
    "a file for a folder": _file_instead,
    "a checkpoint half written": _half_written,
}
"""Name -> what is done to the checkpoints as a whole."""
