"""Golden numbers: five losses of every method. A change that moves them must come with a new version of its stage.

When this fails and the change is meant: raise the stage's number in schemas/stage.py (ENGINE_VERSION when all stages
change), so that nobody is handed an old result for a new request, and put the new numbers and versions here:

    python -m tests.test_golden
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from schemas.config import RewardConfig, SFTConfig, methods
from schemas.config.training import Training
from schemas.stage import ENGINE_VERSION, STAGES
from stages.engine.data.codec import Codec
from stages.engine.models.loading import load_scorer
from stages.engine.models.saving import save_scorer
from stages.engine.training.loop import train
from tests.support import models
from tests.support.context import MemoryContext
from tests.support.killable_training import CLASSES

COMMON: dict[str, Any] = {"batch_size": 6, "epochs": 1.5, "learning_rate": 1e-2}
ROLLOUTS: dict[str, Any] = {"iterations": 3, "rollout_size": 8, "batch_size": 4, "ppo_epochs": 1, "max_new_tokens": 6}
CONFIGS: dict[str, Training] = {
    "sft": SFTConfig(**COMMON),
    "reward": RewardConfig(**COMMON),
    "dpo": methods.DPO(**COMMON),
    "kto": methods.KTO(**COMMON),
    "ppo": methods.PPO(**ROLLOUTS, learning_rate=1e-3, value_learning_rate=1e-3),
}
STAGE = {"sft": "sft", "reward": "reward", "dpo": "align", "kto": "align", "ppo": "align"}

# Method -> versions of the engine and of its stage, and its first five losses.
GOLDEN: dict[str, tuple[tuple[int, int], list[float]]] = {
    "sft": ((5, 2), [3.8115213, 3.3622448, 2.5336509, 2.1094997, 1.9115535]),
    "reward": ((5, 3), [0.7579891, 0.5631632, 0.4320394, 0.3244331, 0.3092223]),
    "dpo": ((5, 2), [0.6931472, 0.5432536, 0.315332, 0.2508246, 0.2250675]),
    "kto": ((5, 2), [0.4444444, 0.5295679, 0.3999611, 0.354977, 0.378683]),
    "ppo": ((5, 2), [0.9458435, -0.0873469, 0.2772196, 0.3310938, 0.0769379]),
}


def inputs_for(folder: Path) -> dict[str, Path]:
    """A tiny model, a reward model of its kind, and rows of every kind."""
    model = models.model_folder(folder / "model")
    save_scorer(load_scorer(model, seed=4), Codec.load(model), folder / "reward", mean=0.1, std=0.5)
    kinds = {"sft": models.ANSWERS, "ranking": models.RANKINGS, "preference": models.PAIRS, "feedback": models.THUMBS}
    data = {kind: models.rows(20, *columns) for kind, columns in kinds.items()} | {"prompt": models.rows(20, {})}
    return {"model": model, "reward": folder / "reward", "data": models.data_folder(folder / "data", **data)}


def losses(name: str, folder: Path) -> list[float]:
    """The method's first five losses on a tiny model."""
    config, inputs = CONFIGS[name], inputs_for(folder)
    run = MemoryContext(folder / "work", config, inputs)
    method = CLASSES[type(config)](config, run)
    method.total_steps = 5
    train(method, run)
    return run.steps("train/loss")


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_are_those_of_this_version(name: str, tmp_path: Path, home: Path) -> None:
    versions, expected = GOLDEN[name]
    assert versions == (ENGINE_VERSION, STAGES[STAGE[name]].version), "a new version: record its numbers (see above)"
    assert losses(name, tmp_path) == pytest.approx(expected, rel=1e-4, abs=1e-6)


if __name__ == "__main__":
    for method in CONFIGS:
        with TemporaryDirectory() as place:
            numbers = [round(loss, 7) for loss in losses(method, Path(place))]
        print(f'    "{method}": (({ENGINE_VERSION}, {STAGES[STAGE[method]].version}), {numbers}),')
