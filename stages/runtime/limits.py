"""Bounds on what foreign code or data may take of this process: seconds, and memory beyond what is in use."""

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType


class TooMuch(Exception):
    """A bound was passed; the message says which."""


@contextlib.contextmanager
def limited(seconds: float, size: int) -> Iterator[None]:
    """Let the block take so long, and so many bytes more. In the main thread only: elsewhere no bound can be set.

    Raises:
        TooMuch: it takes more.
    """
    statm = Path("/proc/self/statm")
    if threading.current_thread() is not threading.main_thread() or not statm.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = int(statm.read_text().split()[0]) * resource.getpagesize() + size
    allowed = [bound, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    before = signal.signal(signal.SIGALRM, _stop)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (min(allowed), hard))
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    except _Late:
        raise TooMuch(f"it takes more than {seconds:g} seconds") from None
    except MemoryError:
        raise TooMuch(f"it takes more than {size >> 20} MiB of memory") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class _Late(BaseException):
    """No Exception: what runs inside may catch those."""


def _stop(signum: int, frame: FrameType | None) -> None:
    raise _Late
