"""What came of the rows of several sources: of each, and of all."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping

from schemas.config.data import Kind
from schemas.errors import StageError
from stages.validate.quarantine import Lengths, Report


class SourceReport(Report):
    """What came of the rows of one source. `parts`: rows before any are drawn, of the kinds that all sources give."""

    drawn: dict[str, int] = {}
    """Kind -> rows to train on, each as often as it is taken."""


class MixtureReport(Report):
    """What came of all rows. `parts`: rows written, those to train on as often as they are taken."""

    sources: dict[str, SourceReport] = {}

    def metrics(self) -> dict[str, float]:
        """Beside the counts of all those of each source, in rows of the mixture's kind: `data/chat/rows_drawn`."""
        values = super().metrics()
        for name, source in self.sources.items():
            counts = {"rows": source.rows, "kept": source.kept, "quarantined": source.quarantined}
            counts |= {f"quarantined_{reason}": n for reason, n in source.reasons.items()}
            counts |= {f"rows_{part}": kinds.get(self.kind, 0) for part, kinds in source.parts.items()}
            counts["rows_drawn"] = source.drawn.get(self.kind, 0)
            values |= {f"data/{name}/{count}": float(n) for count, n in counts.items()}
        return values


def together(
    kind: Kind,
    sources: Mapping[str, SourceReport],
    parts: dict[str, dict[str, int]],
    lengths: Lengths | None,
    error: StageError | None,
) -> MixtureReport:
    """The report of a mixture from those of its sources. Its digest is that of theirs, in order."""
    each = sources.values()
    return MixtureReport(
        kind=kind,
        rows=sum(one.rows for one in each),
        kept=sum(one.kept for one in each),
        quarantined=sum(one.quarantined for one in each),
        reasons=_summed(one.reasons for one in each),
        checks=_summed(one.checks for one in each),
        notes=_summed(one.notes for one in each),
        parts=parts,
        longest=lengths.longest if lengths and lengths.unit == "tokens" else None,
        lengths=lengths,
        columns=list(dict.fromkeys(column for one in each for column in one.columns)),
        read=[f"{name}: {what}" for name, one in sources.items() for what in one.read],
        unused={f"{name}: {column}": value for name, one in sources.items() for column, value in one.unused.items()},
        sha256=hashlib.sha256("".join(f"{one.sha256}\n" for one in each).encode()).hexdigest(),
        error=None if error is None else str(error),
        sources=dict(sources),
    )


def _summed(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sums by name, the largest first."""
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return dict(total.most_common())


def lines(report: MixtureReport) -> list[str]:
    """Rows per source, for a terminal: read, kept, put aside, to train on, drawn with their share, held out."""
    head = ["source", "rows", "kept", "quarantined", "train", "drawn", "share", "eval"]
    total = sum(one.drawn.get(report.kind, 0) for one in report.sources.values())
    cells = [head]
    for name, one in report.sources.items():
        train, held = (one.parts.get(part, {}).get(report.kind, 0) for part in ("train", "eval"))
        drawn = one.drawn.get(report.kind, 0)
        share = f"{100 * drawn / total:.1f} %" if total else "-"
        cells.append([name, *map(str, (one.rows, one.kept, one.quarantined, train, drawn)), share, str(held)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rest = [[cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)] for line in cells]
    return ["  ".join([line[0].ljust(widths[0]), *more]) for line, more in zip(cells, rest, strict=True)]
