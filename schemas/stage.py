"""What a stage is asked and what it answers: names and versions, Request, Result, and the key of reuse."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict, Field, JsonValue

from schemas import Strict
from schemas.errors import Problem, Status


@dataclass(frozen=True)
class StageSpec:
    """What the rest of the code must know of a stage without importing it."""

    version: int
    """To be raised when its results change for equal requests."""
    makes: Literal["model", "data", "evaluation"] | None = None
    """What others build on; the runs of models and evaluations carry the tag `model`."""
    needs_device: bool = False
    """Whether it holds a GPU while it runs."""
    shows_text: bool = False
    """Whether it writes prompts or answers where people look at them, unless `log_text` is false."""


STAGES = {
    "base": StageSpec(3, makes="model"),
    "validate": StageSpec(7, makes="data", shows_text=True),
    "sft": StageSpec(2, makes="model", needs_device=True),
    "generate": StageSpec(1, makes="data", needs_device=True, shows_text=True),
    "reward": StageSpec(3, makes="model", needs_device=True),
    "budget": StageSpec(1),
    "align": StageSpec(2, makes="model", needs_device=True),
    "evaluate": StageSpec(2, makes="evaluation", needs_device=True, shows_text=True),
    "baselines": StageSpec(1, needs_device=True, shows_text=True),
    "compare": StageSpec(5, shows_text=True),
    "promote": StageSpec(2),
}
"""Every stage: a file or folder of that name in `stages/`."""

ENGINE_VERSION = 5
"""To be raised when training changes for equal requests."""

# Parameters that change no result: how often to save and to log, and when to give up.
NEUTRAL = {"checkpoint_minutes", "checkpoint_steps", "log_every", "max_kl", "max_kl_iterations", "few_prompts"}
NEUTRAL |= {"measure_every", "traces", "offload_activations"}  # curves, MLflow's pages, where memory is taken


BASELINES = "baselines"
"""The input of `compare` that holds the SFT model's baselines; all others but PEOPLE are models."""
PEOPLE = "people"
"""The input of `compare` that holds what people said of two models: results of `alignflow ab`."""
SOURCE = "source"
"""The input that is the file or folder which `path` in a request's parameters names."""


def source_input(name: str) -> str:
    """The input that is the file of one of several sources."""
    return f"{SOURCE}.{name}"


class Artifact(Strict):
    """A folder that a stage has published: its address, and the digest of its content."""

    uri: str
    sha256: str


class Placement(Strict):
    """Where a stage runs. It changes no result, so it is not part of the key."""

    devices: int = Field(default=1, ge=1)
    """On each node."""
    nodes: int = Field(default=1, ge=1)
    replicas: int = Field(default=1, ge=1)
    """Copies of sharded weights: each is shared out over all processes / `replicas`."""
    threads: int | None = Field(default=None, ge=1)
    minutes: float | None = Field(default=None, gt=0)
    """`stage_minutes` of the config; None: however long it takes."""

    @property
    def ranks(self) -> int:
        """How many processes work on it together."""
        return self.nodes * self.devices


class Request(Strict):
    """All that a stage needs. `params` is the dump of the stage's config model, flat at its first level."""

    stage: str
    version: int
    params: dict[str, JsonValue]
    inputs: dict[str, Artifact] = {}
    seed: int = 0
    name: str | None = None
    """The model's name in the pipeline (sft, dpo, ...); a label for MLflow, not part of the key."""
    pipeline_run: str | None = None
    experiment: str | None = None
    """MLflow experiment; default ALIGNFLOW_EXPERIMENT, else `alignflow`."""
    placement: Placement = Placement()
    tags: dict[str, str] = {}
    """More MLflow tags, such as data.version; not part of the key."""
    about: dict[str, str] = {}
    """More MLflow parameters: on an evaluation, those of the training behind the model. Not part of the key."""
    log_text: bool = True
    """False keeps prompts and answers out of logs, tables, reports and errors. Part of the key where it changes what a
    stage publishes."""

    @property
    def spec(self) -> StageSpec:
        """What is known of its stage: nothing where another version of the code has asked for one of its own."""
        return STAGES.get(self.stage, StageSpec(0))

    @property
    def label(self) -> str:
        """Short name for people: `sft`, `dpo`, `eval dpo`."""
        if self.stage == "evaluate":
            part = self.params.get("part", "eval")
            return f"{part} {self.name}" if self.name else str(part)
        return self.name or self.stage

    def key(self) -> str:
        """sha256 over what decides the result: never paths, pools, threads or run ids.

        A path in `params` gives way to the input `source`, the digest of the file or folder; those of several `sources`
        to an input each.
        """
        neutral = NEUTRAL | ({"path"} if SOURCE in self.inputs else set())
        params = dict(self.params)
        if isinstance(sources := params.get("sources"), list):
            params["sources"] = [
                {name: value for name, value in source.items() if name != "path"}
                if isinstance(source, dict) and self.brings(source)
                else source
                for source in sources
            ]
        decides = {
            "stage": self.stage,
            "version": self.version,
            "engine": ENGINE_VERSION,
            "params": {k: v for k, v in params.items() if k not in neutral},
            "inputs": {name: artifact.sha256 for name, artifact in self.inputs.items()},
            "seed": self.seed,
        }
        if not self.log_text and self.spec.shows_text:
            decides["log_text"] = False
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def brings(self, source: Mapping[str, JsonValue]) -> bool:
        """Whether the file of one of several `sources` is an input, which is then read in its path's place."""
        name = source.get("name")
        return isinstance(name, str) and source_input(name) in self.inputs


class Result(Strict):
    """What a stage answers; written as `result.json` beside the request."""

    # A measurement may be NaN, which is written as NaN, where pydantic's null could not be read back.
    model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="constants")

    status: Status
    key: str
    run_id: str | None = None
    outputs: dict[str, Artifact] = {}
    metrics: dict[str, float] = {}
    error: Problem | None = None
    reused: bool = False
