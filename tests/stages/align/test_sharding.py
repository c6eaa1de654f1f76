"""Weights shared out between two ranks train like whole ones: gradients, losses, weights, published files.

One start of two ranks over gloo works off all that needs two; the tests compare it with one process.
"""

import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flows.planning.nodes import params_of
from schemas.config import SFTConfig
from schemas.config.methods import PPO as PPOConfig
from schemas.config.training import Training
from stages.engine.data.codec import Codec
from stages.engine.distributed import world
from stages.engine.models import loading, sharding
from stages.engine.models.loading import load_scorer
from stages.engine.models.saving import save_policy, save_scorer
from stages.engine.training import optimizers, shards
from stages.engine.training.checkpoint import digest, snapshot
from stages.engine.training.checkpoint import write as write_part
from stages.engine.training.loop import Loop, train, train_and_publish
from tests.stages.align.test_accumulation import CLASSES, CONFIGS, DATA
from tests.support import models
from tests.support.context import MemoryContext
from tests.support.two_ranks import on_two_ranks

ADAPTED = {"lora": models.LORA}
ON_HALF = {"lora": models.LORA.model_copy(update={"base": "bf16"})}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {"layout": "packed"}),
    "sft-tied": ("sft", {}),
    "sft-lora": ("sft", ADAPTED),
    "reward": ("reward", {}),
    "reward-lora": ("reward", ADAPTED),
    "dpo": ("dpo", {"gradient_checkpointing": True}),
    "dpo-lora": ("dpo", {**ADAPTED, "layout": "padded"}),
    "kto": ("kto", {}),
    "kto-lora": ("kto", {**ON_HALF, "publish": "bf16"}),
    "ppo": ("ppo", {}),
    "ppo-lora": ("ppo", {**ADAPTED, "frozen": "bf16"}),
    "ppo-one-trunk": ("ppo", {"value_trunk": "shared"}),
}
RESUMED = CASES | {"dpo-8bit": ("dpo", {"optimizer": "adamw8bit"})}
# A large eps keeps Adam's step in proportion to the gradient, where it would blow up the noise of small ones.
TRAINING = {"batch_size": 8, "learning_rate": 0.1, "adam_eps": 1.0, "tokens_per_micro_batch": 16, "max_steps": 3}
UNEVEN = {"reward": {"tokens_per_micro_batch": 20}, "ppo": {"tokens_per_micro_batch": 36}}
"""So that the two ranks cut their rows of the first step into different numbers of micro-batches."""
ROLLOUTS = {"rollout_size": 8, "ppo_epochs": 2, "iterations": 2, "max_new_tokens": 6}


def write(folder: Path) -> None:
    """What all cases start from: models, a reward model whose adapter stands on one of them, and rows."""
    models.model_folder(folder / "model")
    models.model_folder(folder / "tied", tied=True)
    held_out = {f"eval_{name}": rows for name, rows in DATA.items()}
    models.data_folder(folder / "data", prompt=models.rows(9, {}), **DATA, **held_out)
    scorer = load_scorer(folder / "model", PPOConfig(lora=models.LORA), seed=4)
    models.perturb(scorer)
    save_scorer(scorer, Codec.load(folder / "model"), folder / "reward", 0.1, 0.5, base=str(folder / "model"))


def make(folder: Path, case: str, work: Path, **changes: Any) -> tuple[Any, MemoryContext]:
    """The method of a case, its weights moved away from the reference."""
    name, way = RESUMED[case]
    config = {
        **TRAINING,
        **UNEVEN.get(name, {}),
        "epochs": 3,
        "sharding": "full" if world() > 1 else "none",
        **way,
        **changes,
    }
    inputs = {"model": folder / ("tied" if case == "sft-tied" else "model"), "data": folder / "data"}
    if name == "ppo":
        config |= ROLLOUTS
        inputs["reward"] = folder / "reward"
    training: Training = CONFIGS.get(name, PPOConfig)(**config)
    run = MemoryContext(work, training, inputs)
    method = CLASSES[name](training, run)
    if name != "ppo":  # it has to begin at the reference
        perturb(method.model)
    return method, run


