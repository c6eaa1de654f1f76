"""One stage as a Prefect flow: what the deployments `stage/POOL` run where a worker takes them up."""

from typing import Any

from prefect import flow, get_run_logger
from prefect.runtime import deployment, flow_run
from prefect.states import Completed, Crashed, Failed, State

from flows.execution import process
from flows.execution.lease import stage_lease
from flows.execution.progress import Progress
from flows.planning.allowed_paths import check_request_roots
from flows.servers import checks
from schemas import environment
from schemas.errors import StageError
from schemas.stage import Request
from stages import tracking


def run_name() -> str:
    """The stage's short name, as in the pipeline: `sft`, `eval dpo`."""
    return Request.model_validate(flow_run.parameters["request"]).label


@flow(name="stage", flow_run_name=run_name, persist_result=False, result_serializer="json")
def stage(request: Request) -> State[Any]:
    """Run the stage on this machine. Its result is in MLflow under its key; a stop becomes a state of its own name:
    Refused, Diverged, Preempted, Failed, or Crashed when it was killed.

    Where ALIGNFLOW_GPUS says how many GPUs a worker's machine should have, fewer are refused.
    """
    process.begin()
    try:
        if deployment.id:
            check_request_roots(request, deployed=True)
            checks.check_experiment(tracking.experiment_name(request), placed=True)
        if request.spec.needs_device:
            checks.check_gpu(environment.gpus())
        log = Progress(get_run_logger(), request.label)
        result = process.run_stage(request, log, stage_lease(request.key(), log))
    except StageError as error:
        return Failed(name=error.status.title(), message=str(error))
    except BaseException:
        process.stop_all()
        raise
    if result.status == "done":
        log.done()
        return Completed(message=f"MLflow run {result.run_id}{', reused' if result.reused else ''}")
    if result.error is not None and result.error.kind == "killed":
        return Crashed(message=str(result.error))
    return Failed(name=result.status.title(), message=str(result.error))
