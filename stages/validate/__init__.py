"""Stage `validate`: reads rows, quarantines the bad ones with a reason, splits by prompt, and writes them.

    readers -> reading -> CHECKS, in order -> verdict -> parts

Rows go down, findings come back: each check sees only the rows that passed the ones before (table_checks.py,
token_checks.py), and what it finds goes to the quarantine. stages/commands/validate.py runs it without MLflow.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import polars as pl

from schemas.config.data import Kind, MixtureParams, ValidateParams
from schemas.errors import StageError, refuse
from schemas.stage import SOURCE, source_input
from stages.engine.tables import PARTS
from stages.validate.checks import ngrams, table_checks, token_checks
from stages.validate.context import Context, Finding
from stages.validate.mixtures import Mixed
from stages.validate.mixtures.report import MixtureReport, lines
from stages.validate.parts import part, write
from stages.validate.quarantine import Quarantine, Report
from stages.validate.readers import refuse_moving
from stages.validate.reading import read
from stages.validate.verdict import few_held_out, refusal

if TYPE_CHECKING:
    from stages.runtime.context import StageContext

log = logging.getLogger("alignflow")

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
    """Check and split; write everything to `out`. Needs no MLflow.

    Raises StageError (refused) when the data cannot be used; quarantine.jsonl and report.json are written even then.
    """
    _clear(out)
    parts, error, left = {}, None, None
    with closing(Quarantine(out / "quarantine.jsonl", context.log_text)) as quarantine:
        try:
            frame = _sifted(read(context, quarantine), context, quarantine.sift)
            if error := refusal(frame, context, quarantine) or few_held_out(frame, context.params, context.params.path):
                raise error
            parts, left = write(context.params.kind, frame, out), frame
        except StageError as refused:
            error = refused
        except MemoryError:
            error = _out_of_memory("path", context.params.path, context.read)
    report = quarantine.report(context, parts, error, left)
    report.write(out)
    if error:
        raise error
    return report


def check_mixture(params: MixtureParams, contexts: Mapping[str, Context], out: Path) -> MixtureReport:
    """The same for several sources. `contexts`: by name, what each is read with.

    Raises StageError as `check` does; `sources.0.path` is a field of the first source.
    """
    _clear(out)
    error = None
    with closing(Mixed(params, contexts, out)) as mixed:
        try:
            for context, frame in mixed.read():
                mixed.checked.append((context, _sifted(frame, context, mixed.sift)))
            if error := mixed.refusal():
                raise error
            mixed.write()
        except StageError as refused:
            error = refused
        except MemoryError:
            error = _out_of_memory("sources", ", ".join(contexts), sum(one.read for one in contexts.values()))
    report = mixed.report(error)
    report.write(out)
    if error:
        raise error
    return report


def _clear(out: Path) -> None:
    """Make the folder, without what an earlier check left."""
    out.mkdir(parents=True, exist_ok=True)
    for file in (out / side / f"{kind}.parquet" for side in PARTS for kind in get_args(Kind)):
        file.unlink(missing_ok=True)


def _sifted(
    frame: pl.DataFrame, context: Context, sift: Callable[[pl.DataFrame, Iterator[Finding]], pl.DataFrame]
) -> pl.DataFrame:
    """The rows that pass all checks, with column `part`."""
    for find in CHECKS:
        frame = sift(frame, find(frame, context))
    return frame.with_columns(part=part(context.params))


def _out_of_memory(field: str, value: str, rows: int) -> StageError:
    message = f"memory ran out after {rows} rows"
    return refuse(field, value, message, "take fewer rows (`limit`), or a larger machine")


def run(context: "StageContext") -> dict[str, float]:
    """Inputs, all of them optional: source (the file), or source.NAME for each of several; model (for its tokenizer),
    evaluation, rows. Output: data.
    """
    from stages.engine.data.codec import Codec  # takes seconds, and a check without a model does without

    request = context.request
    out = context.work / "data"
    shutil.rmtree(out, ignore_errors=True)
    codec = Codec.load(context.input("model")) if context.has("model") else None
    evaluation, rows = (context.input(name) if context.has(name) else None for name in ("evaluation", "rows"))

    def reading(params: ValidateParams, source: str) -> Context:
        refuse_moving(params)
        if context.has(source):
            params = params.model_copy(update={"path": str(context.input(source))})
        return Context(params, codec, evaluation, rows, request.seed, context.progress, request.log_text)

    if "sources" in request.params:
        mixture = MixtureParams.model_validate(request.params)
        contexts = {one.name: reading(mixture.of(one), source_input(one.name)) for one in mixture.sources}
        _log_sources(context, mixture)
        work = partial(check_mixture, mixture, contexts)
    else:
        contexts = {"": reading(ValidateParams.model_validate(request.params), SOURCE)}
        work = partial(check, contexts[""])
    try:
        work(out)
    finally:
        metrics = {}
        if (out / "report.json").is_file():
            metrics = _log_report(context, out, {name: one.params.path for name, one in contexts.items()})
    # Not the digest of the rows: the same rows under other limits or fractions are other data to learn from.
    context.tag("data.version", context.publish("data", out).sha256[:16])
    return metrics


def _log_sources(context: "StageContext", mixture: MixtureParams) -> None:
    """Each source as parameters of its own, `source.chat.weight`: the list of them is one long text."""
    shown = ("path", "kind", "weight", "epochs")
    context.params({SOURCE: {one.name: {name: getattr(one, name) for name in shown} for one in mixture.sources}})


def _log_report(context: "StageContext", out: Path, paths: Mapping[str, str]) -> dict[str, float]:
    """Log what came of the rows, and each source as a data set; returns the metrics. `paths`: by the sources' names."""
    text = (out / "report.json").read_text(encoding="utf-8")
    report = (Report if "" in paths else MixtureReport).model_validate_json(text)
    metrics = report.metrics()
    context.metrics(metrics)
    if isinstance(report, MixtureReport):
        log.info("rows of each source:\n%s", "\n".join(lines(report)))
    context.tag("data.sha256", report.sha256)
    for name, source in report.sources.items() if isinstance(report, MixtureReport) else [("", report)]:
        if name:
            context.tag(f"data.{name}.sha256", source.sha256)
        context.dataset(name or paths[name], paths[name], source.sha256, source.rows)
    for file in ("report.json", "quarantine.jsonl"):
        context.file(out / file, "report")
    return metrics
