"""People's verdicts on two models of a run (`alignflow ab`): which answers they see, where the results are kept, and
the report that shows them.
"""

from pathlib import Path

from flows.execution import process
from flows.planning.requests import people_said
from flows.results import lookup
from schemas.errors import StageError, refuse
from schemas.stage import BASELINES, PEOPLE, STAGES, Request
from stages import tracking

SEATS = ("base", "sft")
"""Models that others are judged against: they come second."""


def ordered(model: str, other: str) -> tuple[str, str]:
    """Both names in the order in which results are kept, so that it does not matter how they were typed."""
    first, second = sorted((model, other), key=lambda name: (name in SEATS, name))
    return first, second


def request_of(run: str | None) -> Request:
    """The request for the comparison of a run. Raises StageError when there is none."""
    return lookup.request_of(lookup.comparison(run).run_id)


def evaluations(asked: Request, model: str, other: str) -> tuple[Path, Path]:
    """The folders of both models' evaluations.

    Raises:
        StageError: the run has compared no such model, both are the same, or texts are not kept.
    """
    known = [name for name in asked.inputs if name not in (BASELINES, PEOPLE)]
    for name in (model, other):
        if name not in known:
            fix = f"name two of {', '.join(known)}; `alignflow runs` lists other runs, which --run names"
            raise refuse("MODEL", name, "the run has compared no such model.", fix, kind="history")
    if model == other:
        raise refuse("MODEL", other, "this is the same model.", "name two models", kind="history")
    if not asked.log_text:
        raise refuse("log_text", False, "the run has kept no answers.", "run with log_text: true", kind="missing_input")
    first, second = (tracking.fetch(asked.inputs[name]) for name in (model, other))
    return first, second


def shown(asked: Request, out: Path) -> bool:
    """Whether the comparison holds what people's verdicts have come to so far, or there are none."""
    made = out / "results"
    if not made.is_dir() or not any(made.iterdir()):
        return True
    return PEOPLE in asked.inputs and asked.inputs[PEOPLE].sha256 == tracking.digest(made)


def refresh(asked: Request) -> Path | None:
    """Compare once more, now with what people said; the new report. None where a judge would have to be asked again.

    Raises:
        StageError: the stage has stopped.
    """
    people = people_said(asked.inputs, asked.params)
    if not people:
        return None
    inputs = {**asked.inputs, **people}
    request = asked.model_copy(update={"inputs": inputs, "version": STAGES["compare"].version})
    result = process.run_stage(request)
    if result.error is not None:
        raise StageError(result.error, status=result.status)
    tracking.note_reuse(result, asked.pipeline_run)
    return tracking.fetch(result.outputs["comparison"]) / "report.html"
