"""How a base wants its text to be generated, as far as transformers will save it again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from alignkit.models.base.files import reading, reason
from alignkit.models.base.loading import BaseModel, load_config
from alignkit.models.quiet import quiet_transformers

_FILE = "generation_config.json"
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id")
"""What is kept of settings that cannot be repaired."""


_TEXTS = {"cache_implementation", "early_stopping", "stop_strings", "transformers_version"}
"""Settings that may be text."""


def generation_settings(base: BaseModel) -> tuple[GenerationConfig | None, str]:
    """The base's settings, repaired where transformers refuses to save them.

    Returns:
        The settings, or None if it has none; and what was changed in them, or nothing.

    Raises:
        ModelError: the file cannot be read.
    """
    if base.gguf is not None:
        return None, ""
    if Path(base.location).is_dir():
        if not (Path(base.location) / _FILE).is_file():
            return None, ""
        with reading(base.location, _FILE):
            settings = GenerationConfig.from_pretrained(base.location)
    else:
        try:
            with quiet_transformers():
                settings = GenerationConfig.from_pretrained(base.location)
        except OSError:
            return None, ""
    rows = None
    if not Path(base.location).is_dir() or (Path(base.location) / "config.json").is_file():
        rows = getattr(load_config(base).get_text_config(), "vocab_size", None)
    settings, change = repaired(settings, rows)
    return settings, f"{_FILE} of {base.name}: {change}" if change else ""


def repaired(settings: Any, rows: int | None = None) -> tuple[Any, str]:
    """Generation settings that transformers saves, and what was changed in them.

    Args:
        settings: changed in place.
        rows: of the vocabulary, which no id of theirs may be beyond; None if it is not known.
    """
    odd = [key for key in _KEPT if _leave_out(settings, key, rows)]
    texts = [
        key
        for key, value in vars(settings).items()
        if isinstance(value, str) and key not in _TEXTS and not key.startswith("_")
    ]
    for key in texts:
        setattr(settings, key, None)
    settings, change = _saved(settings)
    size = "" if rows is None else f" of {rows}"
    said = f"{', '.join(odd)} beyond the vocabulary{size} left out" if odd else ""
    wrong = f"{', '.join(texts)} left out, which must not be text" if texts else ""
    return settings, "; ".join(filter(None, [said, wrong, change]))


def _leave_out(settings: Any, key: str, rows: int | None) -> bool:
    """Remove what is no token of the vocabulary; whether there was any. Some write -1 for none."""
    value = getattr(settings, key, None)
    ids = value if isinstance(value, list) else [value]
    most = float("inf") if rows is None else rows
    kept = [one for one in ids if one is None or (type(one) is int and -1 <= one < most)]
    if len(kept) < len(ids):
        setattr(settings, key, (kept if isinstance(value, list) else None) or None)
    return len(kept) < len(ids)


def _saved(settings: Any) -> tuple[Any, str]:
    """Settings that transformers saves."""
    refused = _refused(settings)
    if not refused:
        return settings, ""
    names = ", ".join(refused)
    sampling, settings.do_sample = settings.do_sample, True
    if not sampling and not _refused(settings):  # what temperature or top_p must have meant
        return settings, f"do_sample is set to true, without which transformers refuses {names}"
    settings.do_sample = sampling
    for name in refused:
        setattr(settings, name, None)
    if not _refused(settings):
        return settings, f"{names} left out, which transformers refuses"
    kept = {key: getattr(settings, key, None) for key in _KEPT}
    return GenerationConfig(**kept), f"only token ids kept: transformers refuses {names}"


def _refused(settings: Any) -> list[str]:
    """Names of the settings for which transformers would not save them; empty if it would."""
    try:
        with quiet_transformers():
            settings.validate(strict=True)
    except Exception as error:  # a wrong type in the file may end in any error
        return re.findall(r"^- `(\w+)`", str(error), re.MULTILINE) or [reason(error)]
    return []
