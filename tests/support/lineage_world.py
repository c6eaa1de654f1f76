"""Runs as real stages log them to MLflow, with made contents, whose lineage is known."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.results import registry
from schemas.stage import Artifact, Request
from stages import tracking
from stages.tracking import StageRun


class World:
    """pairs.jsonl -> data -> sft -> dpo, kto; other.jsonl -> lone; questions.jsonl is for evaluation.

    dpo is champion in the place of kto.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = {name: self.file(f"{name}.jsonl") for name in ("pairs", "other", "questions")}
        base = self.run("base", "base", {}, "model")
        self.questions = self.run("validate", "data evaluation", {"source": self.files["questions"]}, "data")
        kept_out = {"model": base, "evaluation": self.questions}
        self.data = self.run("validate", "data preference", {"source": self.files["pairs"], **kept_out}, "data")
        self.sft = self.run("sft", "sft", {"model": base, "data": self.data}, "model")
        self.dpo = self.run("align", "dpo", {"model": self.sft, "data": self.data}, "model")
        self.kto = self.run("align", "kto", {"model": self.sft, "data": self.data}, "model")
        other = self.run("validate", "data other", {"source": self.files["other"], "model": base}, "data")
        self.lone = self.run("align", "lone", {"model": base, "data": other}, "model")
        evaluated = {"model": self.dpo, "reference": self.sft, "data": self.questions}
        self.evaluation = self.run("evaluate", "dpo", evaluated, "evaluation")
        for number, (model, former) in enumerate(((self.kto, None), (self.dpo, "1")), 1):
            tags = {"decision": "promoted"}
            settled = registry.register_and_promote("assistant", model, None, tags, promote=True, expected=former)
            assert settled.number == str(number)

    def file(self, name: str) -> Artifact:
        path = self.folder / name
        path.write_text(f"rows of {name}")
        return Artifact(uri=str(path), sha256=tracking.digest(path))

    def run(self, stage: str, name: str, inputs: Mapping[str, Artifact], output: str) -> Artifact:
        """A stage's run, as tracking logs it; its content is its name."""
        params: dict[str, Any] = {"method": "dpo"} if stage == "align" else {}
        if "source" in inputs:
            params["path"] = inputs["source"].uri
        request = Request(
            stage=stage, version=1, params=params, inputs=dict(inputs), name=name, pipeline_run="p1", experiment="tests"
        )
        made = self.folder / f"{stage} {name}"
        made.mkdir()
        (made / "content").write_text(made.name)
        with StageRun(request) as run:
            artifact = run.publish(output, made, model=output == "model")
            run.finish({})
        return artifact
