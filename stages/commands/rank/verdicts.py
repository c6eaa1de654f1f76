"""What people said, kept at once: one JSON line per verdict, in a file to which is only ever added.

A line is on the disk before the next item is shown, so that no death of the process or the machine loses more than what
was not yet saved. Who judges an item again adds a line, and the last one counts. Several people may write at once.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal

from pydantic import Field, ValidationError

from schemas import Strict, read_stored
from schemas.commands import AnnotatorName, RankForm
from schemas.errors import refuse
from stages.runtime.workspace import lock

NOTE_CHARACTERS = 4000
Groups = list[list[int]]
"""Answers by their numbers, best first; those of one group are equally good."""


class Verdict(Strict):
    """What one person said of one item."""

    item: str
    annotator: AnnotatorName
    form: RankForm
    shown: list[int]
    """The answers' numbers in the order in which this person saw them."""
    verdict: Groups | Literal["up", "down"] | None
    """The answers' numbers, best first; a thumb; or null where the item was skipped."""
    note: str = Field(default="", max_length=NOTE_CHARACTERS)
    seconds: float = Field(ge=0)
    """How long the item was looked at."""
    at: str
    """When it was saved, in UTC."""


class Verdicts:
    """A file of verdicts."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.cut: Path | None = None
        """Where a last line was moved that a death or a full disk had cut; None where there was none."""

    def read(self, form: RankForm) -> list[Verdict]:
        """The last verdict of each person on each item, in the order of the first ones.

        Raises:
            StageError: a line is none of ours, or of another form.
        """
        latest: dict[tuple[str, str], Verdict] = {}
        with self._locked() as stream:
            for number, line in enumerate(stream, 1):
                try:
                    one = read_stored(Verdict, line.decode())
                except (ValidationError, UnicodeDecodeError) as error:
                    fix = "restore the file, or name another --output"
                    raise refuse("line", number, f"{self.file} holds a line that is no verdict.", fix) from error
                if one.form != form:
                    message = f"{self.file} holds verdicts of the form {one.form}."
                    raise refuse("--form", form, message, f"use --form {one.form}, or name another --output")
                latest[one.annotator, one.item] = one
        return list(latest.values())

    def add(self, verdict: Verdict) -> None:
        """Append a verdict; it is on the disk when this returns. Raises OSError where there is no room."""
        with self._locked() as stream:
            stream.write(verdict.model_dump_json().encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    @contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        """The file, this process's alone, whole lines in it; reading begins at its first line, and writing adds."""
        with lock(self.file), self.file.open("a+b") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(size - 1, 0))
            if size and stream.read(1) != b"\n":
                stream.seek(0)
                content = stream.read()
                end = content.rfind(b"\n") + 1
                self.cut = self.file.with_name(f"{self.file.name}.cut")
                with self.cut.open("ab") as aside:
                    aside.write(content[end:] + b"\n")
                    aside.flush()
                    os.fsync(aside.fileno())
                stream.truncate(end)
            stream.seek(0)
            yield stream
