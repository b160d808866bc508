"""A model's own responses -> preference pairs by a reward model: best against worst."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from alignkit.data.prompts import Prompt, PromptSet, load_prompts
from alignkit.data.report import DataReport, describe_rows
from alignkit.errors import DataError, RunError
from alignkit.files import output_path, replace_file
from alignkit.jobs.candidates import (
    Candidate,
    SampleSettings,
    Say,
    judge_answers,
    open_answering,
    room_for_prompts,
    sample_answers,
)
from alignkit.jobs.precision import dtype_for
from alignkit.recipe.reading.label import LabelSpec
from alignkit.recipe.rows import SourceSpec

EMPTY = "fewer than two answers say anything"
EQUAL = "all answers are equal"
CUT_OFF = "the chosen answer was cut off at max_new_tokens: it teaches to stop there"
OTHER_TOKENS = "its prompt is read back as other tokens than the model answered"


@dataclass(frozen=True)
class LabelSummary:
    """What labelling wrote and measured.

    Args:
        output: the file of pairs.
        prompts: number of prompts that were answered.
        pairs: number of pairs that were written.
        answers: number of responses that were sampled.
        cut_off: number of responses that did not end within max_new_tokens.
        mean: mean reward of all responses.
        best: mean over the prompts of their best reward.
        worst: the same of their worst.
        left_out: reason -> number of prompts without a pair.
        notes: doubt -> number of pairs that are written anyway.
    """

    output: str
    prompts: int
    pairs: int
    answers: int
    cut_off: int
    mean: float
    best: float
    worst: float
    left_out: dict[str, int]
    notes: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Plain values; rewards under metric names."""
        rewards = {f"rewards/{name}": getattr(self, name) for name in ("mean", "best", "worst")}
        counts = {name: getattr(self, name) for name in ("prompts", "pairs", "answers", "cut_off")}
        rest = {"left_out": self.left_out, "notes": self.notes}
        return {"output": self.output, **counts, **rewards, **rest}

    def lines(self) -> list[str]:
        """The same in words."""
        cut = f", {self.cut_off:,} of them cut off" if self.cut_off else ""
        return [
            f"{self.answers:,} answers to {self.prompts:,} prompts{cut}: reward {self.mean:.4f} "
            f"on average, best {self.best:.4f}, worst {self.worst:.4f}",
            f"{self.pairs:,} pairs in {self.output}",
        ]


def label_prompts(
    spec: LabelSpec, path: Path, say: Say, *, base: str | None = None, overwrite: bool = False
) -> LabelSummary:
    """Answer prompts and write preference pairs; the file is whole or not there.

    Args:
        spec: models, prompts and sampling.
        path: of the file, which ends with .jsonl; its folder is created.
        say: gets lines about what happens.
        base: of an adapter as `spec.model`, if it names another.
        overwrite: replace the file.

    Raises:
        RunError: the file exists.
        ModelError: a model is not what it should be, or their tokens differ.
        DataError: no prompt is left, or no pair.
    """
    check_target(path, overwrite=overwrite)
    for source in spec.prompts:
        if source.path is not None and Path(source.path).resolve() == path.resolve():
            raise RunError(f"{path} holds the prompts that are read", hint="name another file")
    dtype = dtype_for(spec.model, spec.dtype, base)
    opened = open_answering(spec.model, spec.reward, dtype, base)
    tokenizer, room = opened.tokenizer, room_for_prompts(opened, spec.max_new_tokens)
    prompts = load_prompts(
        spec.prompts, tokenizer, max_length=room, too_long="drop", seed=spec.seed
    )
    for line in describe_rows("prompts", prompts.report):
        say(line)
    settings = SampleSettings(spec.samples, spec.max_new_tokens, spec.temperature, spec.seed, dtype)
    rollouts = sample_answers(opened, prompts, settings, say)
    del opened  # the reward model takes its place in memory
    candidates = judge_answers(rollouts, spec.reward, dtype, say)
    rows, report = _make_rows(spec, prompts.prompts, candidates)
    if not rows:
        raise DataError(
            f"no pair is left of {len(prompts):,} prompts: {'; '.join(report.lines()[1:])}",
            hint="raise the temperature or the number of samples, or lower the margin",
        )
    _write_rows(path, rows, prompts, tokenizer, report)
    for line in report.lines()[1:]:
        say(f"pairs: {line}")
    return _summary(path, candidates, report)


