"""One stage as a Prefect flow: what the deployments `stage/POOL` run where a worker takes them up."""

from typing import Any

from prefect import flow, get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Crashed, Failed, State

from flows import runner
from flows.lease import stage_lease
from schemas.stage import Request
from stages import tracking


def run_name() -> str:
    """The stage's short name, as in the pipeline: `sft`, `eval dpo`."""
    return tracking.label(Request.model_validate(flow_run.parameters["request"]))


@flow(name="stage", flow_run_name=run_name, persist_result=False, result_serializer="json")
def stage(request: Request) -> State[Any]:
    """Run the stage on this machine. Its result lies in MLflow under its key; a stop becomes a state of its own name:
    Refused, Diverged, Preempted, Failed, or Crashed when it was killed.
    """
    runner.begin()
    try:
        result = runner.run_stage(request, get_run_logger(), stage_lease(request.key()))
    except BaseException:
        runner.stop_all()
        raise
    if result.status == "done":
        return Completed(message=f"MLflow run {result.run_id}{', reused' if result.reused else ''}")
    if result.error is not None and result.error.kind == "killed":
        return Crashed(message=str(result.error))
    return Failed(name=result.status.title(), message=str(result.error))
