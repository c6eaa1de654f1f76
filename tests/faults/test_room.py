"""Running out: of disk, of memory, of sane numbers. The error has a name, and what was good is kept."""

import contextlib
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from schemas.config import BaseParams, Scratch, SFTConfig, methods
from schemas.config.training import Training
from schemas.errors import EXIT_CODES
from schemas.stage import STAGES, Artifact, Request, Result
from stages import tracking
from stages.base import build
from stages.engine import demo
from stages.engine.data.codec import Codec
from stages.engine.models.loading import load_scorer
from stages.engine.models.saving import save_scorer
from stages.engine.training import loop
from tests.support import homes, models
from tests.support.forks import run
from tests.support.killable_training import whole_stage

WIDE = Scratch(hidden_size=192, layers=2, heads=4, intermediate_size=768, max_length=64)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model wide enough to need memory, a reward model, and notes to learn from."""
    folder = tmp_path_factory.mktemp("room")
    build(BaseParams(scratch=WIDE), 0, folder / "model")
    save_scorer(load_scorer(folder / "model", seed=4), Codec.load(folder / "model"), folder / "reward", std=0.5)
    notes = [
        models.row(i, row["prompt"], response=row["response"])
        for i, row in zip(range(64), demo.rows("sft"), strict=False)
    ]
    prompts = [{k: v for k, v in note.items() if k != "response"} for note in notes]
    data = models.data_folder(folder / "data", sft=notes, prompt=prompts)
    return {"model": folder / "model", "reward": folder / "reward", "data": data}


def ask(folder: Path, stage: str, config: Training, inputs: dict[str, Path]) -> Path:
    """A request on disk."""
    given = {name: Artifact(uri=str(path), sha256=tracking.digest(path)) for name, path in inputs.items()}
    request = Request(stage=stage, version=STAGES[stage].version, params=config.model_dump(mode="json"), inputs=given)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "request.json").write_text(request.model_dump_json())
    return folder / "request.json"


def work_of(home: Path, request: Path) -> Path:
    return home / "work" / Request.model_validate_json(request.read_text()).key()


def result_of(request: Path) -> Result:
    return Result.model_validate_json(request.with_name("result.json").read_text())


# --- what children do ---


def disk_fills_up(home: Path, request: Path) -> None:
    """After the first checkpoint no byte is left."""
    inner = loop.Loop.save

    def save(self: loop.Loop) -> None:
        inner(self)
        if self.step > 2:
            return
        self.writer.wait()
        with (home / "work" / "ballast").open("wb", buffering=0) as ballast:
            size = 2**16
            while size:
                try:
                    ballast.write(bytes(size))
                except OSError:
                    size //= 2

    loop.Loop.save = save  # type: ignore[method-assign]
    whole_stage(home, request)


def memory_gets_scarce(home: Path, request: Path) -> None:
    """From step 2 on, no more can be had from the system, and what this process holds is taken, but for a little."""
    inner = loop.Loop.one_step

    def one_step(self: loop.Loop, micros: list[object]) -> dict[str, float]:
        if self.step != 2:
            return inner(self, micros)
        self.writer.wait()
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        unlimited = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (held, unlimited[1]))
        ballast: list[bytearray] = []
        try:
            for size in (2**22, 2**18, 2**15):
                with contextlib.suppress(MemoryError):
                    while True:
                        ballast.append(bytearray(size))
            del ballast[-20:]
            return inner(self, micros)
        finally:
            ballast.clear()
            resource.setrlimit(resource.RLIMIT_AS, unlimited)

    loop.Loop.one_step = one_step  # type: ignore[method-assign]
    whole_stage(home, request)


# --- tests ---

SHORT = SFTConfig(batch_size=64, epochs=6, checkpoint_steps=2, tokens_per_micro_batch=100_000)


@pytest.fixture(scope="module")
def published(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, ready: Path) -> str:
    """The digest of the model when nothing goes wrong."""
    folder = tmp_path_factory.mktemp("whole")
    request = ask(folder, "sft", SHORT, inputs)
    assert run(whole_stage, homes.furnish(folder / "home", ready), request) == 0
    return result_of(request).outputs["model"].sha256


@pytest.fixture
def small_disk(ready_home: Path) -> Iterator[Path]:
    """`work` in the home is a disk of 64 MB."""
    place = ready_home / "work"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.slow
def test_disk_full(inputs: dict[str, Path], published: str, home: Path, small_disk: Path, tmp_path: Path) -> None:
    request = ask(tmp_path / "ask", "sft", SHORT, inputs)
    assert run(disk_fills_up, home, request) == EXIT_CODES["failed"]
    error = result_of(request).error
    assert error is not None and error.kind == "disk" and error.value == str(home) and "make room" in str(error)
    assert [path.name for path in (work_of(home, request) / "checkpoints").iterdir()] == ["step-2"]
    (small_disk / "ballast").unlink()
    assert run(whole_stage, home, request) == 0
    assert result_of(request).outputs["model"].sha256 == published


@pytest.mark.slow
def test_a_disk_that_cannot_be_written(
    inputs: dict[str, Path], published: str, home: Path, small_disk: Path, tmp_path: Path
) -> None:
    request = ask(tmp_path / "ask", "sft", SHORT, inputs)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert run(whole_stage, home, request) == EXIT_CODES["failed"]
    error = result_of(request).error
    assert error is not None and error.kind == "disk" and "make it writable" in str(error)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert run(whole_stage, home, request) == 0
    assert result_of(request).outputs["model"].sha256 == published


@pytest.mark.slow
def test_out_of_memory(inputs: dict[str, Path], published: str, ready_home: Path, tmp_path: Path) -> None:
    request = ask(tmp_path / "ask", "sft", SHORT, inputs)
    assert run(memory_gets_scarce, ready_home, request) == EXIT_CODES["failed"]
    error = result_of(request).error
    assert error is not None and error.kind == "memory" and error.field == "tokens_per_micro_batch"
    assert [path.name for path in (work_of(ready_home, request) / "checkpoints").iterdir()] == ["step-2"]
    assert run(whole_stage, ready_home, request) == 0
    assert result_of(request).outputs["model"].sha256 == published


@pytest.mark.slow
def test_a_learning_rate_a_thousand_times_too_large(inputs: dict[str, Path], ready_home: Path, tmp_path: Path) -> None:
    config = methods.PPO(
        iterations=8, rollout_size=16, batch_size=8, ppo_epochs=2, max_new_tokens=12, learning_rate=1.0, max_kl=20
    )
    request = ask(tmp_path / "ask", "align", config, inputs)
    assert run(whole_stage, ready_home, request) == EXIT_CODES["diverged"]
    result = result_of(request)
    assert result.error is not None and result.error.kind == "diverged" and result.run_id
    assert tracking.client().get_run(result.run_id).info.status == "FAILED"
    assert tracking.client().get_run(result.run_id).data.metrics.keys() >= {"train/kl_to_reference"}
    experiments = [experiment.experiment_id for experiment in tracking.client().search_experiments()]
    assert not tracking.client().search_logged_models(experiments)
    shutil.rmtree(work_of(ready_home, request))
