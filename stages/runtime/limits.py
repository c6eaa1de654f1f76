"""Bounds on what foreign code or data may take of this process: seconds, and memory beyond what is in use."""

import os
import resource
import signal
import threading
from collections.abc import Callable
from functools import cache
from types import FrameType
from typing import TypeVar

T = TypeVar("T")


class TooMuch(Exception):
    """A bound was passed; the message says which."""


def limited(call: Callable[[], T], seconds: float, size: int) -> T:
    """What the call returns, if it takes no longer and no more bytes than so. In the main thread only: elsewhere no
    bound can be set.

    Raises:
        TooMuch: it takes more.
    """
    # Called for every row: no more than a few system calls. And no context manager: a signal that came while its
    # `__exit__` is being entered would be raised past it, and the bounds would stay. Between a call and the next
    # statement of one function Python runs no handler.
    global _inside
    taken = _memory() if threading.current_thread() is threading.main_thread() else None
    if taken is None:
        return call()
    _listen()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = taken + size
    inside, timer = _inside, signal.getitimer(signal.ITIMER_REAL)  # of a call around this one
    try:
        resource.setrlimit(resource.RLIMIT_AS, (min(bound, soft) if soft != resource.RLIM_INFINITY else bound, hard))
        _inside = True
        # Again and again: where the signal meets a finalizer, Python ignores what its handler raises.
        signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
        return call()
    except _Late:
        _inside = False
        raise TooMuch(f"it takes more than {seconds:g} seconds") from None
    except MemoryError:
        _inside = False
        raise TooMuch(f"it takes more than {size >> 20} MiB of memory") from None
    finally:
        _inside = False  # first: a signal that comes now must not keep the bounds from being lifted
        signal.setitimer(signal.ITIMER_REAL, *timer)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        _inside = inside


_AGAIN = 0.5  # seconds
_inside = False
"""Whether a bound holds now, so that a signal may end what runs."""


def _memory() -> int | None:
    """Bytes of this process's address space; None where the system does not tell."""
    try:
        descriptor = os.open("/proc/self/statm", os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return int(os.read(descriptor, 64).split()[0]) * resource.getpagesize()
    finally:
        os.close(descriptor)


@cache
def _listen() -> None:
    """Let SIGALRM, which nothing else here uses, end a block; once, since that takes longer than the rest."""
    signal.signal(signal.SIGALRM, _stop)


class _Late(BaseException):
    """No Exception: what runs inside may catch those."""


def _stop(signum: int, frame: FrameType | None) -> None:
    if _inside:
        raise _Late
