"""kill -9 at any moment: the run that goes on ends, bit for bit, as the one that was never killed."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from schemas.config import RewardConfig, SFTConfig, methods
from schemas.config.training import LoRA
from schemas.errors import StageError, refuse
from stages import __main__ as entry
from stages.align import ppo
from stages.engine.data.codec import Codec
from stages.engine.distributed import gather_in_order, processes
from stages.engine.models.loading import load_scorer
from stages.engine.models.saving import save_scorer
from stages.engine.training import checkpoint
from tests.support import models
from tests.support.forks import ended, killed_after, run, start
from tests.support.killable_training import Case
from tests.support.two_ranks import on_ranks, start_ranks

RUNS, DEATHS = 2, 3  # per case: runs, each of them killed up to three times
KEY = "k" * 64


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, a reward model and data of every kind."""
    folder = tmp_path_factory.mktemp("faults")
    model = models.model_folder(folder / "model")
    save_scorer(load_scorer(model, seed=4), Codec.load(model), folder / "reward", mean=0.1, std=0.5)
    data = models.data_folder(
        folder / "data",
        sft=models.rows(20, *models.ANSWERS),
        ranking=models.rows(20, *models.RANKINGS),
        preference=models.rows(20, *models.PAIRS),
        feedback=models.rows(20, *models.THUMBS),
        prompt=models.rows(20, {}),
    )
    assert run(time.sleep, 0) == 0  # starts the server of processes
    return {"model": model, "reward": folder / "reward", "data": data}


DROPOUT = LoRA(rank=2, alpha=4.0, dropout=0.2)
TWO_EPOCHS: dict[str, Any] = {"epochs": 2, "batch_size": 6, "checkpoint_steps": 2, "learning_rate": 1e-2}
ACCUMULATED: dict[str, Any] = {**TWO_EPOCHS, "tokens_per_micro_batch": 24}
ROLLOUTS: dict[str, Any] = {
    "iterations": 3,
    "rollout_size": 8,
    "batch_size": 4,
    "ppo_epochs": 2,
    "max_new_tokens": 6,
    "checkpoint_steps": 1,
    "learning_rate": 1e-3,
}
CASES = {
    "sft": SFTConfig(**TWO_EPOCHS),
    "sft, accumulation, LoRA with dropout": SFTConfig(**ACCUMULATED, lora=DROPOUT),
    "reward, accumulation": RewardConfig(**ACCUMULATED),
    "reward, LoRA with dropout": RewardConfig(**TWO_EPOCHS, lora=DROPOUT),
    "dpo, accumulation": methods.DPO(**ACCUMULATED),
    "dpo, LoRA with dropout": methods.DPO(**TWO_EPOCHS, lora=DROPOUT),
    "kto, accumulation": methods.KTO(**ACCUMULATED),
    "kto, LoRA with dropout": methods.KTO(**TWO_EPOCHS, lora=DROPOUT),
    "ppo, adaptive KL": methods.PPO(**ROLLOUTS, kl_target=0.01, kl_horizon=20),
    "ppo, accumulation, LoRA with dropout": methods.PPO(**ROLLOUTS, tokens_per_micro_batch=24, lora=DROPOUT),
    "ppo, shared trunk, adaptive KL": methods.PPO(**ROLLOUTS, value_trunk="shared", kl_target=0.01, kl_horizon=20),
}


def end_of(work: Path) -> dict[str, str]:
    return json.loads((work / "end.json").read_text())


