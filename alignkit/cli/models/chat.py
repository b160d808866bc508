"""`alignkit chat`: talk to a model; answers appear as they are written."""

from __future__ import annotations

import difflib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from alignkit.cli.models.decoding import MaxNewTokensOption, SeedOption, TopPOption
from alignkit.cli.models.generate import BaseOption, DtypeOption, ModelArgument, open_for_inference
from alignkit.cli.output import print_error, say, stdout
from alignkit.cli.versions import warn_of_versions
from alignkit.errors import AlignkitError
from alignkit.terminal import plain

HELP = """\
/system TEXT     set the system message and start over; without TEXT remove it
/set NAME VALUE  temperature, top_p, top_k, min_p, typical_p, max_new_tokens, stop,
                 repetition_penalty, beams, seed
/retry           answer the last message again, with the next seed
/undo            take back the last message and its answer
/save FILE       append the conversation to a .jsonl file, ready for training
/clear           start over
/quit            leave (Ctrl-D does too)"""


@dataclass
class Conversation:
    """What has been said so far.

    Args:
        opened: model and tokenizer.
        settings: decoding; changed by /set.
        turns: messages, the system message first if there is one.
    """

    opened: Any
    settings: Any
    turns: list[dict[str, str]] = field(default_factory=list)

    def answer(self) -> None:
        """Stream an answer to the last message; Ctrl-C keeps what was written so far."""
        from alignkit.generation.answers import stream_answer

        pieces: list[str] = []

        def write(text: str) -> None:
            pieces.append(text)
            sys.stdout.write(plain(text) if stdout.is_terminal else text)
            sys.stdout.flush()

        try:
            stream_answer(self.opened, self.turns, self.settings, write)
        except KeyboardInterrupt:
            say("\nstopped")
        except AlignkitError:
            self.turns.pop()
            raise
        sys.stdout.write("\n")
        self.turns.append({"role": "assistant", "content": "".join(pieces).strip()})

    def head(self) -> list[dict[str, str]]:
        """The system message, if there is one."""
        return [turn for turn in self.turns[:1] if turn["role"] == "system"]


def chat(
    model: ModelArgument,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.7,
    top_p: TopPOption = 0.95,
    max_new_tokens: MaxNewTokensOption = 512,
    seed: SeedOption = 0,
    dtype: DtypeOption = "auto",
    base: BaseOption = None,
) -> None:
    """Talk to a model."""
    warn_of_versions()
    from alignkit.generation.sampling import SamplingSettings

    settings = SamplingSettings(max_new_tokens, temperature, top_p, seed=seed)
    talk = Conversation(open_for_inference(model, dtype, base), settings)
    if system:
        talk.turns.append({"role": "system", "content": system})
    say(f"{model} is ready. /help lists the commands, /quit leaves.")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            say("")
            break
        except UnicodeDecodeError:
            print_error("that is not UTF-8 text\nhint: write it again")
            continue
        if line == "/quit":
            break
        if line:
            try:
                _follow(talk, line)
            except AlignkitError as error:
                print_error(str(error))


def _follow(talk: Conversation, line: str) -> None:
    """Run a command, or answer a message."""
    if not line.startswith("/"):
        talk.turns.append({"role": "user", "content": line})
        talk.answer()
        return
    name, _, rest = line[1:].partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, [*COMMANDS, "quit"], n=1)
        hint = f"did you mean /{near[0]}?" if near else "/help lists them"
        raise AlignkitError(f"there is no command /{name}", hint=hint)
    command(talk, rest.strip())


def _help(talk: Conversation, rest: str) -> None:
    say(HELP)


def _system(talk: Conversation, rest: str) -> None:
    talk.turns = [{"role": "system", "content": rest}] if rest else []
    say("system message set; the conversation starts over" if rest else "no system message")


def _set(talk: Conversation, rest: str) -> None:
    if not rest:
        say(", ".join(f"{name} {value}" for name, value in vars(talk.settings).items()))
        return
    name, _, value = rest.replace("=", " ").partition(" ")
    talk.settings = talk.settings.changed(name, value.strip())
    say(f"{name} is {getattr(talk.settings, name)}")


def _retry(talk: Conversation, rest: str) -> None:
    if len(talk.turns) < 2 or talk.turns[-1]["role"] != "assistant":
        raise AlignkitError("there is no answer to repeat", hint="say something first")
    talk.turns.pop()
    talk.settings = talk.settings.changed("seed", str(talk.settings.seed + 1))
    talk.answer()


def _undo(talk: Conversation, rest: str) -> None:
    if len(talk.turns) - len(talk.head()) < 2:
        raise AlignkitError("there is nothing to take back", hint="say something first")
    del talk.turns[-2:]
    say("took back the last message and its answer")


def _clear(talk: Conversation, rest: str) -> None:
    talk.turns = talk.head()
    say("the conversation starts over")


def _save(talk: Conversation, rest: str) -> None:
    if not rest:
        raise AlignkitError("/save needs a file name", hint="/save chats.jsonl")
    if len(talk.turns) == len(talk.head()):
        raise AlignkitError("there is nothing to save yet", hint="say something first")
    path = Path(rest).expanduser()
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": talk.turns}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise AlignkitError(
            f"{path} cannot be written: {error.strerror}",
            hint="name a file in a folder that exists and can be written to",
        ) from None
    say(f"appended {len(talk.turns)} messages to {path}")


COMMANDS = {
    "help": _help,
    "system": _system,
    "set": _set,
    "retry": _retry,
    "undo": _undo,
    "clear": _clear,
    "save": _save,
}
