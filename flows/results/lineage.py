"""`alignflow lineage`: from a model back to the rows it was trained on, and from data to every model that saw it.

Stages' runs carry the digests of what they took and made as tags `input.NAME` and `output.NAME`; equal digests are the
edges of the graph. Reads only.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from flows.results import lookup, registry
from flows.results.registry import Version
from schemas.errors import StageError, refuse
from schemas.stage import SOURCE, STAGES
from schemas.text import one_line
from stages import tracking

log = logging.getLogger("alignflow")

MAKERS = {name for name, spec in STAGES.items() if spec.makes in ("model", "data")}
"""Stages whose outputs hold something of the data that they took."""
NOT_SEEN = {"evaluation"}
"""Inputs that leave no trace in what is made: held-out prompts, which are kept out of training data."""
SHORT = 12
FINISHED = "attributes.status = 'FINISHED' and tags.`stage.key` != ''"


@dataclass(frozen=True)
class Item:
    """One line of a tree: what it is, what is known of it, and what stands below."""

    title: str
    facts: dict[str, Any] = field(default_factory=dict)
    below: "list[Item]" = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """A finished stage's run with digests of its inputs and outputs."""

    run_id: str
    stage: str
    label: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    tags: Mapping[str, str]
    params: Mapping[str, str]


class Graph:
    """All finished stages that MLflow knows, joined by digests."""

    def __init__(self) -> None:
        self.steps = [step_of(run) for run in tracking.runs(FINISHED)]

    @cached_property
    def makers(self) -> dict[str, Step]:
        """Digest -> the step that made it; the newest, where several made the same."""
        return {sha256: step for step in reversed(self.steps) for sha256 in step.outputs.values()}

    @cached_property
    def trashed(self) -> dict[str, Step]:
        """Digest -> the step that made it, of runs that somebody has deleted in MLflow."""
        steps = [step_of(run) for run in tracking.runs(FINISHED, trashed=True)]
        return {sha256: step for step in reversed(steps) for sha256 in step.outputs.values()}

    @cached_property
    def users(self) -> dict[str, list[tuple[str, Step]]]:
        """Digest -> the steps that took it, each with the input's name; oldest first."""
        taken_by: dict[str, list[tuple[str, Step]]] = {}
        for step in reversed(self.steps):
            for name, sha256 in step.inputs.items():
                taken_by.setdefault(sha256, []).append((name, step))
        return taken_by

    @cached_property
    def versions(self) -> dict[str, list[Version]]:
        """Digest -> registered versions with this content."""
        by_digest: dict[str, list[Version]] = {}
        for one in registry.versions():
            by_digest.setdefault(one.artifact.sha256, []).append(one)
        return by_digest

    @cached_property
    def aliases(self) -> dict[tuple[str, str], list[str]]:
        """(registered model, version) -> aliases."""
        names: dict[tuple[str, str], list[str]] = {}
        for model in {one.model for versions in self.versions.values() for one in versions}:
            for alias, number in sorted(registry.aliases(model).items()):
                names.setdefault((model, number), []).append(alias)
        return names

    def registered(self, sha256: str) -> list[dict[str, Any]]:
        """The registered versions of a content, with aliases and decision."""
        return [
            {
                "model": one.model,
                "version": one.number,
                "aliases": self.aliases.get((one.model, one.number), []),
                "tags": dict(one.tags),
            }
            for one in self.versions.get(sha256, [])
        ]


def step_of(run: Any) -> Step:
    """A run's step. One that was logged before runs had these tags has it all in its files."""
    tags = dict(run.data.tags)
    inputs = {name.removeprefix("input."): value for name, value in tags.items() if name.startswith("input.")}
    outputs = {name.removeprefix("output."): value for name, value in tags.items() if name.startswith("output.")}
    if "code.version" not in tags:
        try:
            inputs = {name: one.sha256 for name, one in lookup.request_of(run.info.run_id).inputs.items()}
            outputs = {name: one.sha256 for name, one in lookup.result_of(run.info.run_id).outputs.items()}
        except StageError as error:
            log.warning("run %s cannot be followed: %s", run.info.run_id, error)
    label = run.info.run_name or tags["stage"]
    return Step(run.info.run_id, tags["stage"], label, inputs, outputs, tags, dict(run.data.params))


