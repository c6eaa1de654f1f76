"""Four ranks with shards, in one copy or in two (HSDP): gradients, checkpoints among numbers of ranks, files, memory.

Four ranks are started once, two ranks twice; the tests look at what they left.
"""

import os
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from flows.planning import memory as planning_memory
from schemas.environment import REPLICAS
from schemas.errors import StageError
from stages.engine.distributed import world
from stages.engine.models import cpu, saving, sharding
from stages.engine.training.loop import Loop
from tests.stages.align.test_sharding import make, resumed, work_off, write
from tests.support.two_ranks import on_ranks

CASES = ("sft-tied", "reward", "dpo-lora", "ppo")
SMALL_FILE = 6_000
"""Bytes: so that a model of the tests is written as several files."""
WORLDS = {"one": (1, 1), "two": (2, 1), "four": (4, 1), "copies": (4, 2)}
"""How many ranks, and copies of the weights."""


def form(name: str) -> None:
    """Go on as another number of copies of the weights."""
    os.environ[REPLICAS] = str(WORLDS[name][1])
    sharding._mesh.cache_clear()


def cut(folder: Path, name: str) -> None:
    """Three steps that leave a checkpoint, and five in one go."""
    resumed(folder, "dpo", folder / name / "cut", 3)
    weights = resumed(folder, "dpo", folder / name / "whole", 5)
    if int(os.environ.get("RANK", "0")) == 0:
        save_file(weights, folder / name / "whole.safetensors")


def go_on(folder: Path, name: str) -> None:
    """Every world's checkpoint, taken up by this one and trained on to five steps."""
    rank = int(os.environ.get("RANK", "0"))
    for other in WORLDS:
        work = folder / name / other
        if rank == 0:
            shutil.copytree(folder / other / "cut" / "checkpoints", work / "checkpoints")
        if world() > 1:
            torch.distributed.barrier()
        weights = resumed(folder, "dpo", work, 5)
        assert len(weights[f"{other}/losses"]) == 2, other
        if rank == 0:
            save_file(weights, folder / name / f"{other}.safetensors")


def cut_as_rank(rank: int, folder: Path) -> None:
    sharding.processes()
    cut(folder, "two")


def go_on_as_rank(rank: int, folder: Path) -> None:
    sharding.processes()
    go_on(folder, "two")


def work_as_rank(rank: int, folder: Path) -> None:
    """All that needs four ranks."""
    saving.LARGEST_FILE = SMALL_FILE
    sharding.processes()
    form("four")
    cut(folder, "four")
    form("copies")
    cut(folder, "copies")
    torch.distributed.barrier()
    for case in CASES:
        with most_gathered(case) as most:
            results = work_off(folder, case, folder / case)
        results["most"] = torch.tensor(most[0])
        save_file(results, folder / f"{case}-{rank}.safetensors")
    save_file({"held": torch.tensor(held(folder)), "rows": kept_twice(folder)}, folder / f"held-{rank}.safetensors")
    go_on(folder, "copies")
    form("four")
    go_on(folder, "four")
    os.environ[REPLICAS] = "3"
    sharding._mesh.cache_clear()
    with pytest.raises(StageError, match=r"replicas = 3: 4 processes .* Fix: set it to a divisor .* \(4\)"):
        sharding._mesh()


class most_gathered:  # used as a function
    """Counts the most weights that saving keeps whole at a time; adapters apart, which are gathered all at once."""

    def __init__(self, case: str) -> None:
        self.has_adapters = "lora" in case

    def __enter__(self) -> list[int]:
        self.inner, self.most, alive = saving.to_first_rank, [0], list[weakref.ref[Tensor]]()

        def gather(value: Tensor, shape: Tensor) -> Tensor:
            self.most[0] = max(self.most[0], sum(one() is not None for one in alive))
            whole = self.inner(value, shape)
            alive.append(weakref.ref(whole)) if whole is not shape else None
            return whole

        def gather_among_all(value: Tensor, shape: Tensor) -> Tensor:
            self.most[0] += 0 if self.has_adapters else 2
            return self.inner(value, shape)

        saving.to_first_rank, sharding.to_first_rank = gather, gather_among_all
        return self.most

    def __exit__(self, *error: object) -> None:
        saving.to_first_rank = sharding.to_first_rank = self.inner


