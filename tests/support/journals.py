"""What stages have logged so far, from the journals of those that run."""

import contextlib
import json
from pathlib import Path


def losses(folder: Path, journals: str = "metrics-*.jsonl") -> list[tuple[int, float]]:
    """(step, seconds since the epoch) of every training loss, in their order of time.

    A stage that ends while this looks takes its journal along.
    """
    found: list[tuple[int, float]] = []
    with contextlib.suppress(FileNotFoundError):
        for journal in folder.glob(journals):
            lines = [line for line in journal.read_text().splitlines(keepends=True) if line.endswith("\n")]
            points = (json.loads(line) for line in lines)
            found += [(step, when / 1000) for name, _, step, when in points if name == "train/loss"]
    return sorted(found, key=lambda point: point[1])
