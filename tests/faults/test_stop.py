"""A training stage that is told to stop, or whose numbers go bad: its exit code, what it keeps, what MLflow shows."""

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from schemas.config import SFTConfig, methods
from schemas.config.training import Training
from schemas.errors import EXIT_CODES
from schemas.stage import STAGES, Artifact, Request, Result
from stages import tracking
from stages.align import ppo
from stages.engine.data.codec import Codec
from stages.engine.models.loading import load_scorer
from stages.engine.models.saving import save_scorer
from stages.engine.training import checkpoint, loop
from stages.runtime import workspace
from tests.support import homes, models
from tests.support.forks import ended, run
from tests.support.killable_training import whole_stage
from tests.support.two_ranks import start_ranks

AT = 3  # steps that are done when the fault comes

SFT = SFTConfig(batch_size=6, epochs=2, checkpoint_steps=2, learning_rate=1e-2)
PPO = methods.PPO(
    iterations=3, rollout_size=8, batch_size=4, ppo_epochs=2, max_new_tokens=6, checkpoint_steps=2, learning_rate=1e-3
)
STAGE = {"sft": SFT, "align": PPO}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("stop")
    model = models.model_folder(folder / "model")
    save_scorer(load_scorer(model, seed=4), Codec.load(model), folder / "reward", mean=0.1, std=0.5)
    data = models.data_folder(folder / "data", sft=models.rows(20, *models.ANSWERS), prompt=models.rows(20, {}))
    return {"model": model, "reward": folder / "reward", "data": data}


def ask(folder: Path, stage: str, config: Training, inputs: dict[str, Path]) -> Path:
    """A request on disk."""
    given = {name: Artifact(uri=str(path), sha256=tracking.digest(path)) for name, path in inputs.items()}
    params = config.model_dump(mode="json")
    folder.mkdir(parents=True, exist_ok=True)
    request = Request(stage=stage, version=STAGES[stage].version, params=params, inputs=given, name=stage)
    (folder / "request.json").write_text(request.model_dump_json())
    return folder / "request.json"


def result_of(request: Path) -> Result:
    return Result.model_validate_json(request.with_name("result.json").read_text())


@pytest.fixture(scope="module")
def whole(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, ready: Path) -> dict[str, Result]:
    """The results when nothing goes wrong."""
    found = {}
    for stage, config in STAGE.items():
        folder = tmp_path_factory.mktemp("whole")
        request = ask(folder, stage, config, inputs)
        assert run(whole_stage, homes.furnish(folder / "home", ready), request) == 0
        found[stage] = result_of(request)
    return found


# --- what children do ---


def terminated_in_a_step(home: Path, request: Path) -> None:
    """SIGTERM comes within a step, after its gradient."""
    inner = loop.Loop.backward

    def backward(self: loop.Loop, micros: list[Any]) -> Any:
        found = inner(self, micros)
        if self.step == AT:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    loop.Loop.backward = backward  # type: ignore[method-assign]
    whole_stage(home, request)


