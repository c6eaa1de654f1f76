"""Finished stage runs, as runs leave them."""

from pathlib import Path
from typing import Any

from schemas.stage import Request, Result
from stages.tracking import StageRun


def finish(outputs: dict[str, Path], metrics: dict[str, float] | None = None, **request: Any) -> Result:
    """A finished stage run with the given outputs; models are those called `model`."""
    pipeline_run = request.pop("pipeline_run", "run-1")
    whole = Request(version=1, pipeline_run=pipeline_run, experiment="trial", **request)
    with StageRun(whole) as run:
        for name, folder in outputs.items():
            run.publish(name, folder, model=name == "model")
        return run.finish(metrics or {})
