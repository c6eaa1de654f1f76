"""How far a long stage is, as a bar on Prefect's page of its run. Read from the stage's own lines in the log."""

import logging
import re
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows.execution.live import Line
from flows.execution.output import Log
from schemas.text import one_line

FIRST_SECONDS = 20.0
"""A stage that is done sooner needs no bar."""
EVERY_SECONDS = 20.0
"""Prefect keeps each state of the bar in its database."""


class Progress(logging.LoggerAdapter[Any]):
    """A stage's log that shows its progress on the Prefect server too, now and then. No stage fails, or waits for a
    server that is away, because of it.
    """

    def __init__(self, log: Log, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(log)  # type: ignore[arg-type]  # an adapter on top of Prefect's
        self.clock, self.line = clock, Line(name, clock())
        self.artifact: UUID | None = None
        self.next = clock() + FIRST_SECONDS

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Pass the line on, and show what it says of the progress."""
        super().log(level, msg, *args, **kwargs)
        now = self.clock()
        if level != logging.INFO or now < self.next:
            return
        self.line.read(str(msg) % args if args else str(msg), now)
        if self.line.total:
            self.next = now + EVERY_SECONDS
            self.show(100 * self.line.done / self.line.total)

    def show(self, percent: float) -> None:
        """Make the bar, or move it."""
        about = f"{self.line.name}: {self.line.done} of {self.line.total} {self.line.unit} {self.line.what}".rstrip()
        try:
            with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
                if self.artifact is None:
                    key = re.sub(r"[^a-z0-9]+", "-", f"progress-{self.line.name.lower()}").strip("-")
                    self.artifact = create_progress_artifact(percent, key, one_line(about, 200))  # type: ignore[assignment]
                else:
                    update_progress_artifact(self.artifact, percent, one_line(about, 200))
        except Exception as error:  # whatever the server or the network is up to
            logging.getLogger("alignflow").debug("Prefect does not show the progress: %s", error)

    def done(self) -> None:
        """The stage is done: where there is a bar, it is full."""
        if self.artifact is not None:
            self.line.done = self.line.total
            self.show(100.0)