def check_target(path: Path, *, overwrite: bool) -> None:
    """Refuse a file that must not be written.

    Args:
        path: of the file.
        overwrite: it may exist.

    Raises:
        RunError: it exists, is a folder, or has another suffix.
    """
    if path.suffix != ".jsonl":
        raise RunError(
            f"pairs are written as .jsonl, one row a line, got {path}",
            hint=f"name it {path.with_suffix('.jsonl')}",
        )
    output_path(path)
    if path.is_dir():
        raise RunError(f"{path} is a folder", hint="name a file")
    if path.exists() and not overwrite:
        raise RunError(f"{path} exists already", hint="add --overwrite, or name another file")


def pick_pair(candidates: Sequence[Candidate], margin: float) -> tuple[Candidate, Candidate] | str:
    """The best and the worst response, or why they make no pair. Of equal ones the first counts.

    Args:
        candidates: for one prompt.
        margin: rewards no further apart make no pair.
    """
    texts = [candidate for candidate in candidates if candidate.text]
    if len(texts) < 2:
        return EMPTY
    best = max(texts, key=lambda candidate: candidate.reward)
    others = [candidate for candidate in texts if candidate.text != best.text]
    if not others:
        return EQUAL
    worst = min(others, key=lambda candidate: candidate.reward)
    if best.reward - worst.reward <= margin:
        return f"best and worst reward differ by no more than {margin:g}"
    return best, worst


def _make_rows(
    spec: LabelSpec, prompts: Sequence[Prompt], candidates: Sequence[Sequence[Candidate]]
) -> tuple[list[tuple[int, dict[str, Any]]], DataReport]:
    """Number of the prompt and row of each pair, and the counts of prompts without one."""
    report, rows = DataReport(rows=len(prompts), prompts=True), []
    for number, (prompt, own) in enumerate(zip(prompts, candidates, strict=True)):
        picked = pick_pair(own, spec.margin)
        if isinstance(picked, str):
            report.drop(picked, prompt.place)
            continue
        if picked[0].finish == "length":
            report.note(CUT_OFF, prompt.place)
        row: dict[str, Any] = {"prompt": prompt.shown}
        if prompt.columns.get("tools") and not isinstance(prompt.shown, str):
            row["tools"] = prompt.columns["tools"]
        for name, candidate in zip(("chosen", "rejected"), picked, strict=True):
            text = candidate.text
            plain = isinstance(prompt.shown, str)
            row[name] = text if plain else [{"role": "assistant", "content": text}]
        for name, candidate in zip(("chosen", "rejected"), picked, strict=True):
            row[f"{name}_reward"] = round(candidate.reward, 6)
        rows.append((number, {**row, "model": spec.model, "reward_model": spec.reward}))
    report.kept = len(rows)
    return rows, report


def _write_rows(
    path: Path,
    rows: Sequence[tuple[int, dict[str, Any]]],
    prompts: PromptSet,
    tokenizer: PreTrainedTokenizerBase,
    report: DataReport,
) -> None:
    """Write the rows, and read them back before the file is in place."""
    with replace_file(path) as written:
        with open(written, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for _, row in rows)
        source = SourceSpec(path=str(written.resolve()))
        stored = load_prompts([source], tokenizer, max_length=10**9, too_long="error", seed=0)
        for (number, _), read in zip(rows, stored.prompts, strict=True):
            asked = prompts.prompts[number]
            if not np.array_equal(asked.ids, read.ids):
                report.note(OTHER_TOKENS, asked.place)


def _summary(
    path: Path, candidates: Sequence[Sequence[Candidate]], report: DataReport
) -> LabelSummary:
    rewards = np.asarray([[candidate.reward for candidate in own] for own in candidates])
    return LabelSummary(
        output=str(path),
        prompts=len(candidates),
        pairs=report.kept,
        answers=rewards.size,
        cut_off=sum(candidate.finish == "length" for own in candidates for candidate in own),
        mean=float(rewards.mean()),
        best=float(rewards.max(1).mean()),
        worst=float(rewards.min(1).mean()),
        left_out=report.dropped,
        notes=report.notes,
    )
