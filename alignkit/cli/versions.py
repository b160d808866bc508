"""Whether the installed packages are the versions that alignkit declares in its metadata."""

from __future__ import annotations

import os

from alignkit.cli.output import say

ASIDE = {"test", "dev", "peers"}
"""Extras that no run needs."""


def outside_versions() -> list[str]:
    """One sentence for each installed package that is outside the declared range.

    The ranges are those of pyproject.toml, as in the metadata of the installed alignkit. Packages
    of optional extras count if they are installed; a checkout that was never installed declares
    nothing.
    """
    from importlib import metadata

    from packaging.requirements import Requirement

    try:
        own = metadata.metadata("alignkit")
    except metadata.PackageNotFoundError:
        return []
    extras = {"", *own.get_all("Provides-Extra", [])} - ASIDE
    sentences = []
    for need in map(Requirement, own.get_all("Requires-Dist", [])):
        if need.marker and not any(need.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        try:
            version = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            continue
        if not need.specifier.contains(version, prereleases=True):
            allowed = ",".join(sorted(map(str, need.specifier), reverse=True))
            sentences.append(
                f"{need.name} {version} is outside {allowed}, the versions that this alignkit "
                f"supports: pip install '{need.name}{allowed}'"
            )
    return sentences


def warn_of_versions() -> None:
    """Print what `outside_versions` finds; of several training processes only the first does."""
    if os.environ.get("RANK", "0") == "0":
        for sentence in outside_versions():
            say(f"warning: {sentence}")
