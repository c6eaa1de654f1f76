"""Several sources as one data set: each is read by itself, and all are checked, split and derived together.

Rows are numbered through all sources while they are checked, so that every check sees a mixture as one table. Findings
go back to the quarantine of the row's source under its number there, and what is published says both.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import polars as pl

from schemas.config.data import Kind, MixtureParams
from schemas.errors import StageError, refuse
from schemas.rows import concat
from stages.engine.tables import PARTS
from stages.engine.tables.derive import derive, distinct
from stages.validate.context import Context, Finding, note
from stages.validate.mixtures.drawing import alternate, draw
from stages.validate.mixtures.report import MixtureReport, SourceReport, together
from stages.validate.parts import store
from stages.validate.quarantine import Lengths, Quarantine, Rows
from stages.validate.reading import read
from stages.validate.verdict import few_held_out, refusal


def about_source(place: int, name: str, error: StageError) -> StageError:
    """The refusal of one source, which says of which it is: `sources.0.path` is a field of the first."""
    field = error.problem.field and f"sources.{place}.{error.problem.field}"
    message = f"source {name}: {error.problem.message}"
    return StageError(error.problem.model_copy(update={"field": field, "message": message}), status=error.status)


Checked = list[tuple[Context, pl.DataFrame]]
"""The rows of one kind each, with what they are checked with."""


@dataclass
class Source:
    """One source while a mixture is checked."""

    name: str
    context: Context
    quarantine: Quarantine
    start: int = 0
    """The number of its first row in the mixture."""
    parts: dict[str, dict[str, int]] = field(default_factory=lambda: {part: {} for part in PARTS})
    drawn: dict[str, int] = field(default_factory=dict)

    def of(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Its rows in a frame of several sources."""
        return frame.filter(pl.col("row").is_between(self.start, self.start + self.context.read, closed="left"))


