"""pipeline.json: what a pipeline has started and finished; whole even after a kill."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit.errors import FileError, RunError
from alignkit.files import make_folder, read_json, require_folder_name, take_lock, write_text


@dataclass(frozen=True)
class Record:
    """What is known of a stage since it was last started.

    Args:
        output: the folder that it writes.
        inputs: everything that decides its result.
        status: `running`, `finished`, `failed` or `interrupted`.
        replaces: mark of the output that it replaces; empty if there was none.
        mark: of its output when it had finished.
        seconds: that its runs took, those before a resume included, as far as known.
        numbers: its results.
    """

    output: str
    inputs: dict[str, str]
    status: str = "running"
    replaces: str = ""
    mark: str = ""
    seconds: float = 0.0
    numbers: dict[str, Any] = field(default_factory=dict)


class PipelineState:
    """The records of a pipeline's stages, owned by this process until `close`.

    Args:
        folder: of the pipeline; created.
        source: the pipeline file.
        overwrite: take over the folder of another pipeline.

    Raises:
        RunError: the folder is in use or serves something else.
    """

    def __init__(self, folder: Path, source: Path, *, overwrite: bool) -> None:
        require_folder_name(folder)
        if (folder / "run.json").is_file():
            raise RunError(
                f"{folder} is the folder of a run, not of a pipeline",
                hint="choose another output for the pipeline",
            )
        make_folder(folder)
        self.path, self.source = folder / "pipeline.json", str(source)
        lock = take_lock(folder / ".lock")
        if lock is None:
            raise RunError(
                f"{folder} is in use by another process",
                hint="wait for it, or choose another output",
            )
        self.lock = lock
        try:
            self.records = self._read(overwrite)
        except RunError:
            self.close()
            raise

    def _read(self, overwrite: bool) -> dict[str, Record]:
        if not self.path.is_file():
            return {}
        try:
            stored = read_json(self.path)
            records = {name: Record(**values) for name, values in stored["stages"].items()}
            source = stored["pipeline"]
        except (FileError, KeyError, TypeError, AttributeError) as error:
            if overwrite:
                return {}
            what = f"{self.path} is not the record of a pipeline"
            raise RunError(
                error.message if isinstance(error, FileError) else what,
                hint="restore it, or add --overwrite to run all stages anew",
            ) from None
        if source != self.source and not overwrite:
            raise RunError(
                f"{self.path.parent} belongs to the pipeline {source}",
                hint="choose another folder with output=runs/another-name, or add --overwrite",
            )
        return records

    def write(self, name: str, record: Record) -> None:
        """Store a stage's record; it is on the disk when this returns."""
        self.records[name] = record
        stages = {name: dataclasses.asdict(record) for name, record in self.records.items()}
        write_text(
            self.path, json.dumps({"pipeline": self.source, "stages": stages}, indent=2) + "\n"
        )

    def close(self) -> None:
        """Let other processes use the folder; one that holds no record keeps nothing of ours."""
        if not self.path.is_file():
            self.path.with_name(".lock").unlink(missing_ok=True)
        self.lock.close()
