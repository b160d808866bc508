"""Time and memory for what others have written and is run here: a template, a pattern."""

from __future__ import annotations

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator


class TimeUp(BaseException):
    """Raised in the middle of what takes too long, which cannot catch it as an `Exception`."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End what runs inside after some time: loops, matches of `re`, arithmetic of large numbers.

    Args:
        seconds: above 0. It holds in the main thread only, which is where signals arrive.

    Raises:
        TimeUp: the time is over.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """Let what runs inside take so much more memory; on Linux only.

    Args:
        size: bytes of addresses besides those that the process has now.

    Raises:
        MemoryError: it asks for more.
    """
    try:
        with open("/proc/self/statm", "rb", buffering=0) as sizes:
            pages = int(sizes.read().split()[0])
    except OSError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + size
    if 0 <= soft <= limit:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
