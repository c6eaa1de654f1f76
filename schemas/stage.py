"""What a stage is asked and what it answers: names and versions, Request, Result, and the key of reuse."""

import hashlib
import json

from pydantic import ConfigDict, Field, JsonValue

from schemas.errors import Problem, Status
from schemas.strict import Strict

# Raise a stage's version when its results change for equal requests; raise ENGINE_VERSION when training does.
STAGES: dict[str, int] = {
    "base": 1,
    "validate": 2,
    "sft": 1,
    "generate": 1,
    "reward": 1,
    "budget": 1,
    "align": 1,
    "evaluate": 1,
    "compare": 2,
    "promote": 1,
}
ENGINE_VERSION = 3

# Stages that write prompts or answers where people look at them, unless `log_text` is false.
SHOW_TEXT = {"validate", "generate", "evaluate", "compare"}

# Parameters that change no result: how often to save and to log, and when to give up.
NEUTRAL = {"checkpoint_minutes", "checkpoint_steps", "log_every", "max_kl", "max_kl_iterations"}


class Artifact(Strict):
    """A folder that a stage has published: where it lies, and the digest of its content."""

    uri: str
    sha256: str


class Placement(Strict):
    """Where a stage runs. It changes no result, so it is no part of the key."""

    devices: int = Field(default=1, ge=1)
    threads: int | None = Field(default=None, ge=1)


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

    def key(self) -> str:
        """sha256 over what decides the result: never paths, pools, threads or run ids.

        A path in `params` gives way to the input `source`, the digest of what lies there.
        """
        neutral = NEUTRAL | ({"path"} if "source" in self.inputs else set())
        decides = {
            "stage": self.stage,
            "version": self.version,
            "engine": ENGINE_VERSION,
            "params": {k: v for k, v in self.params.items() if k not in neutral},
            "inputs": {name: artifact.sha256 for name, artifact in self.inputs.items()},
            "seed": self.seed,
        }
        if not self.log_text and self.stage in SHOW_TEXT:
            decides["log_text"] = False
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


class Result(Strict):
    """What a stage answers; written as `result.json` beside the request."""

    # What was measured is no setting: NaN is written as NaN, where pydantic's null could not be read back.
    model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="constants")

    status: Status
    key: str
    run_id: str | None = None
    outputs: dict[str, Artifact] = {}
    metrics: dict[str, float] = {}
    error: Problem | None = None
    reused: bool = False
