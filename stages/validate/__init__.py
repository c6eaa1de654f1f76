"""Stage `validate`: reads rows, quarantines the bad ones with a reason, splits by prompt, and derives further kinds.

In this order, each step seeing only the rows that passed the ones before: reading (readers.py), form (formats.py), the
pandera models (schemas/rows.py), repetitions, the tokenizer's checks (token_checks.py), leaks into the evaluation
prompts. stages/commands/validate.py runs it without MLflow.
"""

import difflib
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, get_args

import polars as pl

from schemas import Strict
from schemas.config import Kind, ValidateParams
from schemas.errors import StageError, refuse
from schemas.rows import HIDING, IGNORED, may_repeat, problems
from schemas.source import Generated, Hub, data_source, is_commit
from stages.validate import formats
from stages.validate.derive import derive
from stages.validate.readers import Record, records
from stages.validate.token_checks import ANSWERS, Progress, Tokens, too_many_characters

if TYPE_CHECKING:
    from stages.engine.data.codec import Codec  # these two take seconds to import, and a check alone does without
    from stages.runtime.context import StageContext

PARTS = ("train", "eval", "gold")
_CHUNK = 20_000
_CUT = 200
LEFT_OUT = "(left out: log_text is false)"
_SIDES = ("chosen", "rejected")
"""Never guessed: the wrong way round they invert every preference."""
_YOURS = "YOUR_COLUMN"
_NO_OBJECT = ("malformed_json", "not_an_object")


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
    """Tokens of the longest kept row; null when no tokenizer was at hand."""
    columns: list[str] = []
    """The file's columns."""
    sha256: str = ""
    """Digest of all rows read, in order."""
    error: str | None = None
    """Why the data was refused."""


class Quarantine:
    """Writes bad rows as JSON lines and counts them. Without `log_text` their values stay out."""

    def __init__(self, file: Path, log_text: bool = True) -> None:
        self.file, self.log_text = file, log_text
        self.rows: set[int] = set()
        self.checks: Counter[tuple[str, str]] = Counter()
        self._reasons: dict[str, set[int]] = {}

    def __enter__(self) -> "Quarantine":
        self._stream = self.file.open("w", encoding="utf-8", errors="backslashreplace")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stream.close()

    def add(self, row: int, column: str, reason: str, value: object, line: int | None = None) -> None:
        """Put a row aside. `column` is empty when the row as a whole is broken."""
        entry = {"row": row, "column": column, "reason": reason, "value": _cut(value) if self.log_text else LEFT_OUT}
        if line is not None:
            entry["line"] = line
        self._stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self.rows.add(row)
        self.checks[column, reason] += 1
        self._reasons.setdefault(reason, set()).add(row)

    def reasons(self) -> dict[str, int]:
        """Reason -> rows, the most frequent first."""
        return dict(sorted(((name, len(rows)) for name, rows in self._reasons.items()), key=lambda pair: -pair[1]))

    def summary(self) -> dict[str, int]:
        """`column: reason` -> entries, the most frequent first."""
        return {f"{column}: {reason}" if column else reason: n for (column, reason), n in self.checks.most_common()}


