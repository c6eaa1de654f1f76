"""Where findings go: bad rows into quarantine.jsonl, with their reasons, and the counts of all into report.json."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from pydantic import field_validator

from schemas import Strict
from schemas.config.data import Kind
from schemas.errors import StageError
from schemas.text import visible
from stages.validate.checks.table_checks import ANSWERS, IN_ANOTHER, tools_of
from stages.validate.context import Context, Finding

LEFT_OUT = "(left out: log_text is false)"
LISTED = 10_000
"""Entries that quarantine.jsonl lists. All are counted."""
_CUT = 200
_NOTED = 20
_NOT_BAD = {"tie", "skipped", "one_answer", IN_ANOTHER}
"""Reasons that say nothing against a row: it prefers no answer, or is there already. Each is its row's only one."""


class Lengths(Strict):
    """Lengths of prompts, each with one of its answers."""

    unit: Literal["tokens", "characters"]
    median: int
    p95: int
    """So long at most are 95 %."""
    longest: int

    @classmethod
    def of(cls, checked: Iterable[tuple[pl.DataFrame | None, Context]]) -> "Lengths | None":
        """In tokens where a tokenizer has seen the rows, else in characters; None where there are none.

        `checked`: the rows that are left, all of one kind each time, or None, and what they were checked with.
        """
        tokens, characters = [], []
        for frame, context in checked:
            if context.lengths is not None:
                tokens.append(pl.Series(np.asarray(context.lengths, dtype=np.int64)))
            elif frame is not None:
                characters.append(_characters(frame, context.params.kind))
        sizes = pl.concat(tokens or characters) if tokens or characters else pl.Series()
        if not len(sizes):
            return None
        at = {share: sizes.quantile(share, "nearest") or 0 for share in (0.5, 0.95, 1.0)}
        unit = "tokens" if tokens else "characters"
        return cls(unit=unit, median=int(at[0.5]), p95=int(at[0.95]), longest=int(at[1.0]))


def _characters(frame: pl.DataFrame, kind: Kind) -> pl.Series:
    """Characters of each prompt with each of its answers, of a ranking with the longest one."""
    asked = pl.col("prompt").list.eval(pl.element().struct.field("content").str.len_chars()).list.sum()
    longest = pl.col("responses").list.eval(pl.element().str.len_chars()).list.max()
    answers = [longest if kind == "ranking" else pl.col(name).str.len_chars() for name in ANSWERS[kind]]
    tools = sum((text.str.len_chars() for text in tools_of(frame)), pl.lit(0))
    counted = [frame.select(size=asked + tools + answer) for answer in answers or [pl.lit(0)]]
    return pl.concat(counted)["size"].drop_nulls().cast(pl.Int64)


class Report(Strict):
    """What came of the rows; written as report.json. It names no path, so that equal rows make equal data folders."""

    kind: Kind
    rows: int = 0
    """Rows read, the broken ones too."""
    kept: int = 0
    quarantined: int = 0
    """Rows that are put aside; quarantine.jsonl lists the first entries. rows = kept + quarantined."""
    reasons: dict[str, int] = {}
    """Reason -> rows."""
    checks: dict[str, int] = {}
    """`column: reason` -> rows, the most frequent first."""
    notes: dict[str, int] = {}
    """What is odd and was kept -> rows."""
    noted: dict[str, list[int]] = {}
    """The same -> numbers of the first such rows."""
    parts: dict[str, dict[str, int]] = {}
    """Part -> kind -> rows written."""
    longest: int | None = None
    """Tokens of the longest kept row; null when no tokenizer was given."""
    lengths: Lengths | None = None
    """How long prompts are with an answer each."""
    columns: list[str] = []
    """The file's columns."""
    read: list[str] = []
    """What was read as what, where it is not in our columns already."""
    unused: dict[str, str | None] = {}
    """Columns, and keys of messages, that were not read -> the beginning of a value."""
    sha256: str = ""
    """Digest of all rows read, in order."""
    error: str | None = None
    """Why the data was refused."""

    @field_validator("*", mode="before")
    @classmethod
    def _can_be_written(cls, value: Any) -> Any:
        """Names and texts come from outside; a lone surrogate in one cannot be encoded."""
        return _visible(value)

    def metrics(self) -> dict[str, float]:
        """The counts as metrics of the stage."""
        counts = {"data/rows": self.rows, "data/kept": self.kept, "data/quarantined": self.quarantined}
        counts |= {f"quarantined/{reason}": n for reason, n in self.reasons.items()}
        counts |= {f"data/{part}/{kind}": n for part, kinds in self.parts.items() for kind, n in kinds.items()}
        return {name: float(count) for name, count in counts.items()}

    def write(self, folder: Path) -> None:
        """Leave it as report.json."""
        (folder / "report.json").write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


