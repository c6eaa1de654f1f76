"""Two pipeline runs compared with each other: the models of both in one comparison, by stage `compare` itself."""

from collections.abc import Mapping

from flows.execution import process
from flows.results import lookup
from flows.results.history import SHORT
from flows.results.summary import Compared
from schemas.errors import StageError, refuse
from schemas.stage import BASELINES, PEOPLE, STAGES, Artifact, Request
from stages import tracking


def compare(one: str, other: str) -> Compared:
    """All models of two runs head to head. Those that differ bear their run's id; equal ones are there once.

    Raises:
        StageError: there is no such run, or the runs do not have their judge and held-out prompts in common.
    """
    ends = [lookup.comparison(which) for which in (one, other)]
    first, second = (lookup.request_of(end.run_id) for end in ends)
    given = {end.pipeline_run[:SHORT]: asked.inputs for end, asked in zip(ends, (first, second), strict=True)}
    if len(given) < len(ends):
        raise refuse(
            "RUN", other, "this is the same run.", "name two runs: `alignflow runs` lists them", kind="history"
        )
    request = Request(
        stage="compare",
        version=STAGES["compare"].version,
        params={},  # a judge that only compares is not asked about these pairs: it may cost money
        inputs=together(given),
        experiment=first.experiment,
        tags={lookup.ACROSS: " ".join(end.pipeline_run for end in ends)},
        log_text=first.log_text and second.log_text,
    )
    result = process.run_stage(request)
    if result.error is not None:
        raise StageError(result.error, status=result.status)
    return Compared(tracking.fetch(result.outputs["comparison"]))


def together(runs: Mapping[str, Mapping[str, Artifact]]) -> dict[str, Artifact]:
    """The inputs of several comparisons as those of one: name, or `name-RUN` where the runs have different ones."""
    inputs: dict[str, Artifact] = {}
    names = dict.fromkeys(name for given in runs.values() for name in given if name != PEOPLE)
    for name in names:
        own = {run: given[name] for run, given in runs.items() if name in given}
        same = len({artifact.sha256 for artifact in own.values()}) == 1
        if name == BASELINES:  # of the SFT model, which has to be one
            inputs |= {name: next(iter(own.values()))} if same and len(own) == len(runs) else {}
        else:
            inputs |= {name if same else f"{name}-{run}": artifact for run, artifact in own.items()}
    return inputs
