"""Declared roots: what a deployed run may read. A run from the command line takes any path that its user names.

Whoever may start a deployment names paths on the worker's disk. Every one of them, with all that it leads to through
links, has to stay inside the folders of ALIGNFLOW_ROOTS. They are looked at when the run begins: who may write into a
root can put other files there afterwards.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse, urlsplit

from flows.planning.config_file import refusal
from schemas import environment
from schemas.config import EndpointJudge, ModelConfig, PipelineConfig, RewardJudge
from schemas.config.data import sources_of
from schemas.errors import Problem, problem
from schemas.source import File, Hub, Package, Remote, data_source, model_source, template_file
from schemas.stage import SOURCE, Request

STORES = {"runs", "models", "mlflow-artifacts", "s3", "gs", "wasbs", "abfss"}
"""Schemes of artifacts in MLflow's stores, which name no path on a disk."""

Named = tuple[str, str, str | None]
"""A path that a config names: field, value, and the path itself; None for what must be pinned and is not."""


def check_roots(config: PipelineConfig, *, deployed: bool = False) -> None:
    """Raise StageError, kind "config", for paths outside the declared roots. Does nothing when none are declared,
    unless the run is `deployed`: then no local path may be named at all, no variable as a key for an endpoint that
    ALIGNFLOW_API_KEYS does not name, and no endpoint whose host ALIGNFLOW_JUDGE_HOSTS does not name."""
    judges = {f"{field}.judge": part.judge for field in ("evaluate", "generate") if (part := getattr(config, field))}
    endpoints = [(field, vars(judge)) for field, judge in judges.items() if isinstance(judge, EndpointJudge)]
    _check(list(paths_of_config(config)), endpoints, deployed)


def check_request_roots(request: Request, *, deployed: bool = False) -> None:
    """The same for the parameters and the inputs of a single stage."""
    judge = request.params.get("judge")
    endpoints = [("params.judge", judge)] if isinstance(judge, dict) else []
    _check(list(paths_of_request(request)), endpoints, deployed)


def check_source(source: str, *, deployed: bool = False) -> None:
    """The same for the config file that a deployed run is told to read."""
    _check([("source", source, source)], [], deployed)


def _check(paths: Sequence[Named], endpoints: Sequence[tuple[str, Mapping[str, Any]]], deployed: bool) -> None:
    roots = environment.roots()
    problems = outside_roots(paths, roots) if roots or deployed else []
    if deployed:
        for field, judge in endpoints:
            key = judge.get("api_key_env")
            if key is not None and key not in environment.api_keys():
                fix = f"name it in {environment.API_KEYS} where the worker starts"
                message = "a deployed run may send no variable that is not declared."
                problems.append(problem(f"{field}.api_key_env", str(key), message, fix))
            problems += undeclared_host(f"{field}.url", judge.get("url"))
    if problems:
        raise refusal(problems)


def undeclared_host(field: str, url: object) -> list[Problem]:
    """The problem of an endpoint whose host nobody has declared: prompts and answers would go there, and a part of
    what it answers would come back.
    """
    if url is None:
        return []
    parsed = urlsplit(str(url))
    try:
        port = parsed.port or {"http": 80, "https": 443}.get(parsed.scheme)
    except ValueError:
        port = None
    host = parsed.hostname or ""
    named = f"[{host}]" if ":" in host else host
    if port is not None and {named, f"{named}:{port}"} & set(environment.judge_hosts()):
        return []
    fix = f"name its host in {environment.JUDGE_HOSTS} where the worker starts"
    return [problem(field, str(url), "a deployed run may ask no host that is not declared.", fix)]


def outside_roots(paths: Sequence[Named], roots: Sequence[Path]) -> list[Problem]:
    """A problem per path that leads out of all roots, by itself or through a link in a folder."""
    problems = (_outside(*named, [root.resolve() for root in roots]) for named in paths)
    return [one for one in problems if one is not None]