class Quarantine:
    """Writes bad rows as JSON lines and counts what is found. Without `log_text` their values stay out."""

    def __init__(self, file: Path, log_text: bool = True, source: str = "", beside: "Quarantine | None" = None) -> None:
        """`source`: the name of one of several. They share a file: all others stand `beside` the first, closed last."""
        self.file, self.log_text, self.source, self._shared = file, log_text, source, beside is not None
        self._stream = beside._stream if beside else file.open("w", encoding="utf-8", errors="backslashreplace")
        self.rows = Rows()
        self.listed = 0
        """Entries in the file."""
        self.checks: Counter[tuple[str, str]] = Counter()
        self.notes: Counter[str] = Counter()
        self._noted: dict[str, list[int]] = {}
        self._rows_noted: dict[str, Rows] = {}
        self._reasons: dict[str, Rows] = {}
        self.examples: dict[tuple[str, str], str] = {}
        """Column and reason -> the beginning of the first value that was found."""

    @property
    def left_out(self) -> int:
        """Entries that are counted and not listed."""
        return self.checks.total() - self.listed

    def close(self) -> None:
        """Nothing is added any more. Where entries are left out, the last line says so."""
        if self.left_out:
            rest = f"{self.left_out} more entries: only the first {LISTED} are listed"
            self._write({"row": None, "column": "", "reason": "left_out", "value": rest})
        if not self._shared:
            self._stream.close()

    def _write(self, entry: dict[str, Any]) -> None:
        source = {"source": self.source} if self.source else {}
        self._stream.write(json.dumps({**source, **entry}, ensure_ascii=False) + "\n")

    def add(self, finding: Finding) -> None:
        """Put a row aside, or count what is odd about one that stays."""
        row, column, reason, value, line, kept = finding
        if kept:
            rows = self._rows_noted.setdefault(reason, Rows())
            before = len(rows)
            rows.add(row)
            self.notes[reason] = len(rows)
            if before < len(rows) <= _NOTED:
                self._noted.setdefault(reason, []).append(row)
            return
        if self.listed < LISTED:
            self.listed += 1
            shown = _cut(value) if self.log_text else LEFT_OUT
            place = {} if line is None else {"line": line}
            self._write({"row": row, "column": column, "reason": reason, "value": shown, **place})
        if self.log_text and value is not None:
            self.examples.setdefault((column, reason), _cut(value))
        self.rows.add(row)
        self.checks[column, reason] += 1
        self._reasons.setdefault(reason, Rows()).add(row)

    def sift(self, frame: pl.DataFrame, findings: Iterable[Finding]) -> pl.DataFrame:
        """Add the findings; returns the frame without the rows that are bad."""
        before = len(self.rows)
        for finding in findings:
            self.add(finding)
        return frame.filter(~self.rows.of(frame["row"])) if len(self.rows) > before else frame

    @property
    def bad(self) -> int:
        """Rows that are put aside because something is wrong with them, and for no other reason."""
        return len(self.rows) - sum(len(rows) for reason, rows in self._reasons.items() if reason in _NOT_BAD)

    @property
    def reasons(self) -> dict[str, int]:
        """Reason -> rows, the most frequent first."""
        return dict(Counter({reason: len(rows) for reason, rows in self._reasons.items()}).most_common())

    def summary(self) -> dict[str, int]:
        """`column: reason` -> entries, the most frequent first."""
        return {f"{column}: {reason}" if column else reason: n for (column, reason), n in self.checks.most_common()}

    def report(
        self,
        context: Context,
        parts: dict[str, dict[str, int]],
        error: StageError | None,
        frame: pl.DataFrame | None = None,
    ) -> Report:
        """What came of the rows. `frame`: those that are left."""
        lengths = Lengths.of([(frame, context)])
        return Report(
            kind=context.params.kind,
            rows=context.read,
            kept=context.read - len(self.rows),
            quarantined=len(self.rows),
            reasons=self.reasons,
            checks=self.summary(),
            notes=dict(self.notes),
            noted=self._noted,
            parts=parts,
            longest=lengths.longest if lengths and lengths.unit == "tokens" else None,
            lengths=lengths,
            columns=list(context.columns),
            read=list(context.said),
            unused=dict(sorted(context.unread.items())),
            sha256=context.digest.hexdigest(),
            error=None if error is None else str(error),
        )


class Rows:
    """Numbers of rows, a byte each: a file may have a hundred million bad ones."""

    def __init__(self) -> None:
        self._flags = bytearray()
        self._count = 0

    def add(self, row: int) -> None:
        """Add a number; again changes nothing."""
        if row >= len(self._flags):
            self._flags.extend(bytes(row + 1 + len(self._flags) // 8 - len(self._flags)))
        self._count += 1 - self._flags[row]
        self._flags[row] = 1

    def __len__(self) -> int:
        return self._count

    def of(self, numbers: pl.Series) -> pl.Series:
        """For each of the numbers whether it is among these."""
        flags = np.frombuffer(self._flags, np.bool_)
        wanted = numbers.to_numpy()
        known = wanted < len(flags)
        return pl.Series(known & flags[np.where(known, wanted, 0)]) if len(flags) else pl.Series(known)


def _visible(value: Any) -> Any:
    """A value of the report with marks for the characters that cannot be written."""
    if isinstance(value, dict):
        return {_visible(key): _visible(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_visible(item) for item in value]
    return visible(value) if isinstance(value, str) and not value.isascii() else value


def _cut(value: object) -> str:
    """The beginning of a value, as JSON where it is not text; no more of it is made than is shown."""
    if isinstance(value, str):
        return value[:_CUT]
    text = ""
    try:
        for piece in json.JSONEncoder(ensure_ascii=False, default=str).iterencode(value):
            text += piece[:_CUT]
            if len(text) >= _CUT:
                break
    except RecursionError:  # nested nearly as deep as Python goes
        text += "..."
    return text[:_CUT]
