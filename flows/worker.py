"""A work pool's worker that starts only our own flows, as the pool's template on this machine says.

    python -P -m flows.worker --pool gpu ...        options of `prefect worker start`

Whoever may ask the Prefect server for a run names its job variables too, and may change the pool's template and the
deployments there. Prefect's own worker does what the server has. This one takes from the server what the schema of the
template here lets a caller choose, and all else from the template.
"""

import logging
import runpy
import sys
from collections.abc import Callable
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from prefect.client.orchestration import get_client
from prefect.plugins import load_prefect_collections
from prefect.states import Failed
from prefect.workers.base import BaseJobConfiguration, BaseWorker, BaseWorkerResult
from prefect.workers.process import ProcessWorker

from flows.execution import job
from flows.servers import pools
from schemas.errors import StageError, refuse

log = logging.getLogger("alignflow")


def chosen(server_template: dict[str, Any], values: dict[str, Any], template: dict[str, Any]) -> dict[str, Any]:
    """The job variables of a run: those given, else the pool's defaults on the server, where the template here has
    such a variable.

    Raises:
        StageError: one of them is not for callers to choose, or has a value that the template's schema refuses.
    """
    schema = template["variables"]
    there = server_template.get("variables", {}).get("properties", {})
    defaults = {name: about["default"] for name, about in there.items() if "default" in about}
    merged = {name: value for name, value in defaults.items() if name in schema["properties"]} | values
    error = best_match(Draft202012Validator(schema).iter_errors(merged))
    if error is not None:
        field = ".".join(["job_variables", *map(str, error.absolute_path)])
        fix = "leave it out; the operator sets it in the pool's template or where the worker starts"
        raise refuse(field, error.instance, f"a run may not choose this: {error.message}.", fix, kind="access")
    return merged


def fenced(kind: type[BaseJobConfiguration], template: dict[str, Any]) -> type[BaseJobConfiguration]:
    """The job configuration of a kind of worker, made from the template alone. What a run may not choose makes it a
    configuration that is refused when it is to run.
    """

    class Fenced(kind):  # type: ignore[misc, valid-type]
        _refusal: StageError | None = None

        @classmethod
        async def from_template_and_values(
            cls, base_job_template: dict[str, Any], values: dict[str, Any], client: Any = None
        ) -> Any:
            refusal = None
            try:
                values = chosen(base_job_template, values, template)
            except StageError as error:
                values, refusal = {}, error
            made = await super().from_template_and_values(template, values, client=client)
            made._refusal = refusal
            return made

        def prepare_for_flow_run(self, flow_run: Any, deployment: Any = None, *others: Any, **named: Any) -> None:
            try:
                job.own_flow(deployment)
            except StageError as error:
                self._refusal = self._refusal or error
            super().prepare_for_flow_run(flow_run, deployment, *others, **named)

    return Fenced


def refusing(run: Callable[..., Any]) -> Callable[..., Any]:
    """A worker's `run` that makes a refused run Failed: a Crashed one would be started again."""

    async def instead(
        self: BaseWorker[Any, Any, Any], flow_run: Any, configuration: Any, task_status: Any = None
    ) -> Any:
        if configuration._refusal is None:
            return await run(self, flow_run=flow_run, configuration=configuration, task_status=task_status)
        log.warning("flow run %s is refused: %s", flow_run.name, configuration._refusal)
        await self.client.set_flow_run_state(flow_run.id, Failed(message=str(configuration._refusal)), force=True)
        if task_status is not None:
            task_status.started("refused")
        return BaseWorkerResult(identifier="refused", status_code=0)

    return instead


def guard(pool: str) -> str:
    """Make Prefect's worker for a pool one that is fenced; the worker's type.

    Raises:
        StageError: no worker of the pool's type is installed, or no template here is for it.
    """
    with get_client(sync_client=True) as client:
        kind = client.read_work_pool(pool).type
    if kind == ProcessWorker.type:  # Prefect's own: what others are in, Kubernetes' client too, takes a second to load
        sys.modules[load_prefect_collections.__module__]._collections = {}  # type: ignore[attr-defined]
    worker: Any = BaseWorker.get_worker_class_from_type(kind)
    if worker is None:
        fix = f"install it: pip install prefect-{kind}"
        raise refuse("--pool", pool, f"no worker for pools of type {kind} is installed.", fix, kind="pool")
    worker.job_configuration = fenced(worker.job_configuration, pools.read(pools.like(pool, kind)))
    worker.run = refusing(worker.run)
    # On a crash or a cancellation a worker loads the flow by itself, for its hooks: with pull steps and all.
    module = sys.modules[worker.__module__]
    if hasattr(module, "load_flow_from_flow_run"):
        module.load_flow_from_flow_run = load_own  # type: ignore[attr-defined]
    return kind


async def load_own(*given: Any, **named: Any) -> Any:
    """The flow of a flow run, from this installation. Prefect calls it with the run alone, or with a client before it.

    Raises:
        StageError: it is not one of ours.
    """
    from prefect.flows import load_flow_from_entrypoint

    flow_run = next(one for one in (*given, *named.values()) if hasattr(one, "deployment_id"))
    async with get_client() as client:
        return load_flow_from_entrypoint(job.own_flow(await client.read_deployment(flow_run.deployment_id)))


def main(options: list[str]) -> None:
    """Start the worker; ends when it is told to."""
    kind = guard(options[options.index("--pool") + 1])
    sys.argv = ["prefect", "worker", "start", "--type", kind, *options]
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
