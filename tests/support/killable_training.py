"""Training in a child process that can be killed: what the tests of faults share."""

import hashlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from schemas.config import RewardConfig, SFTConfig, methods
from schemas.config.training import Training
from stages import __main__ as entry
from stages.align.dpo import DPO
from stages.align.kto import KTO
from stages.align.ppo import PPO
from stages.engine.distributed import rank
from stages.engine.training.checkpoint import load_file
from stages.engine.training.loop import train
from stages.reward import Reward
from stages.sft import SFT
from tests.support.context import MemoryContext

CLASSES: dict[type[Training], Any] = {
    SFTConfig: SFT,
    RewardConfig: Reward,
    methods.DPO: DPO,
    methods.KTO: KTO,
    methods.PPO: PPO,
}


@dataclass(frozen=True)
class Case:
    """A method with its settings, and the folders it reads."""

    config: Training
    inputs: dict[str, Path] = field(hash=False)

    def method(self, work: Path) -> Any:
        run = JournalRun(work, self.config, self.inputs, seed=7)
        return CLASSES[type(self.config)](self.config, run)

    def train(self, work: Path) -> None:
        """Train to the end; leaves the state that decides the future in `end.json`. For a process of its own."""
        os.environ["ALIGNFLOW_HOME"] = str(work.parent / "home")
        method = self.method(work)
        train(method, method.context)
        if rank() == 0:
            (work / "end.json").write_text(json.dumps(state_of(work), sort_keys=True))


class JournalRun(MemoryContext):
    """Keeps its metrics in a file, as a stage's journal does: they outlive the process, each (name, step) once."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.path = self.work / ("metrics.jsonl" if rank() == 0 else f"metrics-{rank()}.jsonl")
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        self.seen = {(p[0], p[1]): p[2] for p in map(json.loads, (line for line in lines if line.endswith("\n")))}

    def metrics(self, values: Any, step: int | None = None) -> None:
        super().metrics(values, step)
        with self.path.open("a") as file:
            for name, value in values.items():
                if step is not None and (name, step) in self.seen:
                    # What is done again comes out as it did the first time.
                    assert self.seen[name, step] == repr(value), (name, step, self.seen[name, step], value)
                    continue
                file.write(json.dumps([name, step, repr(value)]) + "\n")


def state_of(work: Path) -> dict[str, str]:
    """sha256 of every tensor of the last checkpoint (weights, optimizer, the method's state), of its JSON but for the
    clock, of torch's random state, and the metrics of all steps."""
    newest = max((work / "checkpoints").glob("step-*"), key=lambda p: int(p.name.split("-")[1]))
    found = {"checkpoint": newest.name, "rng": _sha256(torch.get_rng_state())}
    for path in sorted(newest.iterdir()):
        if path.suffix == ".safetensors":
            found |= {f"{path.name}/{name}": _sha256(tensor) for name, tensor in load_file(path).items()}
        elif path.suffix == ".json" and path.name not in ("manifest.json", "loop.json"):
            found[path.name] = path.read_text()
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    steps = {(name, step): value for name, step, value in lines if step is not None}
    found["metrics"] = json.dumps(sorted((name, step, value) for (name, step), value in steps.items()))
    return found


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def whole_stage(home: Path, request: Path) -> None:
    """The stage's own entry point, in this process."""
    os.environ["ALIGNFLOW_HOME"] = str(home)
    os.environ.pop("ALIGNFLOW_PARENT", None)
    sys.exit(entry.main([json.loads(request.read_text())["stage"], str(request)]))
