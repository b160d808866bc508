"""Locations of the shipped recipes, templates and examples, and of alignkit's own files."""

from __future__ import annotations

import os
from pathlib import Path


def assets_root() -> Path:
    """Folder that holds the shipped `recipes/` and `data_templates/`.

    Returns:
        `alignkit/_assets` in an installed wheel, the repository in an editable install.
    """
    package = Path(__file__).resolve().parent.parent
    bundled = package / "_assets"
    return bundled if bundled.is_dir() else package.parent


def alignkit_home() -> Path:
    """Folder for fetched models and caches: `$ALIGNKIT_HOME`, else `~/.cache/alignkit`."""
    return Path(os.environ.get("ALIGNKIT_HOME") or Path.home() / ".cache" / "alignkit").expanduser()


def find_path(value: str, recipe_folders: tuple[Path, ...] = ()) -> Path | None:
    """First existing file or folder named by `value`.

    Args:
        value: a path as the user wrote it, absolute or relative.
        recipe_folders: folders of the recipe that names it and of the recipes it extends.

    Returns:
        The first match in the recipe's folders, the working folder and the shipped assets, in
        this order; None if there is none.
    """
    path = Path(os.path.expanduser(value))
    if path.is_absolute():
        return path if os.path.exists(path) else None  # False, too, for a name that is too long
    for folder in (*recipe_folders, Path.cwd(), assets_root()):
        if os.path.exists(folder / path):
            return (folder / path).resolve()
    return None


def show_file(path: Path) -> str:
    """The path as a user would type it: relative if it lies in the working folder."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
