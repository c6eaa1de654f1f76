"""Run one stage in this process: `python -P -m stages NAME request.json`.

Writes `result.json` beside the request and exits with the code of its status (schemas/errors.py). With more than one
device in the request's placement it turns itself into torchrun, which starts it again once per device.
"""

import gc
import importlib
import logging
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType
from typing import TypeVar

from pydantic import ValidationError

from schemas.environment import REPLICAS, SAFE_PATH
from schemas.errors import EXIT_CODES, Problem, StageError, refuse, stop_in
from schemas.stage import STAGES, Request, Result
from schemas.text import message, one_line, visible
from stages import tracking
from stages.runtime import workspace
from stages.runtime.process import die_with_parent
from stages.runtime.resources import out_of_resource
from stages.tracking import StageRun, Told

log = logging.getLogger("alignflow")

LEFT_OUT = "(its text is omitted: log_text is false)."

DEAD_RANK = r"(closed|reset) by peer|Broken pipe|ncclRemoteError"
"""In the words of gloo, of torchrun's store and of NCCL."""

E = TypeVar("E", bound=BaseException)

# Imported only when run, so that `validate` does not wait for torch.
MODULES = {name: f"stages.{name}" for name in STAGES}


def module_of(stage: str) -> ModuleType:
    """A stage's module. What its imports have made stays; the garbage collector never looks at it again."""
    module = importlib.import_module(MODULES[stage])
    gc.freeze()
    gc.enable()
    return module


def preempt(signum: int, frame: FrameType | None) -> None:
    """SIGTERM: stop here. The training loop puts its own handler in this one's place, to save first."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise StageError("stopped", status="preempted", kind="preempted", fix="start it again: it resumes")


class Lines(logging.Formatter):
    """Plain lines; from warnings up each begins with its level, by which the flow's log knows it, and no other does."""

    def format(self, record: logging.LogRecord) -> str:
        text = tracking.without_passwords(super().format(record))
        if record.levelno < logging.WARNING:
            return message(f"\n{text}")[1:]  # the first line may be a text from outside as well
        text = visible(text)
        return "\n".join(f"{record.levelname.lower()}: {line}" for line in text.splitlines())


def read_request(name: str, path: Path) -> Request:
    """The request, checked against the stage that is asked for.

    Raises:
        StageError: it cannot be read, or asks for another stage or version.
    """
    try:
        request = Request.model_validate_json(path.read_text())
    except (OSError, ValueError) as error:
        raise refuse("request", path, f"the request cannot be read: {error}", None, kind="request") from error
    if name not in MODULES or request.stage != name:
        known = ", ".join(MODULES)
        raise refuse("stage", request.stage, f"asked to run {name!r}.", known, kind="request")
    if request.version != STAGES[name].version:
        fix = f"this code has version {STAGES[name].version}; make the request with the same code"
        raise refuse("version", request.version, "another version.", fix, kind="request")
    return request


def become_torchrun(request: Request, argv: list[str]) -> None:
    """Replace this process by torchrun, which starts one process per device; the death signal stays set.

    Where PET_NNODES is set, torchrun's own variables say where the other nodes are: it joins them.

    Raises:
        StageError: the request asks for another number of nodes.
    """
    placed, nodes = request.placement, os.environ.get("PET_NNODES")
    if (nodes or "1") != str(placed.nodes):
        message = f"the stage was started on {nodes or 'one'} (PET_NNODES), not on so many."
        fix = "place it on a pool of several nodes (slurm, nodes), or start it on each with torchrun's variables: "
        raise refuse("nodes", placed.nodes, message, f"{fix}deploy/README.md, GPU work pools", kind="placement")
    if os.environ.get("PET_NODE_RANK", "0") == "0":  # of an earlier start, by hand
        Path(argv[1]).with_name("result.json").unlink(missing_ok=True)
    each = os.environ.get("PET_NPROC_PER_NODE", "")
    if each.isdigit() and int(each) != placed.devices:
        message = f"torchrun's variable PET_NPROC_PER_NODE says {each}."
        raise refuse("devices", placed.devices, message, f"set devices to {each}, or leave it out", kind="placement")
    own = ["--standalone"] if nodes in (None, "1") else []
    own += [] if each else [f"--nproc-per-node={placed.devices}"]
    agent = [sys.executable, "-P", "-m", "stages.engine.torchrun", argv[1]]
    ranks = SAFE_PATH | {REPLICAS: str(placed.replicas)}  # torchrun starts them without -P
    os.execve(sys.executable, [*agent, *own, "-m", "stages", *argv], os.environ | ranks)


def alone(name: str, work: Callable[[], str]) -> str:
    """What a process that trains alone has found out."""
    return work()


def told_by_rank_0() -> Told:
    """How ranks share what the first one has found out; one that is alone finds it out itself."""
    if "RANK" not in os.environ:
        return alone
    from stages.engine.torchrun import told  # late: torch

    return told


def run_rank_0(request: Request) -> Result:
    """Rank 0: under the key's lock, take a finished result or do the work."""
    key = request.key()
    work = workspace.work_folder(key)
    with workspace.lock(work / "lock", waiting="another process is running the same stage: waiting for its result"):
        earlier = tracking.find(key)
        told = told_by_rank_0()
        told("reused", lambda: str(earlier is not None))
        if earlier is not None:
            tracking.note_reuse(earlier, request.pipeline_run)
            return earlier
        result = execute(request, told)
        if result.status == "done":
            workspace.clear_work(key)
        return result