class Mixed:
    """A mixture while it is checked; `close` it."""

    def __init__(self, params: MixtureParams, contexts: Mapping[str, Context], out: Path) -> None:
        """`contexts`: by the sources' names, what each is read with."""
        self.params, self.out = params, out
        self.sources: list[Source] = []
        for name, context in contexts.items():
            first = self.sources[0].quarantine if self.sources else None
            quarantine = Quarantine(out / "quarantine.jsonl", context.log_text, name, beside=first)
            self.sources.append(Source(name, context, quarantine))
        self.written: dict[str, dict[str, int]] = {name: {} for name in PARTS}
        self.checked: Checked = []
        self._bad = Rows()

    def close(self) -> None:
        """Nothing is found any more."""
        for source in reversed(self.sources):
            source.quarantine.close()

    def source_of(self, row: int) -> Source:
        """The source that a row of the mixture is of."""
        return self.sources[bisect_right([source.start for source in self.sources], row) - 1]

    def place(self, row: int) -> tuple[str, int]:
        """The name of a row's source, and its number there."""
        source = self.source_of(row)
        return source.name, row - source.start

    # --- rows go down, findings come back ---

    def read(self) -> Checked:
        """The rows of all sources, those of a kind as one frame. Raises StageError where a source cannot be read."""
        frames: dict[Kind, list[pl.DataFrame]] = {}
        start = 0
        for source in self.sources:
            source.start = start
            try:
                frame = read(source.context, source.quarantine)
            except StageError as error:
                raise about_source(self.sources.index(source), source.name, error) from error
            frames.setdefault(source.context.params.kind, []).append(frame.with_columns(pl.col("row") + start))
            start += source.context.read
        checked: Checked = []
        for kind, some in frames.items():  # together they are checked with what the first source was read with
            first = next(source.context for source in self.sources if source.context.params.kind == kind)
            checked.append((replace(first, place=self.place), concat(some)))
        return checked

    def sift(self, frame: pl.DataFrame, findings: Iterable[Finding]) -> pl.DataFrame:
        """Add the findings; returns the frame without the rows that are bad."""
        before = len(self._bad)
        for finding in findings:
            source = self.source_of(finding.row)
            source.quarantine.add(finding._replace(row=finding.row - source.start))
            if not finding.kept:
                self._bad.add(finding.row)
        return frame.filter(~self._bad.of(frame["row"])) if len(self._bad) > before else frame

    # --- what becomes of them ---

    def refusal(self) -> StageError | None:
        """Why the rows, with column `part`, cannot be used: one source is too bad, or too little is held out."""
        for place, source in enumerate(self.sources):
            own = next(frame for context, frame in self.checked if context.params.kind == source.context.params.kind)
            own = source.of(own)
            if error := refusal(own, source.context, source.quarantine):
                return about_source(place, source.name, error)
        names = " + ".join(source.name for source in self.sources)
        rows = pl.concat([frame.select("prompt_id", "part") for _, frame in self.checked])
        return few_held_out(rows, self.params, names)

    def write(self) -> None:
        """Write every part of every kind that all sources give: rows to train on as they are drawn.

        Raises StageError, before anything is written, where a source has no rows for its weight.
        """
        for part in PARTS:  # rows to train on come first
            tables = self._tables(part)
            for kind, table in tables.items():
                counts = {str(name): rows for name, rows in table["source"].value_counts().rows()}
                for source in self.sources:
                    source.parts[part][kind] = counts.get(source.name, 0)
            if part == "train":
                self._refuse_empty()
            for kind, table in tables.items():
                if part == "train":
                    wanted = self.params.drawn({source.name: source.parts[part][kind] for source in self.sources})
                    for source in self.sources:
                        source.drawn[kind] = wanted.get(source.name, 0)
                    table = draw(table, wanted, self.params.seed)
                if table.height:
                    store(alternate(table).lazy(), self.out / part, kind)
                    self.written[part][kind] = table.height

    def _tables(self, part: str) -> dict[Kind, pl.DataFrame]:
        """Kind -> the rows of a part, with their sources."""
        tables: dict[Kind, list[pl.DataFrame]] = {}
        for context, frame in self.checked:
            rows = frame.filter(pl.col("part") == part).drop("part")
            for kind, make in derive(context.params.kind, rows).items():
                if kind in self.params.gives:
                    tables.setdefault(kind, []).append(make())
        return {
            kind: self._with_source(some[0] if len(some) == 1 else self._joined(kind, some))
            for kind, some in tables.items()
        }

    def _refuse_empty(self) -> None:
        for place, (source, asked) in enumerate(zip(self.sources, self.params.sources, strict=True)):
            if asked.weight is not None and not source.parts["train"].get(self.params.kind):
                message = f"source {source.name}: it has no rows to train on, so that no share can be theirs"
                fix = "leave the source out, give it more rows, or use epochs in place of weights"
                raise refuse(f"sources.{place}.weight", asked.weight, message, fix, kind="nothing_to_draw")

    def _joined(self, kind: Kind, tables: list[pl.DataFrame]) -> pl.DataFrame:
        """One table of what rows of several kinds have given; notes what one of another kind has given already."""
        every = concat(tables).sort("row", maintain_order=True).with_row_index("at")
        content = ["prompt"] if kind == "prompt" else [name for name in every.columns if name not in ("row", "at")]
        once = distinct(every, *content)
        if kind == self.params.kind and kind != "prompt":
            again = every.filter(~pl.col("at").is_in(once["at"].implode()))["row"].unique().sort()
            self.sift(every, (note(row, "given_by_another_source") for row in again))
        return once.drop("at")

    def _with_source(self, table: pl.DataFrame) -> pl.DataFrame:
        """The table with the name of each row's source, and its number there; sources stand in their order."""
        pieces = [table.clear().with_columns(source=pl.lit(None, pl.String))]
        for source in self.sources:
            pieces.append(source.of(table).with_columns(pl.col("row") - source.start, source=pl.lit(source.name)))
        return pl.concat(pieces).select("row", "source", pl.all().exclude("row", "source"))

    def report(self, error: StageError | None) -> MixtureReport:
        """What came of the rows."""
        lengths = Lengths.of((frame, context) for context, frame in self.checked)
        reports = {
            source.name: SourceReport(
                **dict(source.quarantine.report(source.context, source.parts, None)), drawn=source.drawn
            )
            for source in self.sources
        }
        return together(self.params.kind, reports, self.written, lengths, error)