def _cut(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text[:_CUT]


@dataclass
class _Counts:
    """What is counted on the way."""

    log_text: bool = True
    rows: int = 0
    kept: int = 0
    columns: dict[str, None] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    noted: dict[str, list[int]] = field(default_factory=dict)
    digest: Any = field(default_factory=hashlib.sha256)
    parts: dict[str, dict[str, int]] = field(default_factory=dict)
    longest: int | None = None
    first_line: bytes = b""
    """The first line, where it is not a JSON object."""

    def note(self, name: str, rows: Iterable[int]) -> None:
        rows = list(rows)
        if rows:
            self.notes[name] += len(rows)
            first = self.noted.setdefault(name, [])
            first += rows[: 20 - len(first)]


def check(
    params: ValidateParams,
    out: Path,
    codec: "Codec | None" = None,
    evaluation: Path | None = None,
    rows: Path | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    log_text: bool = True,
) -> Report:
    """Check, split and derive; write everything to `out`. Needs no MLflow.

    `evaluation`: a data folder whose evaluation prompts must not be trained on. `rows`: folder of stage `generate`.
    Without `log_text` the quarantine holds no values and the report no column of unknown name: a CSV file without a
    header has its first row there.
    Raises StageError (refused) when the data cannot be used; quarantine.jsonl and report.json are written even then.
    """
    _clear(out)
    tally, error = _Counts(log_text), None
    with Quarantine(out / "quarantine.jsonl", log_text) as bad:
        try:
            _refuse_unknown_columns(params)
            frame = _clean(params, _read(params, rows, seed, tally, bad), codec, tally, bad, progress)
            frame = _without_leaks(_with_parts(params, frame), evaluation, bad)
            _refuse(params, frame, tally, bad)
            _refuse_few_held_out(params, frame)
            _write(params.kind, frame, out, tally)
        except StageError as refusal:
            error = refusal
    report = Report(
        kind=params.kind,
        rows=tally.rows,
        kept=tally.kept if error is None else max(0, tally.rows - len(bad.rows)),
        quarantined=len(bad.rows),
        reasons=bad.reasons(),
        checks=bad.summary(),
        notes=dict(tally.notes),
        noted=tally.noted,
        parts=tally.parts,
        longest=tally.longest,
        columns=list(tally.columns),
        sha256=tally.digest.hexdigest(),
        error=None if error is None else str(error),
    )
    (out / "report.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if error is not None:
        raise error
    return report


def _clear(out: Path) -> None:
    """Take away what an earlier check left, so that nothing stale is read."""
    out.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        for kind in get_args(Kind):
            (out / part / f"{kind}.parquet").unlink(missing_ok=True)


# --- reading


def _read(params: ValidateParams, rows: Path | None, seed: int, tally: _Counts, bad: Quarantine) -> pl.DataFrame:
    """All rows that have the form of their kind, as one frame."""
    source = records(params, rows, seed)
    frames = [formats.to_frame(params.kind, [], [])]
    while chunk := list(islice(source, _CHUNK)):
        frames.append(_parse(params, chunk, tally, bad))
    if not tally.rows:
        raise refuse("path", params.path, "the file holds no rows", None, kind="empty_file")
    _refuse_other_json(params, tally, bad)
    _refuse_columns(params, tally, bad)
    return pl.concat(frames)


def _refuse_other_json(params: ValidateParams, tally: _Counts, bad: Quarantine) -> None:
    """Stop when JSON lines are expected and the file is an array, or one object over several lines."""
    array = tally.first_line.startswith(b"[")
    broken = sum(bad.checks["", reason] for reason in _NO_OBJECT)
    if (array or tally.first_line == b"{") and broken >= tally.rows / 2 and broken > params.max_bad * tally.rows:
        what = "a JSON array" if array else "JSON with objects over several lines"
        raise refuse(
            "path",
            params.path,
            f"the file looks like {what}: {broken} of {tally.rows} lines are no JSON object",
            "write one JSON object per line (JSONL)" + (", or name the file .json" if array else ""),
            kind="bad_data",
        )


def _parse(params: ValidateParams, chunk: list[Record], tally: _Counts, bad: Quarantine) -> pl.DataFrame:
    numbers: list[int] = []
    parsed: list[formats.Parsed] = []
    for number, record in enumerate(chunk, tally.rows):
        tally.digest.update(record.raw + b"\n")
        if record.row is None:
            if number == 0 and record.line is not None and record.reason in _NO_OBJECT:
                tally.first_line = record.raw
            bad.add(number, "", record.reason, record.raw.decode(errors="backslashreplace"), record.line)
            continue
        tally.columns.update(dict.fromkeys(record.row if tally.log_text else _known(params, record.row)))
        try:
            parsed.append(_form(params, record.row))
            numbers.append(number)
        except formats.Bad as problem:
            bad.add(number, problem.column, problem.reason, problem.value, record.line)
    tally.rows += len(chunk)
    for name in sorted({name for row in parsed for name in row.get("notes", ())}):
        tally.note(name, [n for n, row in zip(numbers, parsed, strict=True) if name in row["notes"]])
    return formats.to_frame(params.kind, numbers, parsed)


def _known(params: ValidateParams, columns: Iterable[str]) -> Iterator[str]:
    """The columns' names, where they are names for sure; the others by their place."""
    known = {*formats.KNOWN[params.kind], *params.columns.values()}
    for place, name in enumerate(columns, 1):
        yield name if name in known else f"column {place}"


def _form(params: ValidateParams, row: formats.Row) -> formats.Parsed:
    if isinstance(data_source(params.path), Generated) and params.kind == "ranking":
        return formats.generated(row)
    if params.columns:
        row = {**row, **{ours: row.get(theirs) for ours, theirs in params.columns.items()}}
    return formats.parse(params.kind, row)


def _refuse_unknown_columns(params: ValidateParams) -> None:
    known = formats.KNOWN[params.kind]
    for name, theirs in params.columns.items():
        if name not in known:
            swapped = theirs in known and theirs not in params.columns
            near = theirs if swapped else _nearest(name, sorted(known))
            meant = _mapping({near: name if swapped else theirs}) if near and (swapped or near not in _SIDES) else None
            raise refuse(
                "columns",
                name,
                f"kind {params.kind} has no column `{name}`; it has {', '.join(sorted(known))}",
                f"did you mean `{near}`? Write our name first: {meant}"
                if meant
                else f"write one of our names first, then the file's: --columns OURS={theirs}",
                kind="unknown_column",
            )


def _nearest(name: str, others: Iterable[str]) -> str | None:
    """The one name that differs in the closest match; None when there is none, or more than one."""
    near = difflib.get_close_matches(name, list(others), n=2, cutoff=0.8)
    return near[0] if len(near) == 1 else None


def _mapping(columns: Mapping[str, str]) -> str:
    """How a mapping is written, on the command line and in a config."""
    options = " ".join(f"--columns {ours}={theirs}" for ours, theirs in columns.items())
    pairs = ", ".join(f"{ours}: {theirs}" for ours, theirs in columns.items())
    return f"`{options}` (config: `columns: {{{pairs}}}`)"


def _refuse_columns(params: ValidateParams, tally: _Counts, bad: Quarantine) -> None:
    """Stop when the file has not the columns of its kind, or not those that the config names."""
    there = list(tally.columns)
    for ours, theirs in params.columns.items():
        if theirs not in tally.columns and there:
            raise refuse(
                f"columns.{ours}",
                theirs,
                f"{params.path} has no column `{theirs}` to take `{ours}` from; it has {', '.join(there)}",
                f"did you mean `{near}`? {_mapping({ours: near})}"
                if (near := None if ours in _SIDES else _nearest(theirs, there))
                else f"name the column that holds it: {_mapping({ours: _YOURS})}",
                kind="missing_column",
            )
    named = {*there, *params.columns}
    ways = formats.COLUMNS[params.kind]
    # Chosen and rejected alone will do, but only as conversations that hold their prompts.
    without_prompt = bad.checks["prompt", "missing"] == tally.rows and "prompt" not in named
    if there and (without_prompt or not any(named.issuperset(way) for way in ways)):
        raise _wrong_columns(params, there, named, ways[:1] if without_prompt else ways)


def _wrong_columns(
    params: ValidateParams, there: list[str], named: set[str], ways: tuple[tuple[str, ...], ...]
) -> StageError:
    begun = [way for way in ways if named.intersection(way)] or ways[:1]
    missing = min(([name for name in way if name not in named] for way in begun), key=len)
    free = [name for name in there if name not in (*formats.KNOWN[params.kind], *params.columns.values())]
    near = {name: None if name in _SIDES else _nearest(name, free) for name in missing}
    fits = [kind for kind in formats.fitting_kinds(named) if kind != params.kind]
    hints = [
        f"read it as kind {' or '.join(fits)}" if fits else "",
        f"map {'the columns' if missing[1:] else 'the column'}: "
        + _mapping({name: near[name] or _YOURS for name in missing}),
    ]
    lacks = " and no ".join(f"`{name}`" for name in missing)
    return refuse(
        "kind",
        params.kind,
        f"{params.path} cannot be read as {params.kind}: it has no column {lacks}. "
        f"It has {', '.join(there)}. Kind {params.kind} needs {', or '.join(' + '.join(way) for way in ways)}.",
        ", or ".join(hint for hint in hints if hint),
        kind="wrong_columns",
    )


# --- checking


def _clean(
    params: ValidateParams,
    frame: pl.DataFrame,
    codec: "Codec | None",
    tally: _Counts,
    bad: Quarantine,
    progress: Progress | None,
) -> pl.DataFrame:
    """The frame without the rows that a check finds bad."""
    for index, column, reason in problems(params.kind, frame).rows():
        bad.add(frame["row"][index], column, reason, _value(frame, index, column))
    frame = _without(frame, bad)
    for row, first in _repetitions(frame):
        bad.add(row, (*ANSWERS[params.kind], "prompt")[0], "duplicate", f"same as row {first}")
    frame = _without(frame, bad)
    tokens = None if codec is None else Tokens(codec, params.max_length)
    long = (
        too_many_characters(params.kind, frame, params.max_length)
        if tokens is None
        else tokens.findings(params.kind, frame, progress)
    )
    for index, column, reason, value in long:
        bad.add(frame["row"][index], column, reason, value)
    frame = _without(frame, bad)
    tally.note("look_alike", _look_alikes(params.kind, frame))
    tally.note("hidden_characters", _hiding(params.kind, frame))
    if tokens is not None:
        tally.longest = tokens.longest
        tally.note("prompt_tokens_differ", tokens.differ(params.kind, frame))
    return frame


def _value(frame: pl.DataFrame, index: int, column: str) -> object:
    value = frame[column][index]
    return value.to_list() if isinstance(value, pl.Series) else value


def _without(frame: pl.DataFrame, bad: Quarantine) -> pl.DataFrame:
    return frame.filter(~pl.col("row").is_in(list(bad.rows))) if bad.rows else frame


def _repetitions(frame: pl.DataFrame) -> Iterator[tuple[int, int]]:
    """(row, first row) of every row that repeats an earlier one in all it says."""
    content = [name for name in frame.columns if name not in ("row", "prompt_id")]
    frame = frame.filter(may_repeat(frame, content))
    again = frame.filter(~frame.select(pl.struct(content).is_first_distinct()).to_series())
    if again.height:
        firsts = frame.unique(content, keep="first", maintain_order=True).select(*content, first="row")
        yield from again.join(firsts, on=content, nulls_equal=True, maintain_order="left").select("row", "first").rows()


def _look_alikes(kind: Kind, frame: pl.DataFrame) -> list[int]:
    """Rows that differ from an earlier one in case, marks, white space or compatible characters only."""
    plain = [_plain(pl.col(name)) for name in ANSWERS[kind] if name != "responses"]
    if kind == "ranking":
        plain = [_plain(pl.col("responses").list.join("\n")).alias("responses")]
    labels = [name for name in ("label", "winners") if name in frame.columns]
    content = ["prompt_id", *plain, *labels]
    frame = frame.filter(may_repeat(frame, content))
    keys = frame.select(content)
    return frame.filter(~keys.select(pl.struct(pl.all()).is_first_distinct()).to_series())["row"].to_list()


def _hiding(kind: Kind, frame: pl.DataFrame) -> list[int]:
    """Rows whose texts hold characters that cannot be seen, or that turn around what is seen."""
    contents = pl.col("prompt").list.eval(pl.element().struct.field("content")).list.join("\n")
    answers = [pl.col(name).list.join("\n") if name == "responses" else pl.col(name) for name in ANSWERS[kind]]
    found = pl.any_horizontal(text.str.contains(HIDING) for text in (contents, *answers))
    return frame.filter(found)["row"].to_list()


def _plain(text: pl.Expr) -> pl.Expr:
    """schemas.rows.normalise, near enough, at the speed of columns."""
    return (
        text.str.replace_all(IGNORED, "")
        .str.normalize("NFKC")
        .str.to_lowercase()
        .str.replace_all(r"\W+", " ")
        .str.strip_chars()
    )


def _with_parts(params: ValidateParams, frame: pl.DataFrame) -> pl.DataFrame:
    """The frame with column `part`, told by `prompt_id` alone: the same prompt is on the same side in all data."""
    held, gold = params.eval_fraction, params.gold_fraction
    draw = pl.col("prompt_id").str.slice(0, 8).str.to_integer(base=16) / 2**32
    part = pl.when(draw < held).then(pl.lit("eval"))
    if held < 1:
        part = part.when((draw - held) / (1 - held) < gold).then(pl.lit("gold"))
    return frame.with_columns(part=part.otherwise(pl.lit("train")))


def _without_leaks(frame: pl.DataFrame, evaluation: Path | None, bad: Quarantine) -> pl.DataFrame:
    """The frame without the rows to train on whose prompts are evaluation prompts elsewhere."""
    file = None if evaluation is None else evaluation / "eval" / "prompt.parquet"
    if file is None or not file.is_file():
        return frame
    asked = pl.read_parquet(file, columns=["prompt_id"])["prompt_id"].unique()
    leaks = frame.filter((pl.col("part") != "eval") & pl.col("prompt_id").is_in(asked.to_list()))
    for row, prompt in leaks.select("row", "prompt").iter_rows():
        bad.add(row, "prompt", "leaks_into_evaluation", prompt[-1]["content"])
    return _without(frame, bad)


def _refuse(params: ValidateParams, frame: pl.DataFrame, tally: _Counts, bad: Quarantine) -> None:
    """Stop when too much is bad, or nothing is left to learn from."""
    share = len(bad.rows) / tally.rows
    usable = frame.filter(pl.col("winners").list.len() > 0) if params.kind == "ranking" else frame
    if share <= params.max_bad and usable.height:
        return
    if frame.height and not usable.height and "all_tied" not in tally.notes:
        _refuse_unranked(params, frame.height, tally, bad)
    most = ", ".join(f"{name} ({n})" for name, n in list(bad.summary().items())[:3])
    counts = f"{params.path}: {len(bad.rows)} of {tally.rows} rows ({share:.1%}) are bad"
    if not frame.height:
        what = f"{counts}: nothing is left"
    elif not usable.height:
        what = f"{counts}, and none of the other {frame.height} prefers one answer to another: nothing is left"
    else:
        what = f"{counts}, more than max_bad = {params.max_bad:.1%}"
    found = f"most frequent: {most}. They lie in {bad.file}" if most else "no check failed"
    raise StageError(
        f"{what}; {found}.",
        kind="bad_data" if usable.height else "nothing_left",
        fix="fix the rows, map the right columns, or raise max_bad"
        if usable.height
        else "fix the rows or map the right columns",
    )


def _refuse_few_held_out(params: ValidateParams, frame: pl.DataFrame) -> None:
    """Stop when there would be too few prompts to evaluate on; found here, nothing has been trained yet."""
    prompts = frame["prompt_id"].n_unique()
    held_out = frame.filter(pl.col("part") == "eval")["prompt_id"].n_unique()
    if held_out < params.min_eval_prompts:
        fix = "raise eval_fraction, give more rows or data.evaluation, or lower evaluate.min_prompts"
        raise refuse(
            "evaluate.min_prompts",
            params.min_eval_prompts,
            f"{params.path}: {held_out} of {prompts} prompts are held out, too few to evaluate on.",
            fix,
            kind="few_prompts",
        )


def _refuse_unranked(params: ValidateParams, rows: int, tally: _Counts, bad: Quarantine) -> None:
    """Stop: the answers wait for people to rank them."""
    there = {*tally.columns, *params.columns}
    column = next(name for name in ("order", "ranks", "scores", "comparisons") if name in there)
    how = " (numbers of the answers from 0, best first)" if column == "order" else ""
    rest = f"; the other {len(bad.rows)} are bad and lie in {bad.file}" if bad.rows else ""
    raise StageError(
        f"{params.path}: no line has {'an order' if column == 'order' else column} yet: "
        f"nobody has ranked the answers of {rows} of {tally.rows} lines{rest}.",
        kind="not_ranked",
        fix=f"fill in `{column}` on each line{how}",
    )


def _write(kind: Kind, frame: pl.DataFrame, out: Path, tally: _Counts) -> None:
    """Parquet of every part and kind that has rows."""
    tally.kept = frame.height
    for part in PARTS:
        rows = frame.filter(pl.col("part") == part).drop("part")
        kinds = {name: table for name, table in derive(kind, rows).items() if table.height}
        tally.parts[part] = {name: table.height for name, table in kinds.items()}
        for name in list(kinds):
            (out / part).mkdir(exist_ok=True)
            # For every row group polars copies the whole chunk that it lies in: small chunks keep that linear.
            pieces = pl.concat(kinds.pop(name).iter_slices(_CHUNK), rechunk=False)
            pieces.write_parquet(out / part / f"{name}.parquet")


# --- as a stage


def run(context: "StageContext") -> dict[str, float]:
    """Inputs: source (the file), model (for its tokenizer), evaluation, rows, all of them optional. Output: data."""
    request = context.request
    from stages.engine.data.codec import Codec

    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # the runner turns it off; this stage tokenizes large batches
    params = ValidateParams.model_validate(request.params)
    _refuse_moving_dataset(params)
    if context.has("source"):
        params = params.model_copy(update={"path": str(context.input("source"))})
    out = context.work / "data"
    shutil.rmtree(out, ignore_errors=True)
    try:
        check(
            params,
            out,
            Codec.load(context.input("model")) if context.has("model") else None,
            context.input("evaluation") if context.has("evaluation") else None,
            context.input("rows") if context.has("rows") else None,
            seed=request.seed,
            progress=context.progress,
            log_text=request.log_text,
        )
    finally:
        metrics = _log(context, params, out)
    # Not the digest of the rows: the same rows under other limits or fractions are other data to learn from.
    context.tag("data.version", context.publish("data", out).sha256[:16])
    return metrics


def _refuse_moving_dataset(params: ValidateParams) -> None:
    source = data_source(params.path)
    moves = isinstance(source, Hub) and not Path(source.name).expanduser().exists()
    if moves and not is_commit(params.revision):
        raise refuse(
            "revision",
            params.revision,
            f"{params.path} changes with time: a branch or tag moves",
            "set it to the full commit that you want, so that the same config means the same rows",
            kind="no_revision",
        )


def _log(context: "StageContext", params: ValidateParams, out: Path) -> dict[str, float]:
    """Log the report, if it was written; returns its counts as metrics."""
    if not (out / "report.json").is_file():
        return {}
    report = Report.model_validate_json((out / "report.json").read_text(encoding="utf-8"))
    metrics = {"data/rows": report.rows, "data/kept": report.kept, "data/quarantined": report.quarantined}
    metrics |= {f"quarantined/{reason}": n for reason, n in report.reasons.items()}
    metrics |= {f"data/{part}/{kind}": n for part, kinds in report.parts.items() for kind, n in kinds.items()}
    values = {name: float(value) for name, value in metrics.items()}
    context.metrics(values)
    context.tag("data.sha256", report.sha256)
    context.dataset(params.path, params.path, report.sha256, report.rows)
    context.file(out / "report.json", "report")
    context.file(out / "quarantine.jsonl", "report")
    return values
