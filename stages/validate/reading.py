"""Reads the rows of a source into one frame: columns are named, texts read back, forms parsed, labels judged.

    chunks -> plain rows as columns (columnar.py), the others one by one: columns.py -> written.py -> formats.py

What only all rows tell comes last: what labels mean (labels.py), and whether answers repeat their prompts.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import polars as pl

from schemas.errors import StageError, refuse
from schemas.rows import concat
from schemas.source import Generated, data_source
from stages.validate.checks.table_checks import ANSWERS
from stages.validate.context import Context, Finding, note
from stages.validate.forms.cells import BadRow, Parsed, Row
from stages.validate.forms.column_advice import other_json, shown, unknown_mapping, wrong_columns
from stages.validate.forms.columnar import Taken, count_texts, take
from stages.validate.forms.columns import Columns, wrong_format
from stages.validate.forms.formats import parse, to_frame
from stages.validate.forms.labels import meanings, wrong_map
from stages.validate.forms.rankings import generated
from stages.validate.forms.whole_files import Numbered
from stages.validate.forms.written import Written, cut_repeated_prompts
from stages.validate.quarantine import Quarantine
from stages.validate.readers import Chunk, Lines, Record, chunks

_HOPELESS = 200_000
"""Rows without a usable one among them after which the rest is not read: it is another kind of file."""
_AHEAD = 1
"""Chunks that are read ahead."""
_COLUMNS = 10_000  # that the report lists
_NO_OBJECT = ("malformed_json", "not_an_object")


def read(context: Context, quarantine: Quarantine) -> pl.DataFrame:
    """All rows of the source that have the form of their kind, as one frame; the others are put aside.

    Raises StageError when the source cannot be read, holds no rows, or not the columns or labels of its kind.
    """
    params = context.params
    if error := unknown_mapping(params) or wrong_map(params):
        raise error
    reading = _Reading(context, quarantine)
    frames = [to_frame(params.kind, [], [])]
    usable = False
    for chunk in reading.ahead(chunks(params, context.rows, context.seed)):
        frames.append(reading.chunk(chunk))
        usable = usable or frames[-1].height > 0 or bool(reading.held)
        if not usable and context.read >= _HOPELESS:
            break
    frames.append(reading.together())
    if not context.read:
        raise refuse("path", params.path, "the file holds no rows", None, kind="empty_file")
    broken = sum(quarantine.checks["", reason] for reason in _NO_OBJECT)
    prompt_missing = quarantine.checks["prompt", "missing"] == context.read
    ours = set(reading.columns.ours)
    if quarantine.checks["messages", "not_a_list"] == context.read:  # a column of plain texts
        ours.discard("messages")
    if usable and params.kind == "ranking":  # its answers carry their scores
        ours.add("scores")
    error = other_json(params, context.first_line, broken, context.read) or wrong_format(params, context.columns)
    if error := error or wrong_columns(params, list(context.columns), prompt_missing, ours):
        raise error
    if error := _other_winners(context, quarantine):
        raise error
    frame = _judged(concat(frames), reading.columns, context, quarantine)
    frame, cut = cut_repeated_prompts(frame, ANSWERS[params.kind], params.kind)
    for row in cut:
        quarantine.add(note(row, "repeated_prompt_cut"))
    return frame


_STRAY_SHARE = 0.1


def _other_winners(context: Context, quarantine: Quarantine) -> StageError | None:
    """Many comparisons are won by a number that is neither answer's: then the other numbers mean something else too."""
    stray = quarantine.checks["comparisons", "winner_not_compared"]
    value = quarantine.examples.get(("comparisons", "winner_not_compared"), "a number")
    if stray < max(1, _STRAY_SHARE * context.read) or not (value == "a number" or value.lstrip("-").isdigit()):
        return None
    message = f"in {stray} of {context.read} rows it names neither of the two answers, which are counted from 0"
    fix = "write a, b or tie as the winner, or the number of the answer in `responses`, counted from 0"
    return refuse("comparisons.winner", value, message, fix, kind="unknown_labels")