def lineage(what: str) -> Item:
    """The tree behind a model, or before a data set.

    Raises:
        StageError: there is neither model nor data of that name or digest.
    """
    graph = Graph()
    looks_like_a_file = "/" in what and not what.startswith(("models:/", "runs:/"))
    if looks_like_a_file and not Path(what).expanduser().exists():
        fix = "give a data file, a sha256, models:/NAME@ALIAS, or a model of the last run"
        raise refuse("WHAT", what, "there is no such file.", fix, kind="lineage")
    if Path(what).expanduser().is_file():
        return forward(graph, tracking.digest(Path(what).expanduser()), what)
    if re.fullmatch(r"[0-9a-f]{8,64}", what):
        known = {sha256 for sha256 in [*graph.makers, *graph.users] if sha256.startswith(what)}
        if len(known) != 1:
            message = f"{len(known) or 'no'} known digests begin so."
            fix = "give more of it" if known else "give a data file, or a digest that MLflow knows"
            raise refuse("WHAT", what, message, fix, kind="lineage")
        sha256 = known.pop()
        step = graph.makers.get(sha256)
        is_model = step is not None and step.stage in lookup.MODEL_STAGES
        return backward(graph, sha256, what) if is_model else forward(graph, sha256, what)
    return backward(graph, digest_of_model(what), what)


def digest_of_model(what: str) -> str:
    """The content of a registered version, or of a model of the last run."""
    name, at, alias = what.removeprefix("models:/").rpartition("@")
    number = None
    if what.startswith("models:/") and at:
        number = registry.aliases(name).get(alias)
    elif re.fullmatch(r"models:/[^/]+/\d+", what):
        name, _, number = what.removeprefix("models:/").partition("/")
        number = next((one.number for one in registry.versions(name) if one.number == number), None)
    else:
        model = lookup.model(what)
        if model.request is None:
            fix = "name a model of a pipeline run, models:/NAME@ALIAS, a data file or a digest"
            raise refuse("WHAT", what, "no run here has made it.", fix, kind="lineage")
        return tracking.digest(model.folder)
    if number is None:
        fix = "look them up with `alignflow ui`"
        raise refuse("WHAT", what, "there is no such registered model.", fix, kind="lineage")
    return registry.version(name, number).artifact.sha256


# --- back to the rows ---


def backward(graph: Graph, sha256: str, what: str) -> Item:
    """A model, the registered versions of it, and what it was made from."""
    facts = {"sha256": sha256, "registered": graph.registered(sha256)}
    return Item(what, facts, [origin(graph, "model", sha256, set())])


def origin(graph: Graph, name: str, sha256: str, seen: set[str]) -> Item:
    """An input of that name: the step that made it and what that took; a file from outside where no step did."""
    step = graph.makers.get(sha256)
    if step is None and (deleted := graph.trashed.get(sha256)):
        restore = f"mlflow runs restore --run-id {deleted.run_id}"
        return Item(f"{name}: made by {deleted.label}, whose run is in MLflow's trash ({restore})", {"sha256": sha256})
    if step is None:
        return Item(f"{name}: from outside", {"sha256": sha256})
    if step.run_id in seen:
        return Item(f"{name}: {step.label} (see above)", {"sha256": sha256, "run_id": step.run_id})
    seen.add(step.run_id)
    below = [
        source(step, inner, given) if inner.partition(".")[0] == SOURCE else origin(graph, inner, given, seen)
        for inner, given in sorted(step.inputs.items())
    ]
    return Item(f"{name}: {step.label}", {"sha256": sha256, **facts_of(step)}, below)


