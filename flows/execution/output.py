"""What a stage prints, and whether it still does anything.

All its lines go into a file. A bounded number goes to the flow's log: Prefect keeps each in its database.
"""

import contextlib
import logging
import os
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import psutil

from schemas.text import visible

Log = logging.Logger | logging.LoggerAdapter[logging.Logger]

PIECE = 1 << 16
"""Bytes of a line that are read at once. A line may be longer than memory."""
SHOWN = 2000
"""Characters of a line that the flow's log gets."""
LINES = 1000
"""Lines that may come at once; the same number again of warnings and errors."""
LINE_SECONDS = 20.0
"""One more may come every so often: a long training says how far it is all the time."""
LAST = 50
"""Of the lines that were left out, so many are shown at the end: they tell why a stage failed."""
FILE_BYTES = 100 << 20
LEVELS = (("warning: ", logging.WARNING), ("error: ", logging.ERROR), ("critical: ", logging.CRITICAL))


def pass_on(line: str, log: Log) -> None:
    """Log one line of a stage at the level that it begins with."""
    line = visible(line)  # a library may print past the stage's own log
    for name, level in LEVELS:
        if line.startswith(name):
            log.log(level, "%s", line.removeprefix(name))
            return
    if line:
        log.info("%s", line)


class Output:
    """The lines of a stage, on their way into its file and the flow's log; a context manager."""

    def __init__(self, log: Log, file: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.log, self.file, self.clock = log, file, clock
        self.pieces = 0
        """Read so far: grows as long as the stage prints."""
        self.left_out = 0
        self._last: deque[str] = deque(maxlen=LAST)
        self._room = {False: float(LINES), True: float(LINES)}  # for lines of a level, and for others
        self._asked = {False: clock(), True: clock()}
        self._begun = False  # a line, whose end is still to come
        self._written = 0
        self._stream: IO[bytes] | None = None

    def __enter__(self) -> Self:
        with contextlib.suppress(OSError):  # a full disk does not stop a stage
            self._stream = self.file.open("wb", buffering=0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError):
                self._stream.close()
        if self.left_out:
            first = self.left_out - len(self._last)
            if first:
                self.log.warning("%d lines left out: see %s", first, self.file)
            for line in self._last:
                pass_on(line, self.log)
        if self._written > FILE_BYTES:
            self.log.warning("%s ends after %d MB; the stage has printed more", self.file, FILE_BYTES >> 20)

    def add(self, piece: bytes) -> None:
        """Take in a line, or the next part of a long one."""
        self.pieces += 1
        begins, self._begun = not self._begun, not piece.endswith(b"\n")
        text = visible(piece.decode(errors="replace").rstrip("\r\n"))
        self._keep(text if self._begun else f"{text}\n")
        if not begins:
            return  # the log has its beginning
        line = text if len(text) <= SHOWN else f"{text[:SHOWN]}... (cut: see {self.file})"
        if self._has_room(line.startswith(tuple(name for name, _ in LEVELS))):
            pass_on(line, self.log)
        else:
            self.left_out += 1
            self._last.append(line)

    def _has_room(self, grave: bool) -> bool:
        now = self.clock()
        self._room[grave] = min(LINES, self._room[grave] + (now - self._asked[grave]) / LINE_SECONDS)
        self._asked[grave] = now
        if self._room[grave] < 1:
            return False
        self._room[grave] -= 1
        return True

    def _keep(self, text: str) -> None:
        if self._stream is None or self._written > FILE_BYTES:
            return
        content = text.encode()
        self._written += len(content)
        try:
            self._stream.write(content)
        except OSError:  # see above
            self._stream.close()
            self._stream = None


class Watch:
    """Stops a process that shows no sign of progress for some minutes."""

    # What a stage that computes, loads or publishes does now and then, and one that is stuck does not. Its use of the
    # processor tells nothing: a loop without end and a collective that waits for a dead rank are busy too.
    BUSY_BYTES = 1 << 20
    """Read or written between two looks: an upload prints nothing for hours."""

    def __init__(self, process: "subprocess.Popen[bytes]", output: Output, work: Path, minutes: float | None) -> None:
        self.process, self.output, self.work, self.minutes = process, output, work, minutes or 0.0
        self.hangs = False
        self._done = threading.Event()
        self._seen: tuple[int, float] = (-1, 0.0)
        self._bytes = 0

    @contextlib.contextmanager
    def calling(self, stop: Callable[["subprocess.Popen[bytes]"], None]) -> Iterator[None]:
        """Watch while this holds; `stop` ends a process that hangs."""
        if not self.minutes:
            yield
            return
        thread = threading.Thread(target=self._watch, args=(stop,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()

    def _watch(self, stop: Callable[["subprocess.Popen[bytes]"], None]) -> None:
        # Looks are counted, not seconds: after a night in which the machine, or this process, slept, nothing hangs.
        pause, looks = min(60.0, 60 * self.minutes / 4), 0
        while not self._done.wait(pause):
            looks = 0 if self._progress() else looks + 1
            if looks * pause >= 60 * self.minutes:
                self.hangs = True
                stop(self.process)
                return

    def _progress(self) -> bool:
        """Whether there is a sign of progress since the last look."""
        before, read_before = self._seen, self._bytes
        self._seen, self._bytes = (self.output.pieces, self._touched()), self._moved()
        return self._seen != before or abs(self._bytes - read_before) > self.BUSY_BYTES

    def _touched(self) -> float:
        """When something in the work folder last changed: its metrics, a checkpoint."""
        newest = 0.0
        for folder, _, files in os.walk(self.work):
            for name in [".", *files]:
                with contextlib.suppress(OSError):
                    newest = max(newest, os.stat(os.path.join(folder, name)).st_mtime)
        return newest

    def _moved(self) -> int:
        """Bytes that the process, those below it and those of its group (its fork) have read and written, as far as the
        system tells.
        """
        total, group = 0, self.process.pid
        with contextlib.suppress(psutil.Error):
            main = psutil.Process(group)
            below = {group, *(child.pid for child in main.children(recursive=True))}
            for one in psutil.process_iter():
                with contextlib.suppress(psutil.Error, AttributeError, OSError):
                    if one.pid in below or os.getpgid(one.pid) == group:
                        counters = one.io_counters()
                        total += counters.read_chars + counters.write_chars  # type: ignore[attr-defined]
        return total
