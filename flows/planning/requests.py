"""From a node of the plan to the request of its stage, with the digests of the files that it reads."""

import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from flows.planning.plan import Node
from schemas.config import PipelineConfig
from schemas.errors import StageError
from schemas.stage import STAGES, Artifact, Placement, Request, Result
from stages import tracking


def request_for(
    node: Node, config: PipelineConfig, results: Mapping[str, Result], pipeline_run: str | None = None
) -> Request:
    """The request of a node whose needs are all done.

    Raises:
        StageError: a file that the config names is missing.
    """
    inputs = {name: results[source].outputs[output] for name, (source, output) in node.inputs.items()}
    request = Request(
        stage=node.stage,
        version=STAGES[node.stage],
        params=node.params,
        inputs=inputs,
        seed=node.seed,
        name=node.label,
        pipeline_run=pipeline_run,
        experiment=config.name,
        placement=Placement(devices=node.devices, threads=threads(config)),
        tags=node.tags | data_version(node, results) | ({"sweep": config.sweep} if config.sweep else {}),
        about=node.about | training_behind(node, results),
        log_text=config.log_text,
    )
    return with_sources(request, config_field(node))


def threads(config: PipelineConfig) -> int | None:
    """Threads per stage when several run side by side."""
    return max(1, (os.cpu_count() or 1) // config.parallel) if config.parallel > 1 else None


def config_field(node: Node) -> str:
    """Where the config names the files of a node, for messages."""
    if node.stage == "validate":
        return node.name.replace(" ", ".")
    return "model" if node.name == "base" else node.name


def data_version(node: Node, results: Mapping[str, Result]) -> dict[str, str]:
    """The tag data.version: the digest of the data folder that a node reads."""
    if "data" not in node.inputs:
        return {}
    source, output = node.inputs["data"]
    return {"data.version": results[source].outputs[output].sha256[:16]}


def training_behind(node: Node, results: Mapping[str, Result]) -> dict[str, str]:
    """On an evaluation: the key and the MLflow run of the stage that made the model."""
    if node.stage != "evaluate":
        return {}
    made = results[node.inputs["model"][0]]
    return {"model.key": made.key, "train.run_id": made.run_id or ""}


def with_sources(request: Request, field: str) -> Request:
    """The request with the digests of the files that its parameters name, so that a changed file is another key.

    Raises:
        StageError: a file is missing; `field` says where the config names it.
    """
    params, inputs = dict(request.params), dict(request.inputs)
    if request.stage == "base" and isinstance(params.get("chat_template"), str):
        params["chat_template"] = template_text(str(params["chat_template"]))
    path = params.get("path")
    if request.stage in ("base", "validate") and isinstance(path, str):
        file = source_file(path, needed=request.stage == "validate")
        if file is not None:
            inputs["source"] = Artifact(uri=str(file), sha256=source_digest(file, f"{field}.path"))
    return request.model_copy(update={"params": params, "inputs": inputs})


def template_text(value: str) -> str:
    """A chat template's text: the value is Jinja, or a file of it."""
    path = Path(value).expanduser()
    is_file = "\n" not in value and "{" not in value and len(value) < 4096 and path.is_file()
    return path.read_text() if is_file else value


def source_file(path: str, needed: bool) -> Path | None:
    """The local file or folder that a path means; None for what is pinned or made otherwise (Hub, demo, inputs)."""
    if path.startswith(("demo:", "input:", "hub:")):
        return None
    if path.startswith("package:"):
        name = path.removeprefix("package:").replace("-", "_")
        spec = importlib.util.find_spec(name) if name.isidentifier() else None  # with dots it would import a package
        return next(_ggufs(list(spec.submodule_search_locations or []) if spec else []), None)
    local = Path(path).expanduser()
    return local.absolute() if needed or local.exists() else None


def _ggufs(folders: list[str]) -> Iterator[Path]:
    for folder in folders:
        yield from sorted(Path(folder).rglob("*.gguf"))


def source_digest(file: Path, field: str) -> str:
    """The file's sha256. Raises StageError naming the config's field when it is missing."""
    if not file.exists():
        fix = f"give its path as seen from {Path.cwd()}"
        raise StageError("there is no such file.", kind="file", field=field, value=str(file), fix=fix)
    return tracking.digest(file)