def _outside(field: str, value: str, path: str | None, roots: Sequence[Path]) -> Problem | None:
    if path is None:
        fix = "give the name with its commit in `revision`, or a folder inside the declared roots"
        if isinstance(data_source(value), Remote):
            fix = "fetch the file, and give the copy's path inside the declared roots"
        return problem(field, value, "this is not a name that a deployed run may load.", fix)
    if not roots:
        fix = f"set {environment.ROOTS} where the worker starts to the folders that runs may read"
        return problem(
            field, value, f"a deployed run may read no local path: {environment.ROOTS} is not set there.", fix
        )
    home = environment.home().resolve()  # it may itself lie in a root
    try:
        stray = next(
            (
                place
                for place in _reached(Path(path))
                if place.is_relative_to(home) or not any(map(place.is_relative_to, roots))
            ),
            None,
        )
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, an unknown user's home, NUL
        return problem(field, value, f"the path cannot be followed: {error}.", "give a plain path")
    if stray is None:
        return None
    if stray.is_relative_to(home):
        fix = (
            "name files of your own; the home holds the servers' passwords, and models are named by models:/ or runs:/"
        )
        return problem(field, value, f"it leads to {stray}, into the home, which no deployed run may read.", fix)
    where = os.pathsep.join(map(str, roots))
    fix = f"put it into one of them, or add its folder to {environment.ROOTS} where the worker starts"
    return problem(field, value, f"it leads to {stray}, outside of the declared roots {where}.", fix)


def _reached(path: Path) -> Iterator[Path]:
    """Where a path leads, and every link inside it, all resolved. Raises RuntimeError on a loop of links."""
    place = path.expanduser().resolve()
    if place.is_symlink():
        raise RuntimeError(f"{place} is a loop of links")
    yield place
    for folder, folders, files in os.walk(place):
        for link in (Path(folder, name) for name in (*folders, *files)):
            if link.is_symlink():
                yield from _reached(link)


def paths_of_config(config: PipelineConfig) -> Iterator[Named]:
    """Every path that a config names."""
    yield from _paths_of_model("model", config.model)
    for slot in type(config.data).model_fields:
        data = getattr(config.data, slot)
        for below, source in () if data is None else sources_of(data):
            yield from _path_of_data(f"data.{slot}{below}.path", source.path, source.revision)
    if config.reward_model is not None:
        yield from _path_of_model("reward_model", config.reward_model, None)
    for field, part in (("evaluate", config.evaluate), ("generate", config.generate)):
        if part is not None and isinstance(part.judge, RewardJudge) and part.judge.model != "gold":
            yield from _path_of_model(f"{field}.judge.model", part.judge.model, None)


def paths_of_request(request: Request) -> Iterator[Named]:
    """Every path that a request names, in what stages `base` and `validate` read and in its inputs."""
    path, revision = request.params.get("path"), request.params.get("revision")
    if SOURCE in request.inputs:  # read in the path's place
        path = None
    if request.stage == "base":
        yield from _paths_of_model("params", ModelConfig.model_validate({**request.params, "path": path}))
    if request.stage == "validate" and isinstance(path, str):
        yield from _path_of_data("params.path", path, revision)
    sources = request.params.get("sources") if request.stage == "validate" else None
    for place, source in enumerate(sources if isinstance(sources, list) else ()):
        if isinstance(source, dict) and not request.brings(source):
            field = f"params.sources.{place}.path"
            yield from _path_of_data(field, str(source.get("path")), source.get("revision"))
    judge = request.params.get("judge")
    model = judge.get("model") if isinstance(judge, dict) and judge.get("judge") == "reward" else None
    if isinstance(model, str) and model != "gold":
        yield from _path_of_model("params.judge.model", model, None)
    for name, artifact in request.inputs.items():
        parsed = urlparse(artifact.uri)
        if parsed.scheme in ("", "file"):
            yield f"inputs.{name}.uri", artifact.uri, unquote(parsed.path) if parsed.scheme else artifact.uri
        elif parsed.scheme not in STORES or ".." in unquote(artifact.uri).split("/"):
            yield f"inputs.{name}.uri", artifact.uri, None


def _paths_of_model(field: str, model: ModelConfig) -> Iterator[Named]:
    if model.path is not None:
        yield from _path_of_model(f"{field}.path", model.path, model.revision)
    template = model.chat_template
    if template is not None and template_file(template) is not None:
        yield f"{field}.chat_template", template, template


def _path_of_model(field: str, path: str, revision: object) -> Iterator[Named]:
    match model_source(path):
        case Package(plain=False):
            yield field, path, None
        case File():
            yield field, path, path
        case Hub() if not revision:
            yield field, path, None


def _path_of_data(field: str, path: str, revision: object) -> Iterator[Named]:
    match data_source(path):
        case File():
            yield field, path, path
        case Remote():  # with the worker's credentials, or inside its network
            yield field, path, None
        case Hub(name) if "://" in name:  # an address that `datasets` would follow, to a disk among others
            yield field, path, None
        case Hub(name, plain=False):
            yield field, path, name
        case Hub() if not revision:
            yield field, path, None