class _Reading:
    """What is known of a source while its rows are read."""

    def __init__(self, context: Context, quarantine: Quarantine) -> None:
        self.context, self.quarantine = context, quarantine
        self.columns, self.written = Columns(context.params, context.log_text), Written()
        self.held: list[tuple[int, Row]] = []
        """Rows that give rows of ours only together with others."""
        self._usual: tuple[str, ...] | None = None
        """The columns of the chunk before, where most of its rows had them in this order."""
        self._coming: dict[int, tuple[tuple[str, ...], Future[Taken | None]]] = {}
        """A chunk's id -> the columns that were expected in it, and its plain rows."""
        context.unread, context.said = self.columns.unread, self.columns.read

    def ahead(self, source: Iterator[Chunk]) -> Iterator[Chunk]:
        """The chunks. Plain rows of the next ones are taken meanwhile: polars works outside of Python's lock."""
        waiting: deque[Chunk] = deque()
        with ThreadPoolExecutor(_AHEAD) as aside:
            for chunk in source:
                waiting.append(chunk)
                if isinstance(chunk, Lines) and self._usual is not None:
                    plan = self.columns.plan(dict.fromkeys(self._usual))
                    if not plan.unread:  # else the chunk before may change how it is read
                        work = aside.submit(take, self.context.params.kind, chunk, self._usual, plan)
                        self._coming[id(chunk)] = self._usual, work
                if len(waiting) > _AHEAD or self._usual is None:
                    yield waiting.popleft()
            yield from waiting

    def chunk(self, chunk: Chunk) -> pl.DataFrame:
        """The rows of a chunk that have a form: those that are plain as columns, the others one by one."""
        first = self.context.read
        if not isinstance(chunk, Lines):
            for record in chunk:
                self.context.digest.update(record.raw + b"\n")
            self.context.read += len(chunk)
            return self._rows(dict(enumerate(chunk, first)))
        self.context.digest.update(chunk.digestible)
        self.context.read += len(chunk.lines)
        plain, others = self._plain(chunk)
        if plain.height:
            plain = plain.with_columns(pl.col("row") + first)
        if not others:
            return plain
        places = (first + place for place in others)
        rows = self._rows(dict(zip(places, chunk.records(others), strict=True)))
        return concat([plain, rows]).sort("row") if plain.height and rows.height else plain if plain.height else rows

    def _plain(self, chunk: Lines) -> tuple[pl.DataFrame, Sequence[int]]:
        """The rows that are plain, by their places in the chunk; the places of the others."""
        names = self._usual or next((tuple(row) for row, *_ in chunk.records() if row), None)
        if names is not None:
            self._saw(names)
            plan = self.columns.plan(dict.fromkeys(names))
            expected, coming = self._coming.pop(id(chunk), (None, None))
            if self.columns.whole is not None:
                taken = None
            elif coming is not None and expected == names:
                taken = coming.result()
            else:
                taken = take(self.context.params.kind, chunk, names, plan)
            if taken is not None:
                self._usual = names if taken[0].height > len(taken[1]) else None
                self.written.texts.update(count_texts(taken[0]))
                return taken
        return pl.DataFrame(), range(len(chunk.lines))

    def _saw(self, names: Iterable[str]) -> None:
        """Note a row's columns."""
        names = names if self.context.log_text else shown(self.context.params, names)
        if len(self.context.columns) < _COLUMNS:
            self.context.columns.update(dict.fromkeys(names))

    def _rows(self, records: dict[int, Record]) -> pl.DataFrame:
        """Rows one by one, by their numbers."""
        context = self.context
        made = isinstance(data_source(context.params.path), Generated) and context.params.kind == "ranking"
        named: list[Numbered] = []
        for place, record in records.items():
            if record.row is None:
                if place == 0 and record.line is not None and record.reason in _NO_OBJECT:
                    context.first_line = record.raw
                value = record.raw.decode(errors="backslashreplace")
                self.quarantine.add(Finding(place, "", record.reason, value, record.line))
                continue
            self._saw(record.row)
            if made:
                named.append((place, record.row))
                continue
            try:
                row = self.columns.row(record.row)
            except BadRow as bad:
                named.append((place, bad))
                continue
            if self.columns.whole is None:
                named.append((place, row))
            else:
                self.held.append((place, row))
        return self._frame(named, records.get, generated if made else None)

    def together(self) -> pl.DataFrame:
        """The rows that only all rows of the file give."""
        whole, self.columns.whole = self.columns.whole, None
        if whole is None:
            return to_frame(self.context.params.kind, [], [])
        named = list(whole(self.held, self.context.params.kind))
        self.held = []
        self.columns.ours.update(*(row.keys() for _, row in named if isinstance(row, dict)))
        return self._frame(named, lambda place: None, None)

    def _frame(
        self,
        named: list[Numbered],
        record_of: Callable[[int], Record | None],
        made: Callable[[Row], Parsed] | None,
    ) -> pl.DataFrame:
        """Rows with our columns in the form of their kind; what has none is put aside."""
        kind, columns = self.context.params.kind, self.columns
        restored = {} if made else self.written.restore(named, columns.ours, columns.say)
        numbers: list[int] = []
        rows: list[Parsed] = []
        notes: list[tuple[str, int]] = []
        for place, row in named:
            if isinstance(row, str):
                notes.append((row, place))
                continue
            record = record_of(place)
            try:
                if isinstance(row, BadRow):
                    raise row
                parsed = made(row) if made else parse(kind, row, self.context.params.learn)
                if record is not None and record.row is not None and made is None:
                    columns.keys(row)
                    if columns.beside:
                        parsed = columns.around(record.row, parsed)
                notes += [(name, place) for name in columns.calls(parsed)]
            except BadRow as bad:
                line = None if record is None else record.line
                self.quarantine.add(Finding(place, bad.column, bad.reason, bad.value, line))
                continue
            rows.append(parsed)
            numbers.append(place)
            notes += [(name, place) for name in (*parsed.get("notes", ()), *restored.get(place, ()))]
        for name, place in sorted(notes):  # by name, so that equal rows make equal reports
            self.quarantine.add(note(place, name))
        return to_frame(kind, numbers, rows)


