"""The `alignkit` command. Nothing here, nor in any module it imports, imports torch."""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from typing import NoReturn

import typer

import alignkit
from alignkit.cli.commands import CommandList
from alignkit.cli.output import print_error, say
from alignkit.errors import AlignkitError
from alignkit.terminal import plain

app = typer.Typer(
    name="alignkit",
    cls=CommandList,
    help="Fine-tune and align open language models from a small YAML recipe.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"alignkit {alignkit.__version__}\n")
        raise typer.Exit


@app.callback()
def common(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and stop."
    ),
) -> None:
    """Fine-tune and align open language models from a small YAML recipe."""


_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""What a disk answers, wherever something is written."""


def main() -> None:
    """Run the command line; a broken rule exits with 2, a bug with 1, an interruption with 130."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # micro-batches of many lengths leave holes
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    _print_anything()
    try:
        app()
    except AlignkitError as error:
        print_error(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except MemoryError:
        print_error(
            "memory ran out\n"
            "hint: use a smaller file, model or batch; a training run continues with --resume"
        )
        sys.exit(2)
    except OSError as error:
        if error.errno not in _REFUSED:
            _report_bug()
        where = f"{error.filename}: " if error.filename else ""
        print_error(f"{where}{_refusal(error)}")
        sys.exit(2)
    except Exception:
        _report_bug()


def _print_anything() -> None:
    """Characters that the terminal's encoding lacks become question marks, not errors."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _refusal(error: OSError) -> str:
    """What the system refused, and what to do."""
    name = error.filename
    unreadable = bool(name) and os.path.exists(name) and not os.access(name, os.R_OK)
    if error.errno == errno.EACCES and unreadable:
        hint = "change its permissions, or name another file"
        return f"cannot be read: {error.strerror}\nhint: {hint}"
    return (
        f"cannot be written: {error.strerror}\n"
        "hint: free disk space or choose another folder; a training run continues with --resume"
    )


def _report_bug() -> NoReturn:
    sys.stderr.write(plain(traceback.format_exc()))
    print_error("this is a bug in alignkit\nhint: please report it with the lines above")
    sys.exit(1)
