"""What foreign code may take: seconds and memory, in the main thread; nothing stays bounded afterwards."""

import resource
import signal
import threading
import time

import pytest

from stages.runtime import limits
from stages.runtime.limits import TooMuch, limited


def test_both_bounds_and_what_is_left_of_them() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(TooMuch, match=r"more than 0\.2 seconds"), limited(0.2, 1 << 30):
        while True:
            try:
                sum(range(1000))
            except Exception:  # what runs inside cannot catch it
                continue
    with pytest.raises(TooMuch, match="more than 64 MiB"), limited(60, 64 << 20):
        bytearray(128 << 20)
    with limited(60, 256 << 20):
        assert len(bytearray(128 << 20)) == 128 << 20
    with pytest.raises(KeyError), limited(60, 1 << 30):
        raise KeyError
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_meets_a_finalizer_is_sent_again() -> None:
    """Python ignores what is raised in a finalizer: the first signal ends the finalizer alone."""
    met: list[bool] = []

    class Slow:
        def __del__(self) -> None:
            try:
                time.sleep(20)
            finally:
                met.append(True)

    end = time.monotonic() + 20
    with pytest.raises(TooMuch, match=r"more than 0\.2 seconds"), limited(0.2, 1 << 30):
        Slow()
        assert met == [True]
        while time.monotonic() < end:
            sum(range(1000))


def test_a_signal_that_comes_while_bounds_are_lifted_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would leave the process with the block's bound on its memory for good."""
    before, set_timer = resource.getrlimit(resource.RLIMIT_AS), signal.setitimer

    def slow(which: int, *values: float) -> None:
        if values[0] == 0.0:
            time.sleep(1.5 * limits._AGAIN)
        set_timer(which, *values)

    monkeypatch.setattr(signal, "setitimer", slow)
    with pytest.raises(TooMuch, match=r"more than 0\.1 seconds"), limited(0.1, 1 << 30):
        while True:
            sum(range(1000))
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_a_block_within_a_block_leaves_the_outer_bound_as_it_was() -> None:
    end = time.monotonic() + 20
    with pytest.raises(TooMuch, match=r"more than 0\.2 seconds"), limited(0.2, 1 << 30):
        with limited(10, 1 << 30):
            pass
        while time.monotonic() < end:
            sum(range(1000))
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_another_thread_is_not_bounded() -> None:
    """A bound is the process's: the main thread alone may set it, and take it away again."""
    seen: list[tuple[int, int]] = []

    def run() -> None:
        with limited(0.01, 1):
            seen.append(resource.getrlimit(resource.RLIMIT_AS))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [resource.getrlimit(resource.RLIMIT_AS)]
