"""What foreign code may take: seconds and memory, in the main thread; nothing stays bounded afterwards."""

import resource
import signal
import threading
import time

import pytest

from stages.runtime import limits
from stages.runtime.limits import TooMuch, limited


def forever() -> None:
    while True:
        sum(range(1000))


def stubborn() -> None:
    while True:
        try:
            sum(range(1000))
        except Exception:  # what runs inside cannot catch it
            continue


def bounds() -> tuple[object, ...]:
    """What must be as it was after a call."""
    return resource.getrlimit(resource.RLIMIT_AS), signal.getitimer(signal.ITIMER_REAL), limits._inside


def test_both_bounds_and_what_is_left_of_them() -> None:
    before = bounds()
    assert before[1:] == ((0.0, 0.0), False)
    with pytest.raises(TooMuch, match=r"more than 0\.2 seconds"):
        limited(stubborn, 0.2, 1 << 30)
    with pytest.raises(TooMuch, match="more than 64 MiB"):
        limited(lambda: bytearray(128 << 20), 60, 64 << 20)
    assert len(limited(lambda: bytearray(128 << 20), 60, 256 << 20)) == 128 << 20
    with pytest.raises(KeyError):
        limited(lambda: {}["x"], 60, 1 << 30)
    assert bounds() == before


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

    def run() -> None:
        Slow()
        assert met == [True]
        while time.monotonic() < end:
            sum(range(1000))

    with pytest.raises(TooMuch, match=r"more than 0\.2 seconds"):
        limited(run, 0.2, 1 << 30)


def test_a_signal_that_comes_while_bounds_are_lifted_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would leave the process with the call's bound on its memory for good."""
    before, set_timer = resource.getrlimit(resource.RLIMIT_AS), signal.setitimer

    def slow(which: int, *values: float) -> None:
        if values[0] == 0.0:
            time.sleep(1.5 * limits._AGAIN)
        set_timer(which, *values)

    monkeypatch.setattr(signal, "setitimer", slow)
    with pytest.raises(TooMuch, match=r"more than 0\.1 seconds"):
        limited(forever, 0.1, 1 << 30)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.parametrize("end", ["returns", "raises"])
def test_a_signal_at_any_moment_of_a_call_leaves_no_bound(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal raised past the place that lifts the bounds would end whatever runs later, again and again."""

    def call() -> None:
        sum(range(200))
        if end == "raises":
            raise MemoryError

    monkeypatch.setattr(limits, "_AGAIN", 5e-5)
    before, late = bounds(), 0
    for number in range(4000):
        try:
            limited(call, 1e-6 * (1 + number % 60), 1 << 30)
        except TooMuch as error:
            late += "seconds" in str(error)
        assert bounds() == before
    assert 0 < late < 4000


def test_a_call_within_a_call_leaves_the_outer_bound_as_it_was() -> None:
    end = time.monotonic() + 20

    def run() -> None:
        limited(lambda: None, 10, 1 << 30)
        while time.monotonic() < end:
            sum(range(1000))

    with pytest.raises(TooMuch, match=r"more than 0\.2 seconds"):
        limited(run, 0.2, 1 << 30)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_another_thread_is_not_bounded() -> None:
    """A bound is the process's: the main thread alone may set it, and take it away again."""
    seen: list[tuple[int, int]] = []
    run = lambda: limited(lambda: seen.append(resource.getrlimit(resource.RLIMIT_AS)), 0.01, 1)  # noqa: E731
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [resource.getrlimit(resource.RLIMIT_AS)]