def perturb(model: nn.Module) -> None:
    """Move all trained weights, the sharded ones too, by the same numbers."""
    generator = torch.Generator().manual_seed(4)
    for parameter in [p for p in model.parameters() if p.requires_grad]:
        moved = sharding.plain(parameter.detach()) + 0.2 * torch.randn(parameter.shape, generator=generator)
        if sharding.is_sharded(model):
            sharding.put(parameter, moved)
        else:
            parameter.data.copy_(moved)


def tensors(of: Mapping[str, Tensor | None], kind: str) -> dict[str, Tensor]:
    return {f"{kind}/{name}": sharding.plain(value.detach()).clone() for name, value in of.items() if value is not None}


def work_off(folder: Path, case: str, work: Path) -> dict[str, Tensor]:
    """The gradient of the first step, the losses and weights of three; the model is written before and after."""
    method, run = make(folder, case, work)
    save = save_scorer if case.startswith("reward") else save_policy
    save(method.scorer if case.startswith("reward") else method.policy, method.codec, work / "before", base="start")
    loop = Loop(method, run)
    micros = next(method.batches(0))
    loop.reduce(loop.backward(micros))
    parameters = dict(loop.raw.named_parameters())
    every = [p for _, p in loop.raw.named_parameters(remove_duplicate=False)]  # shards share no weights between models
    held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in every)
    results = tensors({name: p.grad for name, p in parameters.items()}, "gradient")
    loop.optimizer.zero_grad()
    loop()
    results |= tensors({name: p for name, p in parameters.items() if p.requires_grad}, "weight")
    results["held"] = torch.tensor(held)
    losses, norms = run.steps("train/loss"), run.steps("train/grad_norm")
    results |= {"losses": torch.tensor(losses), "norms": torch.tensor(norms), "micros": torch.tensor(len(micros))}
    if case.startswith("ppo"):
        results["ratio"] = torch.tensor(run.steps("train/ratio_mean")[::2])  # of each rollout's first step
    final = method.finish(work / "model")
    return results | {f"final/{name}": torch.tensor(value) for name, value in final.items()}


def work_as_rank(rank: int, folder: Path) -> None:
    """All that needs two ranks."""
    os.environ["ALIGNFLOW_HOME"] = str(folder / "home")
    loading.load_whole = None  # type: ignore[assignment]  # every rank reads its rows alone
    optimizers.SMALL = 16
    for case in CASES:
        save_file(work_off(folder, case, folder / case), folder / f"{case}-{rank}.safetensors")
    save_file(resume_and_more(folder, rank), folder / f"more-{rank}.safetensors")


def resumed(folder: Path, case: str, work: Path, steps: int) -> dict[str, Tensor]:
    """The weights after so many steps, and the losses of those that were taken now."""
    method, run = make(folder, case, work, max_steps=None, epochs=steps, warmup=0, schedule="constant")
    method.total_steps = steps
    train_and_publish(method, run)
    weights = tensors({n: p for n, p in method.model.named_parameters() if p.requires_grad}, f"{work.name}/weight")
    return {**weights, f"{work.name}/losses": torch.tensor(run.steps("train/loss"))}