def source(step: Step, name: str, sha256: str) -> Item:
    """The file that a step has read, or one of several, each an input of its own: `source.chat`."""
    path = path_of(step, name)
    return Item(f"{name.replace('.', ' ', 1)}: {path or 'a file'}", {"sha256": sha256, "path": path})


def path_of(step: Step, name: str) -> str | None:
    """The path from which a step has read an input; None for what another stage has made."""
    return step.params.get("path" if name == SOURCE else f"{name}.path")


def facts_of(step: Step) -> dict[str, Any]:
    """What is worth knowing of a step."""
    return {
        "run_id": step.run_id,
        "stage": step.stage,
        "method": step.tags.get("method"),
        "pipeline_run": step.tags.get("pipeline.run"),
        "stage_key": step.tags.get("stage.key"),
        "code": step.tags.get("code.version"),
        "config": f"runs:/{step.run_id}/config.json",
        "parameters": dict(step.params),
    }


# --- forth to the models ---


def forward(graph: Graph, sha256: str, what: str) -> Item:
    """Data, and below it every stage that made something of it, down to the models."""
    maker = graph.makers.get(sha256)
    paths = sorted({path for name, step in graph.users.get(sha256, []) if (path := path_of(step, name))})
    facts = {"sha256": sha256, "made_by": maker.run_id if maker else None, "paths": paths}
    below = uses(graph, sha256, set())
    if not below:
        message = "no stage has taken this data" + ("" if maker else ", nor made it") + "."
        fix = "give a file as it was when it was used, or its sha256"
        raise refuse("WHAT", f"{what} (sha256 {sha256[:SHORT]})", message, fix, kind="lineage")
    return Item(what, facts, below)


def uses(graph: Graph, sha256: str, seen: set[str]) -> list[Item]:
    """What was made of a content."""
    items = []
    for name, step in graph.users.get(sha256, []):
        if step.stage not in MAKERS or name in NOT_SEEN:
            continue
        registered = [one for made in step.outputs.values() for one in graph.registered(made)]
        title = f"{step.label}, by its input {name}"
        facts = {"outputs": dict(step.outputs), "registered": registered, **facts_of(step)}
        if step.run_id in seen:
            items.append(Item(f"{title} (see above)", {"run_id": step.run_id, "registered": registered}))
            continue
        seen.add(step.run_id)
        below = [item for made in step.outputs.values() for item in uses(graph, made, seen)]
        items.append(Item(title, facts, below))
    return items


# --- for people and programs ---


def as_json(item: Item) -> str:
    """All that is known, nested."""
    return json.dumps(asdict(item), indent=2)


def as_text(item: Item) -> str:
    """A tree of lines with the facts that identify."""
    return "\n".join([headline(item), *branches(item.below, "")])


def branches(items: Sequence[Item], before: str) -> Iterator[str]:
    """The lines below an item."""
    for place, item in enumerate(items, 1):
        last = place == len(items)
        yield f"{before}{'└── ' if last else '├── '}{headline(item)}"
        yield from branches(item.below, before + ("    " if last else "│   "))


def headline(item: Item) -> str:
    """An item in one line."""
    facts = item.facts
    parts = [item.title]
    if facts.get("method"):
        parts.append(f"method {facts['method']}")
    if facts.get("sha256"):
        parts.append(f"sha256 {facts['sha256'][:SHORT]}")
    for name in ("run_id", "code"):
        if facts.get(name):
            parts.append(f"{name.removesuffix('_id')} {facts[name]}")
    for one in facts.get("registered", []):  # [assistant v3 @champion, promoted]
        aliases, tags = "".join(f" @{alias}" for alias in one["aliases"]), one["tags"]
        decision = tags.get("decision", "undecided") + (", rolled back" if registry.ROLLED_BACK in tags else "")
        parts.append(f"[{one['model']} v{one['version']}{aliases}, {decision}]")
    return "  ".join(map(one_line, parts))
