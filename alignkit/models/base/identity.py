"""Telling one set of weights from another."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from alignkit.models.base.changes import BaseChanges
from alignkit.models.base.loading import BaseModel, load_config


def weights_fingerprint(base: BaseModel) -> str:
    """Hash that tells one set of weights from another.

    Covers the configuration, each weight file's name, size and head, and 64 samples spread over
    it, so a 70B model costs no more than a small one.

    Returns:
        Hex sha256; for a hub model the commit, if it is known.
    """
    folder = Path(base.location)
    digest = hashlib.sha256()
    if not folder.is_dir():
        load_config(base)  # afterwards its file is in the cache
        file = try_to_load_from_cache(base.location, "config.json")
        commit = Path(file).parent.name if isinstance(file, str) else "unknown"
        return f"{base.location}@{commit}"
    names = [base.gguf] if base.gguf else sorted(p.name for p in folder.glob("*.safetensors"))
    for name in names:
        path = folder / str(name)
        size = path.stat().st_size
        digest.update(f"{size}".encode())
        with open(path, "rb") as file:
            for sample in range(64):
                file.seek(sample * max(size - 65536, 0) // 63)
                digest.update(file.read(65536))
    config_file = folder / "config.json"
    if config_file.is_file():
        values = json.loads(config_file.read_text(encoding="utf-8"))
        values.pop("transformers_version", None)
        digest.update(json.dumps(values, sort_keys=True).encode())
    return digest.hexdigest()


def same_weights(one: str | None, two: str | None) -> bool:
    """Whether two fingerprints may be of the same weights.

    Older versions of transformers kept no commit: a hub model recorded as `id@unknown` may be any
    commit of it.
    """
    if one == two or one is None or two is None:
        return one == two
    (name, _, commit), (other, _, version) = one.rpartition("@"), two.rpartition("@")
    return bool(name) and name == other and "unknown" in (commit, version)


def weights_version(base: BaseModel) -> str:
    """A stricter hash for what is cached: the fingerprint, and when each file was last written.

    The fingerprint samples large files, so a change in one layer may escape it; a copy of the same
    weights has another version, which costs a second scoring and no more.
    """
    digest = hashlib.sha256(weights_fingerprint(base).encode())
    if base.changes != BaseChanges():
        digest.update(f"{base.changes!r}{base.changes.rows or ''}".encode())
    folder = Path(base.location)
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.suffix in (".safetensors", ".gguf", ".json", ".py"):
                digest.update(f"{path.name}:{path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()
