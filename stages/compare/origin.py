"""What made the compared models: their trainings' settings, data, curves, tokens and time, as their runs say. No torch.

It is read from the runs behind the evaluations and decides nothing: the key of a comparison has the evaluations alone.
"""

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import PurePath

from stages.runtime.context import Recorded, StageContext

CURVES = {
    "train/loss": "loss",
    "train/accuracy": "accuracy",
    "train/margin": "margin",
    "train/score": "reward",
    "train/kl_to_reference": "KL to SFT",
    "train/entropy": "entropy",
    "train/length": "length",
}
"""What is drawn of a training, and how it is called: in this order."""
HELD_OUT = {"train/loss": "eval/loss", "train/accuracy": "eval/accuracy"}
"""What a training measures at its end on held-out rows, beside the curve of the same name."""
METHODS_LOSS = {"ppo"}
"""Methods whose loss says nothing by its height: it is that of the policy of the moment."""
SETTINGS = ("beta", "kl_coef", "learning_rate", "epochs", "max_steps", "iterations", "batch_size", "lora.rank", "seed")
"""Settings that the report shows, where a training has them; the run's config.json has all."""
PACKAGES = ("torch", "transformers", "mlflow")
DIGITS = 12  # of a digest


@dataclass(frozen=True)
class Training:
    """How one model was made."""

    model: str
    run: Recorded
    data: str = ""
    """Name and digest of the rows that it was trained on."""

    @property
    def method(self) -> str:
        """The method of an aligned model, else the stage."""
        return self.run.params.get("method", self.run.stage)

    @property
    def settings(self) -> str:
        """The settings that tell one training from another."""
        given = {name: self.run.params[name] for name in SETTINGS if self.run.params.get(name, "null") != "null"}
        return ", ".join(f"{name} {value.removesuffix('.0')}" for name, value in given.items())

    @property
    def curves(self) -> list[tuple[str, Sequence[tuple[int, float]], float | None]]:
        """(what, points, the value on held-out rows) of each curve that says something."""
        drawn = []
        for metric, name in CURVES.items():
            points = self.run.curves.get(metric, ())
            if len(points) > 1 and not (name == "loss" and self.method in METHODS_LOSS):
                held_out = self.run.metrics.get(HELD_OUT.get(metric, ""))
                drawn.append((name, points, held_out if held_out is not None and math.isfinite(held_out) else None))
        return drawn


@dataclass(frozen=True)
class Origin:
    """What the models come from; empty where their runs are gone, or there never were any."""

    trainings: Sequence[Training] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    """What tells this run from another: name, id, time, versions, tokens, seconds."""


def origin(context: StageContext, models: Sequence[str], drawn: bool = True) -> Origin:
    """The trainings behind the evaluations of these models, which are inputs, and of the reward model they share.

    drawn: whether their curves are wanted: of many models they take a while to read.
    """
    curves = list(CURVES) if drawn else []
    evaluations = {name: run for name in models if (run := _maker(context, context.request.inputs[name].uri))}
    trainings: dict[str, Training] = {}
    for name, evaluation in evaluations.items():
        for made, what in (
            (name, evaluation.params.get("train.run_id")),
            ("reward", evaluation.tags.get("input.reward")),
        ):
            run = context.recorded(what, curves) if what and made not in trainings else None
            if run is not None:
                trainings[made] = Training(made, run, _data(context, run))
    first = ["base", "sft", "reward"]
    ordered = sorted(trainings.values(), key=lambda one: first.index(one.model) if one.model in first else len(first))
    return Origin(ordered, _facts(context, ordered, list(evaluations.values())))


def _maker(context: StageContext, uri: str) -> Recorded | None:
    """The run that has published what is at an address of MLflow's."""
    scheme, _, rest = uri.partition(":/")
    return context.recorded(rest.partition("/")[0]) if scheme == "runs" else None


def _data(context: StageContext, run: Recorded) -> str:
    """The rows of a training: the sources that their check has read, and the digest of what it published."""
    sha256 = run.tags.get("input.data", "")
    if not sha256:
        return ""
    check = context.recorded(sha256)
    # Of a path its last part: a report is shown to people who need not know this machine's folders.
    names = [PurePath(name).name if name.startswith("/") else name for name in check.datasets] if check else []
    read = ", ".join("generated answers" if name == "input:rows" else name for name in names)
    return f"{read or 'data'}, sha256 {sha256[:DIGITS]}"


def _facts(context: StageContext, trainings: Sequence[Training], evaluations: Sequence[Recorded]) -> dict[str, str]:
    if not evaluations:
        return {}
    every = [*(training.run for training in trainings), *evaluations]
    codes = sorted({run.tags["code.version"] for run in every if "code.version" in run.tags})
    installed = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    began = datetime.fromtimestamp(min(run.began for run in every), UTC)
    trained, generated, seconds = (
        sum(run.metrics.get(f"compute/{name}", 0.0) for run in every)
        for name in ("train_tokens", "generated_tokens", "stage_seconds")
    )
    facts = {
        "Pipeline": context.request.experiment or "",
        "Run": context.request.pipeline_run or "",
        "First stage began": f"{began:%Y-%m-%d %H:%M} UTC",
        "Code": ", ".join(codes),
        "Versions when compared": ", ".join(f"{name} {version}" for name, version in installed.items()),
        "Tokens": f"{trained:,.0f} trained on, {generated:,.0f} generated",
        "Cost": f"{clock(seconds)} of stages on their devices: these trainings and evaluations, as they ran first",
    }
    return {name: value for name, value in facts.items() if value}


def clock(seconds: float) -> str:
    """`1 h 04 min`, `3 min 20 s`, `45 s`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