def terminated_in_a_rollout(home: Path, request: Path) -> None:
    """SIGTERM comes while PPO samples answers for the second time."""
    inner, calls = ppo.sample, []

    def sample(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(*arguments, **named)

    ppo.sample = sample  # type: ignore[assignment]
    whole_stage(home, request)


def loss_goes_bad(value: float, home: Path, request: Path) -> None:
    """The fourth step's loss is multiplied by a value: its gradient is not finite either."""
    inner = loop.Loop.backward

    def backward(self: loop.Loop, micros: list[Any]) -> Any:
        found = inner(self, micros)
        if self.step == AT:
            found["train/loss"] = found["train/loss"] * value
        return found

    loop.Loop.backward = backward  # type: ignore[method-assign]
    whole_stage(home, request)


def gradient_goes_bad(value: float, home: Path, request: Path) -> None:
    """In the fourth step one number of the gradient is bad; the loss is not."""
    inner = loop.Loop.backward

    def backward(self: loop.Loop, micros: list[Any]) -> Any:
        found = inner(self, micros)
        if self.step == AT:
            first = next(p for p in self.raw.parameters() if p.grad is not None)
            assert first.grad is not None
            first.grad.view(-1)[0] = value
        return found

    loop.Loop.backward = backward  # type: ignore[method-assign]
    whole_stage(home, request)


# --- tests ---


def nothing_is_registered() -> None:
    experiments = [experiment.experiment_id for experiment in tracking.client().search_experiments()]
    assert not tracking.client().search_logged_models(experiments)
    assert not tracking.client().search_registered_models()


def steps(run_id: str | None, name: str) -> dict[int, float]:
    """A metric's values by step; each step has one."""
    points = tracking.client().get_metric_history(str(run_id), name)
    assert len({point.step for point in points}) == len(points)
    return {point.step: point.value for point in points}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "fault"),
    [("sft", terminated_in_a_step), ("align", terminated_in_a_step), ("align", terminated_in_a_rollout)],
)
def test_sigterm(
    stage: str,
    fault: Callable[[Path, Path], None],
    inputs: dict[str, Path],
    whole: dict[str, Result],
    ready_home: Path,
    tmp_path: Path,
) -> None:
    """The step in progress ends and is saved; nothing is published; the next start ends as if nothing had been."""
    request = ask(tmp_path, stage, STAGE[stage], inputs)
    assert run(fault, ready_home, request) == EXIT_CODES["preempted"] == 75
    stopped = result_of(request)
    assert stopped.status == "preempted" and not stopped.outputs
    assert tracking.client().get_run(str(stopped.run_id)).info.status == "KILLED"
    nothing_is_registered()
    folder = workspace.work_folder(stopped.key) / "checkpoints"
    newest = checkpoint.newest(folder, stopped.key)
    assert newest is not None
    done = checkpoint.read_state(newest, "loop")["step"]
    assert done == max(steps(stopped.run_id, "train/loss")) and done > AT
    assert not list(folder.glob(".draft*"))

    assert run(whole_stage, ready_home, request) == 0
    result = result_of(request)
    assert result.run_id == stopped.run_id
    assert result.outputs["model"].sha256 == whole[stage].outputs["model"].sha256
    last = steps(result.run_id, "train/loss")
    assert list(last) == list(range(1, len(last) + 1)) and result.metrics["train/loss"] == last[len(last)]


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize(
    ("stage", "fault", "name"),
    [("sft", loss_goes_bad, "train/loss"), ("align", gradient_goes_bad, "train/grad_norm")],
)
def test_numbers_that_are_not_finite(
    stage: str,
    fault: Callable[[float, Path, Path], None],
    name: str,
    value: float,
    inputs: dict[str, Path],
    whole: dict[str, Result],
    ready_home: Path,
    tmp_path: Path,
) -> None:
    """Training stops before the weights have it; the last good checkpoint stays; MLflow shows the number."""
    request = ask(tmp_path, stage, STAGE[stage], inputs)
    assert run(fault, value, ready_home, request) == EXIT_CODES["diverged"] == 70
    stopped = result_of(request)
    assert stopped.status == "diverged" and not stopped.outputs
    assert stopped.error is not None and f"{name} is {value} at step {AT + 1}" in stopped.error.message
    kept = tracking.client().get_run(str(stopped.run_id))
    assert kept.info.status == "FAILED" and f"{name} is {value}" in kept.data.tags["problem"]
    shown = steps(stopped.run_id, name)
    assert list(shown) == list(range(1, AT + 2))
    assert all(math.isfinite(shown[step]) for step in range(1, AT + 1))
    # SQL has no infinity: MLflow keeps the largest number there is.
    assert math.isnan(shown[AT + 1]) if math.isnan(value) else shown[AT + 1] > 1e308
    nothing_is_registered()
    folder = workspace.work_folder(stopped.key) / "checkpoints"
    newest = checkpoint.newest(folder, stopped.key)
    assert newest is not None and newest.name == "step-2" and not list(folder.glob(".draft*"))
    weights = checkpoint.read_state(newest, "model")["model"]
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())

    assert run(whole_stage, ready_home, request) == 0  # the fault was not in the data: it ends as if nothing had been
    assert result_of(request).outputs["model"].sha256 == whole[stage].outputs["model"].sha256


def as_rank(rank: int, work: Callable[[Path, Path], None], home: Path, request: Path) -> None:
    work(home, request)


@pytest.mark.slow
def test_ranks_with_shards_that_are_told_to_stop_save_together(
    inputs: dict[str, Path], ready_home: Path, tmp_path: Path
) -> None:
    request = ask(tmp_path, "sft", SFT.model_copy(update={"sharding": "full"}), inputs)
    for process in start_ranks(2, as_rank, terminated_in_a_step, ready_home, request):
        assert ended(process) == EXIT_CODES["preempted"]
    stopped = result_of(request)
    assert stopped.status == "preempted" and stopped.error is not None
    assert f"stopped after step {AT + 1} of 7, saved" in stopped.error.message
    for process in start_ranks(2, as_rank, whole_stage, ready_home, request):
        assert ended(process) == 0
    assert list(steps(result_of(request).run_id, "train/loss")) == [*range(1, 8)]