class Trap:
    """What runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def plant(checkpoint: Path, sprung: Path) -> None:
    """Put beside the shards, and into their manifest, the file that torch's own reader would unpickle."""
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Trap(sprung)))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][".metadata"] = digest(checkpoint / ".metadata")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def resume_and_more(folder: Path, rank: int) -> dict[str, Tensor]:
    """Checkpoints written and read by two ranks; passes out of step; gathers in bfloat16."""
    results: dict[str, Tensor] = {}
    barrier = torch.distributed.barrier
    for case in ("dpo-8bit", "ppo-lora"):
        results |= resumed(folder, case, folder / f"whole-{case}", 4)
        resumed(folder, case, folder / f"cut-{case}", 3)
        barrier()
        if rank == 0:
            shutil.copytree(folder / f"cut-{case}", folder / f"two-{case}")
            plant(folder / f"cut-{case}" / "checkpoints" / "step-3", folder / "sprung")
        barrier()
        results |= resumed(folder, case, folder / f"cut-{case}", 4)
    results |= resumed(folder, "dpo-8bit", folder / "one-dpo-8bit", 4)

    method, run = make(folder, "dpo-8bit", folder / "cut-dpo-8bit")
    if rank == 0:
        spoil(folder / "cut-dpo-8bit" / "checkpoints" / "step-4" / "shard-1.safetensors")
    barrier()
    loop = Loop(method, run)
    loop.resume()
    results["step"] = torch.tensor(loop.step)

    with pytest.raises(RuntimeError, match=r"rank 0 a forward pass, rank 1 a backward pass comes next\. Fix: "):
        if rank == 0:
            method.logps(method.micro([0]).batch)
        else:
            sharding.in_step("a backward pass")

    for case in ("dpo", "reward"):
        method, run = make(folder, case, folder / f"half-{case}", precision="bf16", gather="bf16")
        assert run.tags["layout"] == "shared"
        met: set[torch.dtype] = set()
        first = next(module for name, module in method.model.named_modules() if name.endswith("q_proj"))
        first.register_forward_pre_hook(lambda module, _, met=met: met.add(module.weight.dtype))
        train(method, run)
        assert met == {torch.bfloat16}, "what was gathered for its pass"
        assert {p.dtype for p in method.model.parameters()} == {torch.float32}
        results[f"half/{case}"] = torch.tensor(run.steps("train/loss"))
    return results


