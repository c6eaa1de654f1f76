"""Run one stage as a process of its own, and hand back its result.

The device is free when the process ends, a crash cannot take the flow with it, and the flow needs no torch. A result
that exists is taken without starting anything.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from flows.execution import gpu_slots, warm
from flows.execution.output import PIECE, Log, Output, Watch
from schemas.environment import HOME, PARENT, WARM, launcher, python_path
from schemas.errors import EXIT_CODES, Problem, StageError, refuse
from schemas.stage import Request, Result
from stages import tracking
from stages.runtime import workspace

# -P: a folder `stages` in the working directory is not ours.
COMMAND = [sys.executable, "-P", "-m", "stages"]
GRACE_SECONDS, RANKS_SECONDS = 4.0, 40.0
"""Between SIGTERM and SIGKILL, for a stage that is stopped from outside; and for one of several ranks, or behind a
launcher: torchrun waits 30 s for its ranks to save, and a cluster about as long.
"""

_processes: dict[subprocess.Popen[bytes], float] = {}
"""Those that run, and how long each may take to save."""
_guard = threading.Lock()
_stopping = threading.Event()
_stopped: list[str] = []
"""Since `begin`: stages that `stop_all` ended, and how far they were."""


@contextlib.contextmanager
def stages_of_flow() -> Iterator[None]:
    """Around the stages of a flow: they are forks where they can be; when it is stopped so are they, politely first."""
    with warm.warm():
        try:
            yield
        except StageError:
            raise
        except BaseException:
            stop_all()  # before the process that they are forks of ends
            raise


def stopping() -> bool:
    """Whether `stop_all` was called: what waits gives up, and what was stopped is not started again."""
    return _stopping.is_set()


def begin() -> None:
    """Let stages start, also after a `stop_all`."""
    _stopping.clear()
    _stopped.clear()


def stopped() -> list[str]:
    """What `stop_all` has stopped, and how far each was: `dpo stopped after step 8 of 94, saved`."""
    return list(_stopped)


def run_stage(
    request: Request, log: Log | None = None, alone: contextlib.AbstractContextManager[None] | None = None
) -> Result:
    """The stage's result: one that already exists, else that of a new process. A stage that stops raises no exception.

    The process's lines go to `log` while it runs, within `alone`, which may keep out others that want the same result:
    on this host the stage does so itself.
    """
    log = log or logging.getLogger("alignflow")
    known = reused(request, log)
    if known is not None:
        return known
    ask = workspace.work_folder(request.key()) / "asks" / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    workspace.write_whole(ask / "request.json", request.model_dump_json(indent=2))
    began = time.monotonic()
    try:
        with alone or contextlib.nullcontext():
            made = reused(request, log) if alone else None  # by another host, while this one waited
            if made is not None:
                return made
            code = run_process(request, ask / "request.json", log)
    except StageError as error:
        return Result(status=error.status, key=request.key(), error=error.problem)
    result = read_result(ask / "result.json", request, code)
    if stopping() and result.status == "preempted" and result.error is not None:
        _stopped.append(f"{request.label} {result.error.message}")
    log.info("%s: %s after %.0f s", request.label, result.status, time.monotonic() - began)
    return result


def reused(request: Request, log: Log) -> Result | None:
    """The stage's result where it already exists, noted as reused."""
    result = tracking.find(request.key())
    if result is not None:
        log.info("%s: reused, from run %s", request.label, result.run_id)
        tracking.note_reuse(result, request.pipeline_run)
    return result


def run_process(request: Request, path: Path, log: Log) -> int:
    """Start `python -P -m stages` once its devices are free, pass its lines on, and return its exit code. Nothing of it
    outlives this call.

    Raises:
        StageError: it was stopped because it hangs (status `preempted`).
    """
    with gpu_slots.hold_devices(request, log, stopping) as (shown, locks):
        process = start(request, path, shown, locks)
        with Output(log, path.with_name("output.log")) as output:
            watch = Watch(process, output, workspace.work_folder(request.key()), request.placement.minutes)
            code = follow(process, output, watch)
    if watch.hangs:
        message = f"stage {request.label} has shown no progress for {watch.minutes:g} minutes and was stopped."
        fix = "start it again: it resumes; raise stage_minutes if it was only slow"
        raise refuse("stage_minutes", watch.minutes, message, fix, kind="no_progress", status="preempted")
    return code


def start(request: Request, path: Path, shown: dict[str, str], locks: list[int]) -> subprocess.Popen[bytes]:
    """The stage's process; `shown` are variables that show it its devices, `locks` the descriptors it holds with us."""
    variables, command, inherited = environment(request) | shown, COMMAND, list(locks)
    asks = warm.asks(request, variables)
    if asks is not None:
        variables[WARM], command = str(asks), warm.COMMAND
        inherited.append(asks)
    try:
        process = subprocess.Popen(
            [*launcher(), *command, request.stage, str(path)],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
            umask=workspace.PRIVATE,
            pass_fds=inherited,
        )
    finally:
        if asks is not None:
            os.close(asks)
    with _guard:
        _processes[process] = RANKS_SECONDS if launcher() or request.placement.ranks > 1 else GRACE_SECONDS
    return process


def follow(process: subprocess.Popen[bytes], output: Output, watch: Watch) -> int:
    """Pass a process's lines on until it ends, or hangs and is stopped; its exit code."""
    assert process.stdout is not None
    try:
        with watch.calling(end):
            while piece := process.stdout.readline(PIECE):
                output.add(piece)
            return process.wait()
    finally:
        end(process)
        process.stdout.close()
        with _guard:
            _processes.pop(process, None)


def environment(request: Request) -> dict[str, str]:
    """The process's environment: where this code lies, its parent, and how many threads it may use."""
    root = str(Path(tracking.__file__).resolve().parents[2])
    values = {
        **os.environ,
        "PYTHONPATH": python_path(root),
        "PYTHONUNBUFFERED": "1",
        HOME: str(workspace.home()),
        PARENT: str(os.getpid()),
        "TOKENIZERS_PARALLELISM": "false",
    }
    torchrun = [name for name in values if name.startswith("PET_")]
    if request.placement.nodes == 1:
        for name in torchrun:  # for this process, not for the stage
            del values[name]
    if launcher() and request.placement.ranks > 1:  # it starts the stage on so many nodes, and tells where they are
        values["PET_NNODES"] = str(request.placement.nodes)
        values["PET_NPROC_PER_NODE"] = str(request.placement.devices)
    if request.placement.threads is not None:
        values["OMP_NUM_THREADS"] = values["MKL_NUM_THREADS"] = str(request.placement.threads)
    return values


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its group: first politely, so that a training saves, then not."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_processes.get(process, GRACE_SECONDS))
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # what the process has left behind
    process.wait()


def stop_all() -> None:
    """End all stages that run for this process; none starts until `begin`."""
    _stopping.set()
    with _guard:
        running = dict(_processes)
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
    for process, seconds in running.items():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def read_result(path: Path, request: Request, code: int) -> Result:
    """What the stage has written, or what its death means when it has written nothing."""
    if path.exists():
        return Result.model_validate_json(path.read_text())
    if code == EXIT_CODES["preempted"]:
        problem = Problem(kind="preempted", message="the stage stopped before it began.", fix="start it again")
        return Result(status="preempted", key=request.key(), error=problem)
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    fix = "look at its last lines in the log; when memory ran out, lower tokens_per_micro_batch; then start it again"
    problem = Problem(kind="killed", message=f"the process of stage {request.stage} {how} and left no result.", fix=fix)
    return Result(status="failed", key=request.key(), error=problem)
