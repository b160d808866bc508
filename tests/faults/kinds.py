"""Kinds of faults. Each prepares a work, disturbs it, goes on, and compares with the twin.

A function takes the workshop, a generator of random numbers and the name of a work, and returns the
number of steps that had to be done again. It fails with an AssertionError.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from commandline import Done

from faults import damage
from faults.children import Moment, run, send
from faults.works import STAGES, WORKS, Work
from faults.workshop import (
    Workshop,
    check_leftovers,
    check_refusal,
    check_success,
    last_step,
    resumed_at,
)

Story = list[str]
"""What was done, for whoever wants to see it again."""
Fault = Callable[[Workshop, random.Random, Work, Story], int]


def _go_on(
    shop: Workshop, work: Work, story: Story, *, metrics: bool = True, cards: bool = True
) -> int:
    """Go on after a fault, compare, and count the steps that were done again."""
    reached = last_step(shop.here / "run") if work.trains else 0
    done = run(shop.commands, work.again, shop.here)
    story.append(f"went on after step {resumed_at(done)} of {reached}")
    check_success(done)
    shop.compare(work, metrics=metrics, cards=cards)
    return max(0, reached - resumed_at(done)) if work.trains else 0


def _moment(shop: Workshop, rng: random.Random, work: Work, *, at_calls: bool) -> Moment:
    twin = shop.twin(work)
    if at_calls:
        return Moment(call=rng.randint(1, twin.calls), after=rng.random() < 0.5)
    return Moment(delay=rng.uniform(0.0, twin.seconds))


def _disturbed(shop: Workshop, work: Work, moment: Moment, story: Story) -> Done:
    story.append(str(moment))
    done = run(shop.commands, work.command, shop.here, moment)
    assert "Traceback" not in done.stderr, done.stderr[-400:]
    if work.name == "merge again":  # one model is there at every moment, the old or the new
        for path in (shop.twin(work).folder / "run" / "merged").glob("*.safetensors"):
            now = shop.here / "run" / "merged" / path.name
            assert now.is_file(), "the kill left no merged model under its name"
            assert now.read_bytes() == path.read_bytes(), "the kill left half a merged model"
    return done


def kill_at_a_call(shop: Workshop, rng: random.Random, work: Work, story: Story) -> int:
    """SIGKILL before or after a call that changes the file system."""
    moment = _moment(shop, rng, work, at_calls=True)
    shop.prepare(work)
    _disturbed(shop, work, moment, story)
    return _go_on(shop, work, story)


def kill_at_a_time(shop: Workshop, rng: random.Random, work: Work, story: Story) -> int:
    """SIGKILL at any moment."""
    moment = _moment(shop, rng, work, at_calls=False)
    shop.prepare(work)
    _disturbed(shop, work, moment, story)
    return _go_on(shop, work, story)


def kill_the_resume(shop: Workshop, rng: random.Random, work: Work, story: Story) -> int:
    """SIGKILL while a killed run is resumed, once or twice."""
    calls = shop.twin(work).calls
    shop.half(work)
    reached = last_step(shop.here / "run")
    for _ in range(rng.randint(1, 2)):
        moment = Moment(call=rng.randint(1, calls // 2), after=rng.random() < 0.5)
        story.append(str(moment))
        run(shop.commands, work.again, shop.here, moment)
    return max(_go_on(shop, work, story), 0) + max(0, reached - last_step(shop.here / "run"))


def interrupt(shop: Workshop, rng: random.Random, work: Work, story: Story) -> int:
    """Ctrl-C or a termination at any moment."""
    number = rng.choice([signal.SIGINT, signal.SIGTERM])
    moment = Moment(delay=rng.uniform(0.0, shop.twin(work).seconds), number=number)
    shop.prepare(work)
    done = _disturbed(shop, work, moment, story)
    story.append(f"ended with {done.code}")
    early = done.code == 1 and not done.stderr  # before the command itself had begun
    wanted = done.code in (0, 130, 143, -number) or early
    assert wanted, f"exit code {done.code}: {done.stderr[-300:]}"
    return _go_on(shop, work, story)


def damage_a_checkpoint(shop: Workshop, rng: random.Random, work: Work, story: Story) -> int:
    """A file of the newest checkpoint is damaged; the one before is whole."""
    shop.half(work)
    path = rng.choice(sorted(damage.newest(shop.here / "run").iterdir()))
    name = rng.choice(sorted(damage.DAMAGES))
    story.append(f"{path.name}: {name}")
    damage.DAMAGES[name](path, rng)
    return _go_on(shop, work, story)


def damage_the_checkpoints(shop: Workshop, rng: random.Random, work: Work, story: Story) -> int:
    """Checkpoints go, or strange ones come."""
    shop.half(work)
    name = rng.choice(sorted(damage.FOLDERS))
    story.append(name)
    damage.FOLDERS[name](shop.here / "run")
    if (shop.here / "run" / "checkpoints").is_file():
        check_refusal(run(shop.commands, work.again, shop.here))
        (shop.here / "run" / "checkpoints").unlink()
    return _go_on(shop, work, story)


def damage_a_small_file(shop: Workshop, rng: random.Random, work: Work, story: Story) -> int:
    """run.json, recipe.yaml, plan.json or metrics.jsonl is damaged; all checkpoints are whole."""
    shop.half(work)
    name = rng.choice(["run.json", "recipe.yaml", "plan.json", "metrics.jsonl"])
    how = rng.choice(sorted(damage.DAMAGES))
    story.append(f"{name}: {how}")
    damage.DAMAGES[how](shop.here / "run" / name, rng)
    reached = last_step(shop.here / "run")
    done = run(shop.commands, work.again, shop.here)
    if name in ("run.json", "recipe.yaml") and done.code != 0:
        check_refusal(done)
        story.append("refused")
        return 0
    check_success(done)
    whole = name != "metrics.jsonl"
    shop.compare(work, metrics=whole, cards=whole)
    return max(0, reached - resumed_at(done))


CHANGES: dict[str, Callable[[Path, Path, random.Random], Path]] = {
    "base": lambda here, base, rng: _flipped(base / "model.safetensors", rng),
    "configuration of the base": lambda here, base, rng: _edited(base / "config.json"),
    "rows": lambda here, base, rng: _doubled(next(here.glob("*.used"))),
    "template": lambda here, base, rng: _respaced(here / "chat.jinja"),
}


def _flipped(path: Path, rng: random.Random) -> Path:
    damage.flip(path, rng)
    return path


def _doubled(path: Path) -> Path:
    target = path.with_suffix(".jsonl") if path.suffix == ".used" else path
    text = target.read_text(encoding="utf-8")
    target.write_text(text + text.splitlines()[0] + "\n", encoding="utf-8")
    return target


def _respaced(path: Path) -> Path:
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("<|im_start|>", "<|im_start|> "), encoding="utf-8")
    return path


def _edited(path: Path) -> Path:
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, "rms_norm_eps": 1e-3}), encoding="utf-8")
    return path


def change_an_input(shop: Workshop, rng: random.Random, work: Work, story: Story) -> int:
    """Base, rows or template are others when a run is resumed: refused; and go on once they are
    back.
    """
    shop.half(work)
    (shop.here / f"{work.name}.used").touch()
    name = rng.choice(sorted(CHANGES))
    story.append(name)
    kept = {p: (p.read_bytes(), p.stat()) for p in shop.base.iterdir()}
    kept |= {p: (p.read_bytes(), p.stat()) for p in shop.here.iterdir() if p.is_file()}
    try:
        changed = CHANGES[name](shop.here, shop.base, rng)
        assert changed.read_bytes() != kept[changed][0]
        check_refusal(run(shop.commands, work.again, shop.here))
    finally:
        for path, (content, _) in kept.items():
            if path.read_bytes() != content:
                path.write_bytes(content)
    (shop.here / f"{work.name}.used").unlink()
    return _go_on(shop, work, story)


def change_the_recipe(shop: Workshop, rng: random.Random, work: Work, story: Story) -> int:
    """A key of the recipe is another when a run is resumed: refused by name."""
    shop.half(work)
    key = rng.choice(["training.learning_rate=0.001", "seed=7", "data.max_length=128"])
    story.append(key)
    done = run(shop.commands, (*work.again, key), shop.here)
    check_refusal(done)
    assert key.partition("=")[0].rpartition(".")[2] in done.stderr, done.stderr[-300:]
    return _go_on(shop, work, story)


def can_mount(folder: Path) -> bool:
    """Whether a file system of memory can be mounted here."""
    try:
        with small_disk(folder / "probe", "64k"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of some size at a new folder; what it holds is kept in the folder after it."""
    folder.mkdir(parents=True, exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(["mount", *options], check=True, capture_output=True)
    try:
        yield
    finally:
        aside = folder.with_name(f"{folder.name}-aside")
        shutil.copytree(folder, aside, symlinks=True)
        subprocess.run(["umount", str(folder)], check=True, capture_output=True)
        folder.rmdir()
        aside.rename(folder)


def fill_the_disk(shop: Workshop, rng: random.Random, work: Work, story: Story) -> int:
    """The disk of the run folder is full at some point; there is room when it is resumed."""
    twin = shop.twin(work).folder
    needed = sum(p.stat().st_size for p in (twin / "run").rglob("*") if p.is_file()) // 1024
    shop.prepare(work)
    size = rng.choice([rng.randint(4, 60), rng.randint(4, max(needed, 8))])
    story.append(f"{size} of {needed} kB")
    with small_disk(shop.here / "run", f"{size}k"):
        done = run(shop.commands, work.command, shop.here)
    if done.code != 0:
        check_refusal(done)
    check_leftovers(shop.here / "run")
    return _go_on(shop, work, story)


LIMIT = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (_SIZE_, resource.RLIM_INFINITY))
"""
"""Code for `before` of a command: no file of it may grow beyond this."""


def limit_files(shop: Workshop, rng: random.Random, work: Work, story: Story) -> int:
    """No file may grow beyond a size, as on some file systems and under some quotas."""
    twin = shop.twin(work).folder
    sizes = sorted(p.stat().st_size for p in twin.rglob("*.safetensors"))
    size = rng.choice([rng.randint(100, 5000), rng.randint(5000, sizes[-1])])
    story.append(f"{size} bytes")
    shop.prepare(work)
    done = run(shop.commands, work.command, shop.here, before=LIMIT.replace("_SIZE_", str(size)))
    if done.code != 0:
        check_refusal(done)
    check_leftovers(shop.here)
    return _go_on(shop, work, story)


def rename_the_project(shop: Workshop, rng: random.Random, work: Work, story: Story) -> int:
    """The folder of recipe, rows and run has another name: go on, or say why not."""
    shop.half(work)
    there = shop.here.with_name("there")
    shutil.rmtree(there, ignore_errors=True)
    shop.here.rename(there)
    done = run(shop.commands, work.again, there)
    story.append(f"ended with {done.code}")
    if done.code != 0:
        check_refusal(done)
    there.rename(shop.here)
    return _go_on(shop, work, story)


def run_two(shop: Workshop, rng: random.Random, work: Work, story: Story) -> int:
    """A second process wants the folder of a running one: refused, and the first is untouched."""
    shop.twin(work)
    shop.prepare(work)
    more = rng.choice([(), ("--resume",), ("--overwrite",)])
    story.append(f"a second process with {' '.join(more) or 'nothing'}")
    other = shop.second_server()  # before the first runs, whose server is busy then
    first = shop.commands.start(*work.command, cwd=shop.here)
    until = time.monotonic() + 60
    while not (shop.here / "run" / "run.json").exists() and time.monotonic() < until:
        time.sleep(0.01)
    send(first.pid, signal.SIGSTOP)  # or it might be done before the second has begun
    second = run(other, (*work.command, *more), shop.here)
    send(first.pid, signal.SIGCONT)
    done = first.wait()
    check_refusal(second)
    check_success(done)
    shop.compare(work)
    return 0


EVERYTHING = tuple(WORKS)

KINDS: dict[str, tuple[Fault, tuple[str, ...], int]] = {
    "killed at a file call": (kill_at_a_call, EVERYTHING, 12),
    "killed at any moment": (kill_at_a_time, EVERYTHING, 8),
    "killed while resuming": (kill_the_resume, STAGES, 6),
    "interrupted": (interrupt, (*STAGES, "pipeline"), 3),
    "a file of the newest checkpoint damaged": (damage_a_checkpoint, STAGES, 8),
    "checkpoints gone or strange": (damage_the_checkpoints, STAGES, 4),
    "run.json, recipe, plan or metrics damaged": (damage_a_small_file, STAGES, 8),
    "base, rows or template changed": (change_an_input, STAGES, 2),
    "recipe changed": (change_the_recipe, STAGES, 1),
    "disk full": (fill_the_disk, STAGES, 5),
    "files limited in size": (limit_files, EVERYTHING, 4),
    "project folder renamed": (rename_the_project, STAGES, 1),
    "a second process": (run_two, STAGES, 1),
}
"""Kind -> what happens, to which works, and how often among others."""