def spoil(file: Path) -> None:
    """Change a file's last byte."""
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two ranks have done together."""
    folder = tmp_path_factory.mktemp("sharded")
    write(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNFLOW_HOME", str(folder / "home"))
        patch.setattr(optimizers, "SMALL", 16)
        resumed(folder, "dpo-8bit", folder / "one-dpo-8bit", 3)  # by one process; the ranks go on from there
    on_two_ranks(work_as_rank, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_with_shards_train_like_one(tmp_path: Path, home: Path, two_ranks: Path, case: str) -> None:
    alone = work_off(two_ranks, case, tmp_path)
    shared = [load_file(two_ranks / f"{case}-{rank}.safetensors") for rank in (0, 1)]
    for results in shared:
        assert results.keys() == alone.keys()
        gradients = [torch.cat([r[n].flatten() for n in sorted(alone) if "gradient/" in n]) for r in (results, alone)]
        assert (gradients[0] - gradients[1]).norm() < 3e-6 * gradients[1].norm()
        # A head of one row, its bias or a vocabulary of an odd number of rows cannot be halved.
        assert results["held"] == pytest.approx(int(alone["held"]) / 2, rel=0.05)
        for name in alone.keys() - {"micros", "held"}:
            if "gradient/" not in name:
                torch.testing.assert_close(
                    results[name], alone[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m
                )
        if "ratio" in alone:
            assert results["ratio"].tolist() == [1.0] * len(alone["ratio"])
    files = [
        sorted(p.relative_to(f / "before") for p in (f / "before").rglob("*")) for f in (tmp_path, two_ranks / case)
    ]
    assert files[0] == files[1]
    for file in files[0]:
        if (tmp_path / "before" / file).is_file():
            assert (tmp_path / "before" / file).read_bytes() == (two_ranks / case / "before" / file).read_bytes(), file


@pytest.mark.slow
def test_ranks_had_different_numbers_of_micro_batches(two_ranks: Path) -> None:
    """Else the tests here say nothing about ranks that have to wait for each other."""
    for case in ("sft", "reward", "dpo", "kto", "ppo"):
        counts = [int(load_file(two_ranks / f"{case}-{rank}.safetensors")["micros"]) for rank in (0, 1)]
        assert counts[0] != counts[1], case


@pytest.mark.slow
def test_two_ranks_resume_to_the_bit(two_ranks: Path) -> None:
    for rank in (0, 1):
        results = load_file(two_ranks / f"more-{rank}.safetensors")
        for case in ("dpo-8bit", "ppo-lora"):
            names = [name for name in results if name.startswith(f"whole-{case}/weight")]
            assert len(names) > 10
            for name in names:
                assert torch.equal(results[name], results[name.replace("whole", "cut")]), name
            losses = results[f"whole-{case}/losses"], results[f"cut-{case}/losses"]
            assert torch.equal(losses[0][3:], losses[1]) and len(losses[1]) == 1
    assert not (two_ranks / "sprung").exists(), "a file beside the shards was unpickled"
    assert not list((two_ranks / "whole-dpo-8bit" / "checkpoints").rglob("*.pt")), "only safetensors and JSON"


@pytest.mark.slow
def test_two_ranks_and_one_resume_each_others_checkpoints(two_ranks: Path, home: Path) -> None:
    results = load_file(two_ranks / "more-0.safetensors")
    one = resumed(two_ranks, "dpo-8bit", two_ranks / "two-dpo-8bit", 4)
    assert len(one["two-dpo-8bit/losses"]) == len(results["one-dpo-8bit/losses"]) == 1
    for name in [name for name in results if name.startswith("whole-dpo-8bit/weight")]:
        torch.testing.assert_close(one[name.replace("whole", "two")], results[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(results[name.replace("whole", "one")], results[name], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_shard_that_another_rank_finds_spoilt_is_resumed_by_none(two_ranks: Path) -> None:
    assert [int(load_file(two_ranks / f"more-{rank}.safetensors")["step"]) for rank in (0, 1)] == [3, 3]
    assert (two_ranks / "cut-dpo-8bit" / "checkpoints" / "bad" / "step-4").is_dir()


@pytest.mark.slow
def test_gathers_in_bfloat16_train_about_the_same(two_ranks: Path, tmp_path: Path, home: Path) -> None:
    results = load_file(two_ranks / "more-0.safetensors")
    for case in ("dpo", "reward"):
        method, run = make(two_ranks, case, tmp_path / case, precision="bf16")
        train(method, run)
        expected = torch.tensor(run.steps("train/loss"))
        torch.testing.assert_close(results[f"half/{case}"], expected, rtol=0.03, atol=0)
        assert not torch.equal(results[f"half/{case}"], expected)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_any_number_of_ranks_reads_its_rows_from_the_parts_of_three(tmp_path: Path, ranks: int) -> None:
    whole_RD = torch.arange(10.0).view(5, 2)  # torch.chunk deals out 2, 2 and 1 of the five rows
    for number, (begin, end) in enumerate([(0, 2), (2, 4), (4, 5)]):
        state = {"model": {"w": whole_RD[begin:end]}, "rows": {"w": [begin, end, 5]}, "optimizer": {"w": {}}}
        write_part(tmp_path, f"shard-{number}", snapshot(state))
    parts = [shards.Part(tmp_path, f"shard-{number}") for number in range(3)]
    expected = [*whole_RD.chunk(ranks), *[whole_RD[:0]] * ranks][:ranks]
    begin = 0
    for rows_RD in expected:
        read_RD = shards.read_rows(parts, "w", "/model/w", (begin, begin + len(rows_RD)))
        assert torch.equal(read_RD, rows_RD)
        begin += len(rows_RD)
    assert begin == 5


def test_half_gathers_need_shards_and_half_precision() -> None:
    for changes in ({"precision": "bf16"}, {"sharding": "full"}):
        with pytest.raises(ValidationError, match="Fix: set sharding to full and precision to bf16"):
            SFTConfig.model_validate({"gather": "bf16", **changes})


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"lora": {"base": "nf4"}}, "Fix: set lora.base to bf16, or sharding to none"),
        ({"offload_activations": True}, "Fix: set gradient_checkpointing instead, or sharding to none"),
    ],
)
def test_what_shares_cannot_do_is_refused(changes: dict[str, Any], fix: str) -> None:
    SFTConfig.model_validate(changes)
    with pytest.raises(ValidationError, match=fix):
        SFTConfig.model_validate({"sharding": "full", **changes})


def test_what_is_not_sharded_keeps_its_key() -> None:
    assert {"sharding", "gather"}.isdisjoint(params_of(SFTConfig()))
    assert params_of(SFTConfig(sharding="full"))["sharding"] == "full"