def held(folder: Path) -> int:
    """Bytes of weights, gradients and Adam's moments that this rank has after a step of full training."""
    method, run = make(folder, "dpo", folder / f"held-{os.environ['RANK']}")
    loop = Loop(method, run)
    loop.one_step(next(method.batches(0)))
    loop.backward(next(method.batches(1)))
    assert type(loop.raw.plain.get_output_embeddings()) is cpu.Linear, "its head goes the fast way"
    tensors = [p for p in loop.raw.parameters()] + [p.grad for p in loop.raw.parameters()]
    tensors += [value for state in loop.adamw.state.values() for value in state.values() if value.ndim]
    return sum(t.to_local().nbytes if isinstance(t, DTensor) else t.nbytes for t in tensors if t is not None)


def kept_twice(folder: Path) -> Tensor:
    """Rows of all parts of a checkpoint of two copies, and of its model: equal where none is saved twice."""
    state = folder / "copies" / "cut" / "checkpoints" / "step-3"
    parts = [load_file(state / f"shard-{number}.safetensors") for number in range(4)]
    saved = [sum(v.numel() for name, v in part.items() if name.startswith("/model/")) for part in parts]
    return torch.tensor([*saved, sum(p.numel() for p in make(folder, "dpo", folder / "x")[0].model.parameters())])


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what one, two and four ranks have done."""
    folder = tmp_path_factory.mktemp("worlds")
    write(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNFLOW_HOME", str(folder / "home"))
        cut(folder, "one")
        on_ranks(2, cut_as_rank, folder)
        on_ranks(4, work_as_rank, folder)
        on_ranks(2, go_on_as_rank, folder)
        go_on(folder, "one")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_copies_of_shares_train_and_publish_like_one_process(
    worlds: Path, tmp_path: Path, home: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "LARGEST_FILE", SMALL_FILE)
    alone = work_off(worlds, case, tmp_path)
    for rank in range(4):
        results = load_file(worlds / f"{case}-{rank}.safetensors")
        gradients = [torch.cat([r[n].flatten() for n in sorted(alone) if "gradient/" in n]) for r in (results, alone)]
        assert (gradients[0] - gradients[1]).norm() < 3e-6 * gradients[1].norm()
        assert results["held"] == pytest.approx(int(alone["held"]) / 2, rel=0.05)
        for name in alone.keys() - {"micros", "held"}:
            if "gradient/" not in name:
                torch.testing.assert_close(results[name], alone[name], rtol=1e-4, atol=1e-5)
        assert int(results["most"]) <= 1, "weights that are whole while the next one is gathered"
    files = [
        {p.relative_to(f): p.read_bytes() for p in sorted(f.rglob("*")) if p.is_file()}
        for f in (tmp_path / "before", worlds / case / "before")
    ]
    assert sum(path.suffix == ".safetensors" for path in files[0]) > 2
    assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.parametrize("by", WORLDS)
@pytest.mark.parametrize("of", WORLDS)
def test_any_number_of_ranks_resumes_what_any_other_has_saved(worlds: Path, of: str, by: str) -> None:
    expected = load_file(worlds / by / "whole.safetensors")
    results = load_file(worlds / by / f"{of}.safetensors")
    names = [name for name in expected if name.startswith("whole/weight")]
    assert len(names) > 10
    for name in names:
        difference = (results[name.replace("whole", of, 1)] - expected[name]).abs().max()
        assert difference == 0 if of == by else difference < 1e-6, name


@pytest.mark.slow
def test_copies_save_each_row_once_and_all_of_them_save(worlds: Path) -> None:
    *saved, whole = load_file(worlds / "held-0.safetensors")["rows"].tolist()
    assert min(saved) > whole / 8
    assert sum(saved) == whole


@pytest.mark.slow
def test_the_estimate_of_a_sharded_training_is_what_its_ranks_hold(worlds: Path) -> None:
    sizes = planning_memory.folder_sizes(worlds / "model")
    for rank in range(4):
        held: Any = load_file(worlds / f"held-{rank}.safetensors")["held"]
        assert int(held) == pytest.approx(16 * sizes.parameters / 2, rel=0.15)
