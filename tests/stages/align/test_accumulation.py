"""How a step is cut, laid out or shared out among ranks changes no gradient: 8 x 1, 4 x 2, 1 x 8, and two ranks."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from schemas.config import RewardConfig, SFTConfig
from schemas.config.methods import DPO, KTO
from schemas.config.training import Training
from stages import align, reward, sft
from stages.engine.training.loop import train
from tests.support import models
from tests.support.context import MemoryContext
from tests.support.two_ranks import on_two_ranks

CONFIGS: dict[str, type[Training]] = {"sft": SFTConfig, "reward": RewardConfig, "dpo": DPO, "kto": KTO}
CLASSES: dict[str, Callable[..., Any]] = {"sft": sft.SFT, "reward": reward.Reward, **align.METHODS}
# Rows of unlike lengths, answers and classes, so that a mean of means would differ from the mean.
DATA = {
    "sft": models.rows(8, *models.ANSWERS),
    "ranking": models.rows(8, *models.RANKINGS),
    "preference": models.rows(8, *models.PAIRS),
    "feedback": models.rows(8, *models.THUMBS),
}


def write(folder: Path) -> None:
    """The model and the data that all methods here start from."""
    models.model_folder(folder / "model")
    models.data_folder(folder / "data", **DATA)


def make(folder: Path, name: str, **changes: Any) -> tuple[Any, MemoryContext]:
    """A method on 8 rows, its policy moved away from the reference; a batch is all of them."""
    # A large eps keeps Adam's step in proportion to the gradient, where it would blow up the noise of small ones.
    training = CONFIGS[name](**{"batch_size": 8, "learning_rate": 0.1, "adam_eps": 1.0, **changes})
    run = MemoryContext(folder / "work" / name, training, {"model": folder / "model", "data": folder / "data"})
    method = CLASSES[name](training, run)
    models.perturb(method.model, seed=4, scale=0.2)
    return method, run


def recut(method: Any, rows_each: int) -> None:
    """Give the method micro-batches of so many rows, whatever their tokens."""
    method.size = lambda row: method.training.tokens_per_micro_batch // rows_each


@pytest.mark.parametrize("lora", [None, models.LORA])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_is_the_same_for_8x1_4x2_1x8(tmp_path: Path, home: Path, name: str, lora: Any) -> None:
    write(tmp_path)
    results = []
    for rows_each in (8, 2, 1):
        method, _ = make(tmp_path, name, lora=lora)
        recut(method, rows_each)
        assert len(next(method.batches(0))) == 8 // rows_each
        loss, metrics = models.one_step(method)
        results.append((loss, metrics, models.gradient(method.model)))
    whole, whole_metrics, whole_gradient = results[0]
    assert whole_gradient.norm() > 1e-3
    for loss, metrics, gradient in results[1:]:
        assert loss == pytest.approx(whole, rel=1e-5)
        torch.testing.assert_close(gradient, whole_gradient, rtol=1e-4, atol=1e-5)
        for metric, value in metrics.items():
            assert float(value) == pytest.approx(float(whole_metrics[metric]), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_is_the_same_in_every_layout(tmp_path: Path, home: Path, name: str) -> None:
    write(tmp_path)
    gradients = []
    for layout in ("padded", "packed", "shared"):
        method, run = make(tmp_path, name, layout=layout)
        assert run.tags["layout"] == layout
        models.one_step(method)
        gradients.append(models.gradient(method.model))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[2], gradients[0], rtol=1e-4, atol=1e-5)


CASES = [(name, lora) for name in CONFIGS for lora in (False, True)]
BASES = {"reward": "bf16", "dpo": "nf4"}
"""How the weights under adapters are held, where not in float32."""


def trained(folder: Path, name: str, lora: bool) -> dict[str, Tensor]:
    """The weights after three steps of the real loop, and each step's loss."""
    adapters = models.LORA.model_copy(update={"base": BASES.get(name)}) if lora else None
    method, run = make(folder, name, lora=adapters, epochs=3, tokens_per_micro_batch=48)
    run.work = folder / f"{name}-{lora}"
    train(method, run)
    weights = {n: p.detach().clone() for n, p in method.model.named_parameters() if p.requires_grad}
    return {**weights, "losses": torch.tensor(run.steps("train/loss"))}


def work_as_rank(rank: int, folder: Path) -> None:
    """Every case, one after the other."""
    os.environ["ALIGNFLOW_HOME"] = str(folder / "home")
    clip, shared = nn.utils.clip_grad_norm_, list[bool]()

    def clip_and_look(parameters: Iterable[nn.Parameter], *bounds: Any) -> Tensor:
        parameters = list(parameters)
        places = [p.grad.untyped_storage().data_ptr() for p in parameters if p.grad is not None]
        shared.append(len(set(places)) < len(places))
        return clip(parameters, *bounds)

    nn.utils.clip_grad_norm_ = clip_and_look
    for name, lora in CASES:
        result = trained(folder, name, lora)
        save_file(result, saved(folder, name, lora, rank))
    assert shared and all(shared), "gradients are parts of what DDP sends, and no copies of it"


def saved(folder: Path, name: str, lora: bool, rank: int) -> Path:
    return folder / f"{name}-{lora}-{rank}.safetensors"


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two ranks have trained together."""
    folder = tmp_path_factory.mktemp("two-ranks")
    write(folder)
    on_two_ranks(work_as_rank, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lora"), CASES)
def test_two_ranks_train_like_one(tmp_path: Path, home: Path, two_ranks: Path, name: str, lora: bool) -> None:
    write(tmp_path)
    alone = trained(tmp_path, name, lora)
    for rank in (0, 1):
        weights = load_file(saved(two_ranks, name, lora, rank))
        assert weights.keys() == alone.keys()
        for parameter, value in weights.items():
            torch.testing.assert_close(value, alone[parameter], rtol=1e-4, atol=1e-5)
