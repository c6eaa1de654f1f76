"""What a check of rows is asked, what it has seen so far, and what it finds."""

import hashlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from schemas.config.data import ValidateParams

if TYPE_CHECKING:
    from stages.engine.data.codec import Codec  # importing it takes seconds, and a check without a model does without

Progress = Callable[[int, int, str], None]


@dataclass
class Context:
    """One check of one source."""

    params: ValidateParams
    codec: "Codec | None" = None
    evaluation: Path | None = None
    """A data folder whose evaluation prompts must not be trained on."""
    rows: Path | None = None
    """Folder of stage `generate`, for `input:rows`."""
    seed: int = 0
    progress: Progress | None = None
    log_text: bool = True
    """Without it the quarantine holds no values and the report no column of unknown name: a CSV file without a header
    has its first row there."""
    place: Callable[[int], tuple[str, int]] = lambda row: ("", row)
    """Of a row's number in a frame: the name of its source where there are several, and its number there."""
    read: int = field(default=0, init=False)
    """Rows read, the broken ones too."""
    columns: dict[str, None] = field(default_factory=dict, init=False)
    unread: dict[str, str | None] = field(default_factory=dict, init=False)
    """Columns, and keys of messages, that are not read -> the beginning of a value."""
    said: dict[str, None] = field(default_factory=dict, init=False)
    """What was read as what."""
    digest: Any = field(default_factory=hashlib.sha256, init=False)
    first_line: bytes = field(default=b"", init=False)
    """The first line, where it is not a JSON object."""
    lengths: "array[int] | None" = field(default=None, init=False)
    """Tokens of each prompt with each of its answers that can be used, once a tokenizer has seen them."""


class Finding(NamedTuple):
    """What is wrong with a row, or odd about it."""

    row: int
    column: str
    """Empty when the row as a whole is broken."""
    reason: str
    value: object = None
    line: int | None = None
    """Line in the file, from 1."""
    kept: bool = False
    """The row stays: this is a note."""


def note(row: int, reason: str) -> Finding:
    """What is odd about a row that stays."""
    return Finding(row, "", reason, kept=True)
