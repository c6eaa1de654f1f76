"""Where findings go: bad rows into quarantine.jsonl, with their reasons, and the counts of all into report.json."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import polars as pl

from schemas import Strict
from schemas.config import Kind
from schemas.errors import StageError
from stages.validate.context import Context, Finding

LEFT_OUT = "(left out: log_text is false)"
_CUT = 200
_NOTED = 20


class Report(Strict):
    """What came of the rows; written as report.json. It names no path, so that equal rows make equal data folders."""

    kind: Kind
    rows: int = 0
    """Rows read, the broken ones too."""
    kept: int = 0
    quarantined: int = 0
    """Rows with at least one entry in quarantine.jsonl. rows = kept + quarantined."""
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
    columns: list[str] = []
    """The file's columns."""
    sha256: str = ""
    """Digest of all rows read, in order."""
    error: str | None = None
    """Why the data was refused."""

    def metrics(self) -> dict[str, float]:
        """The counts as metrics of the stage."""
        counts = {"data/rows": self.rows, "data/kept": self.kept, "data/quarantined": self.quarantined}
        counts |= {f"quarantined/{reason}": n for reason, n in self.reasons.items()}
        counts |= {f"data/{part}/{kind}": n for part, kinds in self.parts.items() for kind, n in kinds.items()}
        return {name: float(count) for name, count in counts.items()}


class Quarantine:
    """Writes bad rows as JSON lines and counts what is found. Without `log_text` their values stay out."""

    def __init__(self, file: Path, log_text: bool = True) -> None:
        self.file, self.log_text = file, log_text
        self._stream = file.open("w", encoding="utf-8", errors="backslashreplace")
        self.rows: set[int] = set()
        self.checks: Counter[tuple[str, str]] = Counter()
        self.notes: Counter[str] = Counter()
        self._noted: dict[str, list[int]] = {}
        self._reasons: dict[str, set[int]] = {}

    def close(self) -> None:
        """Nothing is added any more."""
        self._stream.close()

    def add(self, finding: Finding) -> None:
        """Put a row aside, or count what is odd about one that stays."""
        row, column, reason, value, line, kept = finding
        if kept:
            self.notes[reason] += 1
            if self.notes[reason] <= _NOTED:
                self._noted.setdefault(reason, []).append(row)
            return
        entry = {"row": row, "column": column, "reason": reason, "value": _cut(value) if self.log_text else LEFT_OUT}
        if line is not None:
            entry["line"] = line
        self._stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self.rows.add(row)
        self.checks[column, reason] += 1
        self._reasons.setdefault(reason, set()).add(row)

    def sift(self, frame: pl.DataFrame, findings: Iterable[Finding]) -> pl.DataFrame:
        """Add the findings; returns the frame without the rows that are bad."""
        before = len(self.rows)
        for finding in findings:
            self.add(finding)
        return frame.filter(~pl.col("row").is_in(list(self.rows))) if len(self.rows) > before else frame

    def summary(self) -> dict[str, int]:
        """`column: reason` -> entries, the most frequent first."""
        return {f"{column}: {reason}" if column else reason: n for (column, reason), n in self.checks.most_common()}

    def report(self, context: Context, parts: dict[str, dict[str, int]], error: StageError | None) -> Report:
        """What came of the rows, written as report.json too."""
        reasons = Counter({reason: len(rows) for reason, rows in self._reasons.items()})
        report = Report(
            kind=context.params.kind,
            rows=context.read,
            kept=context.read - len(self.rows),
            quarantined=len(self.rows),
            reasons=dict(reasons.most_common()),
            checks=self.summary(),
            notes=dict(self.notes),
            noted=self._noted,
            parts=parts,
            longest=context.longest,
            columns=list(context.columns),
            sha256=context.digest.hexdigest(),
            error=None if error is None else str(error),
        )
        self.file.with_name("report.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return report


def _cut(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text[:_CUT]
