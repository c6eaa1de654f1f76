"""A small sharded DPO for two ranks, however these are spread over nodes, and what came out of it."""

import json
import os
from pathlib import Path
from typing import Any

from schemas.config import methods
from schemas.stage import STAGES, Artifact, Placement, Request, Result
from stages import tracking
from tests.support import models

STEPS = 100


def inputs(folder: Path) -> dict[str, Artifact]:
    """A model and pairs, as inputs of requests."""
    made = {
        "model": models.model_folder(folder / "model"),
        "data": models.data_folder(folder / "data", preference=models.rows(24, *models.PAIRS)),
    }
    return {name: Artifact(uri=str(path), sha256=tracking.digest(path)) for name, path in made.items()}


def ask(folder: Path, given: dict[str, Artifact], steps: int = STEPS, seed: int = 0, **placement: Any) -> Path:
    """The file of a request."""
    config = methods.DPO(
        epochs=None,
        max_steps=steps,
        batch_size=4,
        max_length=32,
        checkpoint_steps=10,
        sharding="full",
        learning_rate=1e-3,
    )
    request = Request(
        stage="align",
        version=STAGES["align"].version,
        params=config.model_dump(mode="json", exclude={"seed"}),
        inputs=given,
        seed=seed,
        name="dpo",
        experiment="nodes",
        placement=Placement(threads=1, **placement),
    )
    folder.mkdir(parents=True)
    (folder / "request.json").write_text(request.model_dump_json())
    return folder / "request.json"


def checkpoints(home: Path, request: Path) -> Path:
    """Where the stage of a request keeps its checkpoints."""
    key = Request.model_validate_json(request.read_text()).key()
    return home / "work" / key / "checkpoints"


def result(request: Path) -> Result:
    """What a stage has written at its end."""
    return Result.model_validate_json(request.with_name("result.json").read_text())


def newest(folder: Path) -> tuple[int, set[str]]:
    """The step of the newest checkpoint, and its files."""
    last = max(folder.glob("step-*"), key=lambda path: int(path.name[5:]))
    step = json.loads((last / "manifest.json").read_text())["step"]
    return step, {path.name for path in last.iterdir()}


def environment(home: Path, **variables: object) -> dict[str, str]:
    """The environment of a stage that nobody waits for."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PET_", "ALIGNFLOW_"))}
    own |= {"ALIGNFLOW_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return own | {name: str(value) for name, value in variables.items()}
