"""From a node of the plan to the request of its stage, with the digests of the files that it reads."""

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import JsonValue

from flows.planning.plan import Node
from schemas.config import PipelineConfig
from schemas.errors import refuse
from schemas.source import File, Package, data_source, model_source, read_template, template_file
from schemas.stage import BASELINES, PEOPLE, SOURCE, STAGES, Artifact, Placement, Request, Result, source_input
from stages import tracking
from stages.runtime.workspace import home

COPIES = "read"
"""Folder of copies of people's verdicts, as comparisons have read them; `alignflow clean` removes those of no use."""


def request_for(
    node: Node, config: PipelineConfig, results: Mapping[str, Result], pipeline_run: str | None = None
) -> Request:
    """The request of a node whose needs are all done.

    Raises:
        StageError: a file that the config names is missing.
    """
    inputs = {name: results[source].outputs[output] for name, (source, output) in node.inputs.items()}
    tags, about = dict(node.tags), dict(node.about)
    if "data" in inputs:
        tags["data.version"] = inputs["data"].sha256[:16]
    if config.sweep:
        tags["sweep"] = config.sweep
    if node.stage == "evaluate":
        made = results[node.inputs["model"][0]]
        about |= {"model.key": made.key, "train.run_id": made.run_id or ""}
    params = dict(node.params)
    if node.stage == "compare" and "variants" in params and "reward" in results:
        params["score_std"] = results["reward"].metrics.get("data/score_std")  # PPO's kl_coef counts in units of it
    if node.stage == "compare" and "compare" not in config.pools:  # another host would not have the folder
        inputs |= people_said(inputs, params)
    side_by_side = config.parallel > 1  # then each stage gets its share of the processors
    threads = max(1, (os.cpu_count() or 1) // config.parallel) if side_by_side else None
    request = Request(
        stage=node.stage,
        version=STAGES[node.stage].version,
        params=params,
        inputs=inputs,
        seed=node.seed,
        name=node.model or node.name,
        pipeline_run=pipeline_run,
        experiment=config.name,
        placement=Placement(
            devices=node.devices,
            nodes=node.nodes,
            replicas=config.replicas if node.devices * node.nodes > 1 else 1,
            threads=threads,
            minutes=config.stage_minutes,
        ),
        tags=tags,
        about=about,
        log_text=config.log_text,
    )
    return with_sources(request, node.field)


def people_folder(inputs: Mapping[str, Artifact]) -> Path:
    """Where people's verdicts on the models of a comparison are kept: in the home, by what was compared."""
    digests = sorted(one.sha256 for name, one in inputs.items() if name not in (BASELINES, PEOPLE))
    return home() / "ab" / hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]


def people_said(inputs: Mapping[str, Artifact], params: Mapping[str, JsonValue]) -> dict[str, Artifact]:
    """The input of a comparison with the results of `alignflow ab` on its models, where there are any.

    None where the request names a judge that only compares: it would be asked again, and may cost money.
    """
    results = people_folder(inputs) / "results"
    if "judge" in params or not results.is_dir() or not any(results.iterdir()):
        return {}
    return {PEOPLE: _as_they_are(results)}


def _as_they_are(results: Path) -> Artifact:
    """A copy of the results, under its digest: people may go on while it is read. Its time is that of its last use."""
    copies = results.parent / COPIES
    copies.mkdir(exist_ok=True)
    with TemporaryDirectory(dir=copies) as beside:
        copy = Path(beside) / "results"
        shutil.copytree(results, copy)
        sha256 = tracking.digest(copy)
        kept = copies / sha256
        try:
            copy.rename(kept)
        except OSError:  # there is one, which another process may have made just now
            if not kept.is_dir():
                raise
        os.utime(kept)
    return Artifact(uri=str(kept), sha256=sha256)


def with_sources(request: Request, field: str) -> Request:
    """The request with the digests of the files that its parameters name, so that a changed file is another key.

    Raises:
        StageError: a file is missing; `field` says where the config names it.
    """
    if request.stage == "validate":
        return _with_data_files(request, field)
    params, inputs = dict(request.params), dict(request.inputs)
    template, path, file = params.get("chat_template"), params.get("path"), None
    if request.stage == "base" and isinstance(template, str):
        template_path = template_file(template)
        if template_path is not None and template_path.is_file():
            params["chat_template"] = read_template(template_path)
    if request.stage == "base" and isinstance(path, str):
        file = model_file(path)
    if file is not None:
        inputs[SOURCE] = _artifact(file, field)
    return request.model_copy(update={"params": params, "inputs": inputs})


def _with_data_files(request: Request, field: str) -> Request:
    """The same for rows: of one source, or of several."""
    inputs, sources = dict(request.inputs), request.params.get("sources")
    named = [(SOURCE, field, request.params.get("path"))]
    if isinstance(sources, list):
        every = [(place, source) for place, source in enumerate(sources) if isinstance(source, dict)]
        named = [(source_input(str(one["name"])), f"{field}.sources.{place}", one["path"]) for place, one in every]
    for name, where, path in named:
        if isinstance(source := data_source(str(path)), File):
            inputs[name] = _artifact(source.path.absolute(), where)
    return request.model_copy(update={"inputs": inputs})


def _artifact(file: Path, field: str) -> Artifact:
    if not file.exists():
        fix = f"give its path as seen from {Path.cwd()}"
        raise refuse(f"{field}.path", str(file), "there is no such file.", fix, kind="file")
    return Artifact(uri=str(file), sha256=tracking.digest(file))


def model_file(path: str) -> Path | None:
    """The local folder or file that `model.path` names; None where there is none, or it is pinned on the Hub.

    Of a package with several GGUF files none: stage `base` refuses it.
    """
    match model_source(path):
        case Package() as package:
            files = package.ggufs() or []
            return files[0] if len(files) == 1 else None
        case File(place) if place.exists():
            return place.absolute()
        case _:
            return None