def execute(request: Request, told: Told = alone) -> Result:
    """Run the stage under an MLflow run. A stage's end, good or bad, becomes a result."""
    run = StageRun(request, told)
    try:
        with run:
            try:
                stage = module_of(request.stage)
                began, waited = time.monotonic(), tracking.clock.waited
                metrics = stage.run(run)
                times = {"stage_seconds": time.monotonic() - began, "tracking_seconds": tracking.clock.waited - waited}
                run.metrics({f"compute/{name}": seconds for name, seconds in times.items()})
                return run.finish(metrics)
            except BaseException as raised:
                error = meant(raised, request.log_text)
                known = isinstance(error, StageError) or out_of_resource(error) is not None
                run.fail(problem_of(error, request.log_text), None if known else trace_of(error, request.log_text))
                if error is raised:
                    raise
                raise error from None
    except Exception as error:
        return stopped(error, run.key, run.run_id or None, request.log_text)


def meant(error: E, log_text: bool = True) -> E | StageError:
    """What an error stands for: a stop that a library has wrapped, the death of another rank; else itself."""
    if (stop := stop_in(error)) is not None:
        return stop
    ours = isinstance(error, StageError) or not isinstance(error, RuntimeError)  # torch's; a server's is an OSError
    if ours or os.environ.get("WORLD_SIZE", "1") == "1" or not re.search(DEAD_RANK, str(error)):
        return error
    said = f" ({one_line(tracking.without_passwords(str(error)), 200)})" if log_text else ""
    message = f"another rank of the stage has died{said}."
    fix = "look at its last lines in the log; when memory ran out, lower tokens_per_micro_batch; then start it again"
    return StageError(message, status="failed", kind="killed", fix=fix)  # as where a stage of one process is killed


def problem_of(error: BaseException, log_text: bool = True) -> Problem:
    """What a person needs to know of an error; without `log_text` no library's message: it may quote a row."""
    if isinstance(error, StageError):
        return error.problem
    lack = out_of_resource(error)
    if not log_text:
        known = lack.model_dump() if lack else {"kind": type(error).__name__}
        return Problem(**known | {"message": f"{type(error).__name__} {LEFT_OUT}"})
    if lack:
        return lack
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        field = "params." + ".".join(str(part) for part in first["loc"])
        return Problem(kind="params", message=first["msg"], field=field, value=str(first["input"])[:200])
    message = tracking.without_passwords(str(error))
    return Problem(kind=type(error).__name__, message=message or type(error).__name__)


def trace_of(error: BaseException, log_text: bool) -> str:
    """The traceback; without `log_text` its places only, not the error's message."""
    if log_text:
        return "".join(traceback.format_exception(error))
    return "".join([*traceback.format_tb(error.__traceback__), f"{type(error).__name__} {LEFT_OUT}"])


def stopped(error: Exception, key: str, run_id: str | None, log_text: bool = True) -> Result:
    """The result of a stage that an error has ended; the traceback of a bug goes to the log."""
    error = meant(error, log_text)
    status = error.status if isinstance(error, StageError) else "failed"
    if status == "failed" and out_of_resource(error) is None:
        log.error("%s", trace_of(error, log_text))
    problem = problem_of(error, log_text)
    log.log(logging.INFO if status == "preempted" else logging.ERROR, "%s: %s", status, problem)
    return Result(status=status, key=key, run_id=run_id, error=problem)


def main(argv: list[str]) -> int:
    """Run the stage that the command line names; returns the exit code."""
    if len(argv) != 2:
        print(f"usage: python -m stages NAME request.json\n\nNAME is one of {', '.join(MODULES)}", file=sys.stderr)
        return 2
    if not die_with_parent() and "RANK" not in os.environ:  # ranks have torchrun's agent between
        return EXIT_CODES["preempted"]
    rank = int(os.environ.get("RANK", "0"))
    handler = logging.StreamHandler()  # to stderr; the other ranks log errors only
    handler.setFormatter(Lines())
    logging.basicConfig(level=logging.WARNING if rank == 0 else logging.ERROR, handlers=[handler], force=True)
    logging.getLogger("alignflow").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    signal.signal(signal.SIGTERM, preempt)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products on a GPU; read when it starts
    path = Path(argv[1])
    key, log_text = "", True
    try:
        request = read_request(argv[0], path)
        key, log_text = request.key(), request.log_text
        if request.placement.ranks > 1 and "RANK" not in os.environ:
            become_torchrun(request, argv)
        if rank > 0:
            # Wait for rank 0, which holds the lock, then work with it unless the result is reused.
            told = told_by_rank_0()
            if told("reused", lambda: "") == "False":
                with StageRun(request, told) as run:
                    module_of(request.stage).run(run)
            told("ended", str)  # a node whose ranks have left would count as gone while the first rank still publishes
            return 0
        result = run_rank_0(request)
        told_by_rank_0()("ended", str)
    except Exception as error:
        result = stopped(error, key, None, log_text)
    if rank == 0:
        workspace.write_whole(path.with_name("result.json"), result.model_dump_json(indent=2))
    return EXIT_CODES[result.status]


def start(argv: list[str]) -> int:
    """`main`, in a process that is the stage's own."""
    gc.disable()  # until all is imported: looking for garbage, of which there is none, is a fifth of an import's time
    os.umask(workspace.PRIVATE)
    os.environ.update(SAFE_PATH)
    return main(argv)


if __name__ == "__main__":
    sys.exit(start(sys.argv[1:]))
