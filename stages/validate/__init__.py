"""Stage `validate`: reads rows, quarantines the bad ones with a reason, splits by prompt, and derives further kinds.

    readers -> reading -> CHECKS, in order -> verdict -> derive

Rows go down, findings come back: each check sees only the rows that passed the ones before (table_checks.py,
token_checks.py), and what it finds goes to the quarantine. stages/commands/validate.py runs it without MLflow.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import polars as pl

from schemas.data import Kind, ValidateParams
from schemas.errors import StageError, refuse
from stages.validate import ngrams, table_checks, token_checks
from stages.validate.context import Context, Finding
from stages.validate.derive import PARTS, part, write
from stages.validate.quarantine import Quarantine, Report
from stages.validate.readers import refuse_moving
from stages.validate.reading import read
from stages.validate.verdict import refusal

if TYPE_CHECKING:
    from stages.runtime.context import StageContext

CHECKS: tuple[Callable[[pl.DataFrame, Context], Iterator[Finding]], ...] = (
    table_checks.broken_fields,
    table_checks.repetitions,
    table_checks.too_many_characters,
    token_checks.unusable_tokens,
    table_checks.look_alikes,
    table_checks.contradictions,
    table_checks.hidden_characters,
    token_checks.prompt_tokens_differ,
    token_checks.systems_left_out,
    table_checks.leaks,
    ngrams.near_duplicates,
    ngrams.overlaps,
)


def check(context: Context, out: Path) -> Report:
    """Check, split and derive; write everything to `out`. Needs no MLflow.

    Raises StageError (refused) when the data cannot be used; quarantine.jsonl and report.json are written even then.
    """
    out.mkdir(parents=True, exist_ok=True)
    for file in (out / side / f"{kind}.parquet" for side in PARTS for kind in get_args(Kind)):
        file.unlink(missing_ok=True)  # what an earlier check left
    parts, error, left = {}, None, None
    with closing(Quarantine(out / "quarantine.jsonl", context.log_text)) as quarantine:
        try:
            frame = read(context, quarantine)
            for find in CHECKS:
                frame = quarantine.sift(frame, find(frame, context))
            frame = frame.with_columns(part=part(context.params))
            if error := refusal(frame, context, quarantine):
                raise error
            parts, left = write(context.params.kind, frame, out), frame
        except StageError as refused:
            error = refused
        except MemoryError:
            message = f"memory ran out after {context.read} rows"
            error = refuse("path", context.params.path, message, "take fewer rows (`limit`), or a larger machine")
    report = quarantine.report(context, parts, error, left)
    if error:
        raise error
    return report


def run(context: "StageContext") -> dict[str, float]:
    """Inputs: source (the file), model (for its tokenizer), evaluation, rows, all of them optional. Output: data."""
    from stages.engine.data.codec import Codec  # takes seconds, and a check without a model does without

    request = context.request
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # the runner turns it off; this stage tokenizes large batches
    params = ValidateParams.model_validate(request.params)
    refuse_moving(params)
    if context.has("source"):
        params = params.model_copy(update={"path": str(context.input("source"))})
    out = context.work / "data"
    shutil.rmtree(out, ignore_errors=True)
    codec = Codec.load(context.input("model")) if context.has("model") else None
    evaluation, rows = (context.input(name) if context.has(name) else None for name in ("evaluation", "rows"))
    try:
        check(Context(params, codec, evaluation, rows, request.seed, context.progress, request.log_text), out)
    finally:
        metrics = {}
        if (out / "report.json").is_file():
            report = Report.model_validate_json((out / "report.json").read_text(encoding="utf-8"))
            metrics = report.metrics()
            context.metrics(metrics)
            context.tag("data.sha256", report.sha256)
            context.dataset(params.path, params.path, report.sha256, report.rows)
            for name in ("report.json", "quarantine.jsonl"):
                context.file(out / name, "report")
    # Not the digest of the rows: the same rows under other limits or fractions are other data to learn from.
    context.tag("data.version", context.publish("data", out).sha256[:16])
    return metrics