def _judged(frame: pl.DataFrame, columns: Columns, context: Context, quarantine: Quarantine) -> pl.DataFrame:
    """The frame with thumbs, or the better answer, in place of its labels. Raises StageError."""
    if "label" not in frame.columns:
        return frame
    counted = frame["label"].drop_nulls().value_counts().rows()
    if not counted:
        return frame.with_columns(label=pl.lit(None, pl.Boolean))
    told = meanings(context.params, dict(counted), columns.names)
    means = ", ".join(f"{label} as {_SAYS.get(meaning, meaning)}" for label, meaning in sorted(told.items()))
    if columns.names.label in context.columns:
        columns.say(f"`{columns.names.label}`: {means}")
    frame = frame.with_columns(means=pl.col("label").replace_strict(told, default=None, return_dtype=pl.String))
    sides = ("up", "down") if context.params.kind == "feedback" else ("a", "b")
    labelled, wanted = pl.col("label").is_not_null(), pl.col("means").is_in(sides).fill_null(False)
    unwanted = frame.filter(labelled & ~wanted).select("row", "label", "means").rows()
    findings = [Finding(row, "label", _REASONS.get(means, "not_a_label"), label) for row, label, means in unwanted]
    frame = quarantine.sift(frame, findings)
    if context.params.kind == "feedback":
        return frame.with_columns(label=pl.col("means") == "up").drop("means")
    second = pl.col("means").eq("b").fill_null(False)
    sides = ("chosen", "rejected")
    swapped = {one: pl.when(second).then(other).otherwise(one) for one, other in zip(sides, sides[::-1], strict=True)}
    return frame.with_columns(**swapped).drop("label", "means")


_SAYS = {"up": "thumbs up", "down": "thumbs down", "skip": "left out", None: "no label", "tie": "a tie"}
_SAYS |= {"a": "the first answer", "b": "the second answer"}
_REASONS = {"tie": "tie", "skip": "skipped"}
