"""What a person asks to be removed from files of rows -> the options that do it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from alignkit.curation.clean import PRESETS, CleanOptions, Preset
from alignkit.curation.corpus import Track
from alignkit.curation.languages import known_languages, language_of
from alignkit.curation.recognizers import with_entities
from alignkit.curation.records import Columns
from alignkit.errors import DataError


@dataclass(frozen=True)
class CleanRequest:
    """What the command line asks for.

    Args:
        drop: reasons to remove a row, by name.
        preset: several of them under one name.
        least: words that an answer must have; None for any, or the preset's.
        most: words that it may have; None for any, or the preset's.
        languages: that stay; none keeps all.
        held_out: files whose rows are removed.
        mask: replace personal data by its kind.
        entities: of presidio that count as personal data.
        threshold: Jaccard similarity of near-duplicates.
        columns: of the files that are renamed.
    """

    drop: Sequence[str]
    preset: str | None
    least: int | None
    most: int | None
    languages: Sequence[str]
    held_out: Sequence[str]
    mask: bool
    entities: Sequence[str]
    threshold: float
    columns: Columns


def clean_options(request: CleanRequest, say: Callable[[str], None], track: Track) -> CleanOptions:
    """What is removed and changed.

    Args:
        request: what is asked for.
        say: prints a line: what a preset removes.
        track: tells how much is done.

    Raises:
        DataError: an unknown name, a package that is not installed, or nothing that was named.
    """
    preset = Preset(())
    if request.preset is not None:
        if request.preset not in PRESETS:
            raise DataError(
                f"--preset {request.preset} is not known", hint=f"one of {', '.join(PRESETS)}"
            )
        preset = PRESETS[request.preset]
        say(f"preset {request.preset}: {preset.line()}")
    options = CleanOptions(
        tuple(dict.fromkeys((*preset.drop, *request.drop))),
        request.held_out,
        request.mask,
        request.threshold,
        least=request.least or preset.least,
        most=request.most or preset.most,
        kept=known_languages(request.languages),
        language=language_of,
        recognize=with_entities(request.entities),
        columns=request.columns,
        track=track,
    )
    if not (options.drop or options.rules() or options.held_out or options.mask):
        raise DataError(
            "nothing to remove or change was named",
            hint="name it with --drop, --preset, --min-words, --max-words, --language, --held-out "
            "or --mask; `data check` says what is there",
        )
    return options
