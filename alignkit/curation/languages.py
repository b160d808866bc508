"""The language of a text, by py3langid's model of 97 languages, which comes with the package."""

from __future__ import annotations

from collections.abc import Sequence

from alignkit.errors import DataError

try:
    import py3langid
except ImportError:  # an extra: only looking at languages needs it
    py3langid = None


def language_of(text: str) -> str:
    """ISO 639-1 code of the most likely language.

    Args:
        text: of a row; the first 2,000 characters are read.

    Raises:
        DataError: the package is not installed.
    """
    if py3langid is None:
        raise DataError(
            "looking at languages needs the package py3langid, which is not installed",
            hint="pip install 'alignkit[data]', or leave out --languages",
        )
    return str(py3langid.classify(text[:2000])[0])


def known_languages(names: Sequence[str]) -> Sequence[str]:
    """The names, if each is a language that can be found.

    Args:
        names: ISO 639-1 codes.

    Raises:
        DataError: one is not, or the package is not installed.
    """
    if not names:
        return names
    language_of("")
    known = {name for name, _ in py3langid.rank("")}
    for name in names:
        if name not in known:
            raise DataError(
                f"--language {name} is not known", hint=f"one of {', '.join(sorted(known))}"
            )
    return names
