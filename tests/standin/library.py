"""`device.cpp`, compiled against the installed torch and loaded into this process."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")


def obstacle() -> str | None:
    """Why there can be no stand-in here, in one sentence; None if there can."""
    if _compiler() is None:
        return "no C++ compiler: the stand-in device cannot be built"
    if not sys.platform.startswith("linux"):
        return f"the stand-in is built for Linux only, not for {sys.platform}"
    if (_torch() / "lib" / "libtorch_cuda.so").exists():
        return "torch is built with CUDA: its own hooks are in the stand-in's place"
    return None


def load_device() -> None:
    """Put the device where torch looks for CUDA, which it does once, when it is imported.

    Raises:
        RuntimeError: it is too late, or it cannot be built.
    """
    if "torch" in sys.modules:
        raise RuntimeError("the stand-in must be loaded before torch is imported")
    reason = obstacle()
    if reason is not None:
        raise RuntimeError(reason)
    for part in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch() / "lib" / part), mode=ctypes.RTLD_GLOBAL)
    if ctypes.CDLL(str(_library()), mode=ctypes.RTLD_GLOBAL).install() != 1:
        raise RuntimeError("torch did not take the stand-in's hooks")


def _library() -> Path:
    """The compiled library, kept between sessions under the hash of all that it is made from."""
    version = (_torch() / "version.py").read_bytes()
    name = hashlib.sha256(SOURCE.read_bytes() + version).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"alignkit-standin-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to someone else")
    library = folder / f"{name}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "device.so"
            _compile(made)
            os.replace(made, library)  # two sessions may build at once
    return library


def _compile(target: Path) -> None:
    torch = _torch()
    command = [_compiler(), "-O0", "-std=c++20", "-fPIC", "-shared", SOURCE, "-o", target]
    command += [f"-I{torch}/include", f"-L{torch}/lib", "-lc10", "-ltorch_cpu"]
    subprocess.run([str(part) for part in command], check=True)


def _compiler() -> str | None:
    names = (os.environ.get("CXX", "c++"), "g++", "clang++")
    return next(filter(None, map(shutil.which, names)), None)


def _torch() -> Path:
    """Folder of the installed torch, found without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent
