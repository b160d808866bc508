"""Asking a server: once or twice, within a deadline, for an answer of bounded size.

It is not trusted: it cannot send us elsewhere, keep us waiting, or fill the memory.
"""

from __future__ import annotations

import http.client
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from alignkit.errors import RewardError
from alignkit.recipe.addresses import hide_secrets

_PAUSE = 1.0
"""Seconds before an unreachable server is tried once more."""


@dataclass(frozen=True)
class _Answer:
    """What a server sent: status, reason, the address it points to, and the body's beginning."""

    status: int
    reason: str
    location: str
    body: bytes


def post(
    address: str,
    body: bytes,
    *,
    seconds: float,
    room: int,
    key: str = "reward.url",
    headers: Mapping[str, str] | None = None,
) -> bytes:
    """The body of a good answer to JSON that is sent.

    A failed connection is tried once more; a late, long or wrong answer is not, and no redirection
    is followed.

    Args:
        address: of the server.
        body: JSON.
        seconds: for all of it, from the first try to the last byte.
        room: bytes of the longest answer that is read.
        key: of the recipe that names the address, for hints.
        headers: further ones.

    Raises:
        RewardError: no answer in time, no connection, or another answer than a good one.
    """
    shown = hide_secrets(address)
    deadline, reason = time.monotonic() + seconds, ""
    request = urllib.request.Request(
        address,
        data=body,
        headers={"Content-Type": "application/json", **(headers or {})},
        method="POST",
    )
    for attempt in range(2):
        if attempt:
            time.sleep(max(0.0, min(_PAUSE, deadline - time.monotonic())))
        try:
            answer = _within(deadline, lambda: _ask(request, deadline, room))
        except TimeoutError:
            raise RewardError(
                f"{shown}: gave no answer within {seconds:g} seconds",
                hint="raise reward.timeout, or lower rollout.prompts_per_step",
            ) from None
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        else:
            return _good(answer, shown, room, key)
    raise RewardError(
        f"{shown}: cannot be reached, tried twice: {reason}",
        hint=f"start the server, or check {key}",
    )


def _good(answer: _Answer, shown: str, room: int, key: str) -> bytes:
    """The body of an answer that is one."""
    if 300 <= answer.status < 400:
        place = hide_secrets(answer.location)[:200]
        raise RewardError(
            f"{shown}: answered HTTP {answer.status}: it redirects to {place!r}, which is not "
            "followed",
            hint=f"put the address that answers into {key}, if you trust it",
        )
    if answer.status >= 400:
        raise RewardError(
            f"{shown}: answered HTTP {answer.status} {answer.reason[:120]}: "
            f"{start_of(answer.body)}",
            hint="see the server's own log",
        )
    if len(answer.body) > room:
        raise RewardError(
            f"{shown}: answered more than {room:,} bytes, which is not read further",
            hint="answer the scores and nothing else",
        )
    return answer.body


def _within(deadline: float, ask: Callable[[], _Answer]) -> _Answer:
    """The answer, if it is there in time; asked by a thread, because no timeout of a socket bounds
    the look-up of a name or an answer that comes byte by byte.

    Raises:
        TimeoutError: it is not.
    """
    answers: queue.SimpleQueue[_Answer | Exception] = queue.SimpleQueue()

    def deliver() -> None:
        try:
            answers.put(ask())
        except Exception as error:
            answers.put(error)

    threading.Thread(target=deliver, daemon=True).start()
    try:
        answer = answers.get(timeout=max(0.0, deadline - time.monotonic()))
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _ask(request: urllib.request.Request, deadline: float, room: int) -> _Answer:
    # without the handlers for redirections, ftp:// and file://
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    try:
        with opener.open(request, timeout=max(0.001, deadline - time.monotonic())) as opened:
            return _Answer(opened.status, "", "", _read(opened, deadline, room))
    except urllib.error.HTTPError as error:
        with error:
            location = error.headers.get("Location", "")
            try:
                text = _read(error, deadline, 400)
            except (OSError, http.client.HTTPException):
                text = b""
            return _Answer(error.code, str(error.reason), location, text)
    except urllib.error.URLError as error:
        raise (error.reason if isinstance(error.reason, OSError) else error) from None


def _read(opened: Any, deadline: float, room: int) -> bytes:
    """The body, or a little more than `room` bytes of it."""
    body = bytearray()
    while len(body) <= room:
        if time.monotonic() > deadline:
            raise TimeoutError
        part = opened.read1(1 << 16)
        if not part:
            if getattr(opened, "length", None):  # less than was announced
                raise http.client.IncompleteRead(bytes(body))
            return bytes(body)
        body += part
    return bytes(body)


def start_of(reply: bytes) -> str:
    """The first 120 characters of an answer, on one line."""
    text = " ".join(reply[:400].decode("utf-8", "replace").split())
    return repr(text if len(text) <= 120 else text[:117] + "...")
