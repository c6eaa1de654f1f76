"""A stage's context kept in memory: no MLflow. The one that all tests of stages share."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from schemas import Strict
from schemas.stage import Artifact, Request
from stages.runtime.context import Answered, Recorded
from stages.tracking import digest


class MemoryContext:
    """What a stage has logged and published, by name; `params` are a config or plain values."""

    def __init__(
        self,
        work: Path,
        params: Strict | Mapping[str, JsonValue],
        inputs: Mapping[str, Path],
        stage: str = "align",
        seed: int = 0,
        **more: Any,
    ) -> None:
        self.work, self.key, self.folders = work, "key", dict(inputs)
        self.work.mkdir(parents=True, exist_ok=True)
        artifacts = {name: Artifact(uri=str(path), sha256=str(path)) for name, path in inputs.items()}
        values = params.model_dump(mode="json") if isinstance(params, Strict) else dict(params)
        self.request = Request(stage=stage, version=1, params=values, inputs=artifacts, seed=seed, **more)
        self.logged: dict[tuple[str, int | None], float] = {}
        self.tags: dict[str, object] = {}
        self.tables: dict[str, Mapping[str, list[Any]]] = {}
        self.answered: list[Answered] = []
        self.files: set[str] = set()
        self.published: dict[str, Path] = {}
        self.records: dict[str, Recorded] = {}

    def has(self, name: str) -> bool:
        return name in self.request.inputs

    def input(self, name: str) -> Path:
        return self.folders[name]

    def publish(self, name: str, folder: Path, model: bool = False) -> Artifact:
        target = self.work / f"published-{name}"
        shutil.copytree(folder, target, dirs_exist_ok=True)
        self.published[name] = target
        return Artifact(uri=str(target), sha256=digest(target))

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        self.logged |= {(name, step): value for name, value in values.items()}

    def params(self, values: Mapping[str, object]) -> None:
        pass

    def tag(self, name: str, value: object) -> None:
        self.tags[name] = value

    def file(self, path: Path, folder: str = "") -> None:
        self.files.add(path.name)

    def table(self, columns: Mapping[str, list[Any]], name: str) -> None:
        self.tables[name] = columns

    def answers(self, answers: Sequence[Answered], judge: str) -> None:
        self.answered = list(answers)

    def dataset(self, name: str, path: str, digest: str, rows: int) -> None:
        pass

    def progress(self, done: int, total: int, what: str) -> None:
        pass

    def recorded(self, what: str, curves: Sequence[str] = ()) -> Recorded | None:
        return self.records.get(what)

    def steps(self, name: str) -> list[float]:
        """A metric's values over the steps."""
        points = [(step, value) for (key, step), value in self.logged.items() if key == name and step is not None]
        return [value for _, value in sorted(points)]
