"""What the machine may run out of, told from the words of whatever library noticed."""

import re

from schemas.environment import HOME
from schemas.errors import Problem
from schemas.text import one_line
from stages.runtime import workspace

LACKS = (
    ("disk", r"No space left on device|disk is full|Disk quota exceeded", HOME, "make room there (alignflow clean)"),
    ("disk", r"Read-only file system|Permission denied|readonly database", HOME, "make it writable"),
    ("memory", r"MemoryError|OutOfMemory|can't allocate memory|out of memory", "tokens_per_micro_batch", "lower it"),
)


def out_of_resource(error: BaseException) -> Problem | None:
    """The problem of an error that means that the machine ran out of something."""
    return lack_in(f"{type(error).__name__}: {error}", str(error))


def lack_in(text: str, message: str | None = None) -> Problem | None:
    """The same of a log's end; the message is the line that says so."""
    for kind, words, field, fix in LACKS:
        line = next((line for line in text.splitlines() if re.search(words, line, re.IGNORECASE)), None)
        if line is not None:
            value = str(workspace.home()) if field == HOME else None
            again = "then start it again: it resumes from its last checkpoint"
            said = one_line(line if message is None else message, 500)
            return Problem(kind=kind, message=f"{said}.", field=field, value=value, fix=f"{fix}, {again}")
    return None