def steps_in(work: Path) -> int:
    """Steps that a run has logged."""
    path = work / "metrics.jsonl"
    return path.read_text().count('"train/loss"') if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_killed_at_random_and_started_again(
    name: str, inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(CASES[name], inputs)
    assert run(case.train, tmp_path / "whole") == 0
    draw, died = random.Random(f"{name}"), []
    for kill in range(RUNS):
        work = tmp_path / f"killed-{kill}"
        for _ in range(DEATHS):
            further = steps_in(work) + draw.randint(1, 2)
            process = start(case.train, work)
            while process.is_alive() and steps_in(work) < further:
                time.sleep(0.001)
            process.join(draw.uniform(0, 0.02))  # somewhere within a step, or a checkpoint
            process.kill()
            died += [kill] * (ended(process) == -signal.SIGKILL)
        if not (work / "end.json").exists():
            assert run(case.train, work) == 0
        assert end_of(work) == end_of(tmp_path / "whole")
    assert died, "no child was killed"
    with capsys.disabled():
        print(f"\n{name}: {len(died)} deaths, {RUNS} runs ended as the whole one", end=" ")


def train_as_rank(rank: int, case: Case, work: Path) -> None:
    case.train(work)


@pytest.mark.slow
def test_a_rank_that_shares_weights_is_killed_and_all_are_started_again(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    case = Case(methods.DPO(**TWO_EPOCHS, sharding="full"), inputs)
    on_ranks(2, train_as_rank, case, tmp_path / "whole")
    draw, work, died = random.Random(3), tmp_path / "killed", 0
    for victim in (1, 0, 1):
        further = steps_in(work) + draw.randint(1, 2)
        ranks = start_ranks(2, train_as_rank, case, work)
        while ranks[0].is_alive() and steps_in(work) < further:
            time.sleep(0.001)
        ranks[0].join(draw.uniform(0, 0.02))
        ranks[victim].kill()
        killed = ended(ranks[victim]) == -signal.SIGKILL
        died += killed
        ranks[1 - victim].terminate()  # as torchrun does
        if killed:
            assert ended(ranks[1 - victim]) != 0, "it cannot end well alone"
    assert died >= 2
    if not (work / "end.json").exists():
        on_ranks(2, train_as_rank, case, work)
    assert end_of(work) == end_of(tmp_path / "whole")


def wait_for_a_dead_rank(rank: int) -> None:
    """The second rank dies as by the kernel; the first one ends with 0 where its error is read as that."""
    processes()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        gather_in_order({rank: rank})
    except RuntimeError as error:
        meant = entry.meant(error)
        os._exit(0 if isinstance(meant, StageError) and meant.problem.kind == "killed" else 3)
    os._exit(4)


def test_what_only_reads_like_a_dead_rank_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that closes its connection, a refusal that quotes it; and what gloo says may quote a row to nobody."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = "[Errno 104] Connection reset by peer"
    for error in (ConnectionResetError(words), refuse("judge.url", "x", f"{words}.", "start it", kind="judge")):
        assert entry.meant(error) is error
    dead = RuntimeError("row 'secret words': Connection closed by peer")
    told = entry.stopped(dead, "k", None, log_text=False)
    assert told.error is not None and told.error.kind == "killed"
    assert told.error.message == "another rank of the stage has died."
    once = entry.stopped(entry.meant(dead), "k", None)  # type: ignore[arg-type]
    assert once.error is not None and once.error.message.count("another rank") == 1 and "secret" in once.error.message


def test_the_other_ranks_of_one_that_was_killed_say_so() -> None:
    """Else their error would pass for the stage's own, which is not started again."""
    first, second = start_ranks(2, wait_for_a_dead_rank)
    assert [ended(first), ended(second)] == [0, -signal.SIGKILL]


def die_in_the_second(where: str, case: Case, work: Path) -> None:
    """Train, and die when PPO has called a function twice: within the second rollout."""
    inner, calls = getattr(ppo, where), []

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        found = inner(*args, **kwargs)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(ppo, where, dying)
    case.train(work)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo, adaptive KL", "ppo, accumulation, LoRA with dropout"])
@pytest.mark.parametrize("where", ["sample", "gae"])
def test_killed_within_a_rollout(name: str, where: str, inputs: dict[str, Path], tmp_path: Path) -> None:
    """While answers are sampled, and after they were scored, before anything of them is saved."""
    case = Case(CASES[name], inputs)
    assert run(case.train, tmp_path / "whole") == 0
    assert run(die_in_the_second, where, case, tmp_path / "killed") == -signal.SIGKILL
    assert run(case.train, tmp_path / "killed") == 0
    assert end_of(tmp_path / "killed") == end_of(tmp_path / "whole")


def write(folder: Path, step: int) -> None:
    """A checkpoint of 48 MB, its tensors full of the step's number."""
    draft = folder / f".draft-{step}"
    draft.mkdir(parents=True)
    parts = {f"part {i}": torch.full((1_000_000,), float(step)) for i in range(12)}
    checkpoint.write(draft, "model", checkpoint.snapshot(parts))
    checkpoint.write(draft, "loop", checkpoint.snapshot({"step": step}))
    checkpoint.seal(draft, folder / f"step-{step}", key=KEY, step=step)


@pytest.mark.slow
def test_killed_at_every_moment_of_a_write(tmp_path: Path) -> None:
    """30 deaths, spread over the time that a checkpoint of 48 MB takes and some more; at least 300 ms."""
    folder = tmp_path / "checkpoints"
    began = time.monotonic()
    write(folder, 1)
    longest = max(0.3, 1.2 * (time.monotonic() - began))
    finished = 0
    for death in range(30):
        finished += killed_after(longest * death / 29, write, folder, 2) == 0
        found = checkpoint.newest(folder, KEY)
        assert found is not None
        step = checkpoint.read_state(found, "loop")["step"]
        assert found.name == f"step-{step}"
        state = checkpoint.read_state(found, "model")
        assert len(state) == 12 and all((part == step).all() for part in state.values())
        for leftover in (*folder.glob(".draft-*"), *folder.glob("step-2"), *folder.glob("bad")):
            shutil.rmtree(leftover)
    assert finished < 30, "no write was cut short"


FILES = [f"{name}.{kind}" for name in ("model", "loop", "rank-0") for kind in ("safetensors", "json")]


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip_one_bit(content: bytes) -> bytes:
    if not content:
        return b"\x01"
    draw = random.Random(len(content))
    at = draw.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda content: None,
    "empty": lambda content: b"",
    "cut": cut,
    "one bit": flip_one_bit,
}


@pytest.fixture(scope="module")
def stopped(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    """DPO with LoRA, ended after 6 steps with checkpoints at 4 and 6; and the folder of its work."""
    work = tmp_path_factory.mktemp("stopped") / "work"
    case = Case(methods.DPO(**TWO_EPOCHS, lora=DROPOUT), inputs)
    assert run(case.train, work) == 0
    return case, work


@pytest.mark.slow
@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("file", [*FILES, checkpoint.MANIFEST])
def test_a_damaged_checkpoint_is_never_trained_on(
    file: str, how: str, stopped: tuple[Case, Path], tmp_path: Path
) -> None:
    case, before = stopped
    work = tmp_path / "work"
    shutil.copytree(before, work)
    (work / "end.json").unlink()
    newest = max((work / "checkpoints").glob("step-*"), key=lambda p: int(p.name.split("-")[1]))
    content = (newest / file).read_bytes()
    damaged = DAMAGES[how](content)
    assert damaged != content
    if damaged is None:
        (newest / file).unlink()
    else:
        (newest / file).write_bytes(damaged)
    assert run(case.train, work) == 0
    assert (work / "checkpoints" / "bad" / newest.name).is_dir()
    assert end_of(work) == end_of(before)
