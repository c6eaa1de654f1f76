"""`alignflow run --dry-run`: which stages would be reused, optimizer steps, and memory. Starts nothing."""

import gzip
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flows.planning import memory as planning_memory
from flows.planning.plan import Node, Plan
from flows.planning.requests import request_for
from flows.servers import checks
from schemas.config import PipelineConfig
from schemas.config.data import DERIVES, MixtureParams, ValidateParams
from schemas.config.methods import CONFIGS, MethodConfig
from schemas.config.training import Training
from schemas.stage import Result
from stages import tracking

_MOST_COUNTED = 16 << 30  # bytes, unpacked

DEVICE = 80 * 10**9
"""Bytes of a common GPU."""
STATES = {"reused": "reused", "run": "run", "unknown": "run *"}


@dataclass(frozen=True)
class Outlook:
    """What a run would do with a node. `unknown`: its inputs will be rebuilt, so its key is not known yet."""

    node: Node
    state: Literal["reused", "run", "unknown"]
    result: Result | None = None


def as_json(plan: Plan) -> dict[str, Any]:
    """What a run would do, stage by stage: `reused`, `run`, or `unknown` until its inputs exist; memory in bytes."""
    outlooks, memory = checked(plan), planning_memory.memory(plan.config) or {}
    return {name: {"would": one.state, "bytes": memory.get(alike(name))} for name, one in outlooks.items()}


def checked(plan: Plan) -> dict[str, Outlook]:
    """The outlook of each node, once it is sure that MLflow can be asked. Raises StageError."""
    checks.check_tracking()
    checks.check_experiment(plan.config.name, placed=bool(plan.config.pools))
    return dry_run(plan)


def outlook(plan: Plan) -> str:
    """What a run would do as text, one line per stage."""
    config = plan.config
    outlooks = checked(plan)
    memory = planning_memory.memory(config)
    lines = [f"{'stage':20} {'would':8} {'steps':>7}  memory"]
    lines += [line(one, config, outlooks, memory or {}) for one in outlooks.values()]
    states = [one.state for one in outlooks.values()]
    reused = states.count("reused")
    lines.append(f"\n{len(states)} stages: {reused} reused, {len(states) - reused} to run.")
    if "unknown" in states:
        lines.append("* reused if its inputs turn out unchanged.")
    if config.nodes * config.devices > 1:
        where = f"{config.nodes} nodes with {config.devices} devices each" if config.nodes > 1 else "one node"
        lines.append(f"Training runs on {where}: {config.nodes * config.devices} ranks.")
    lines += few_prompts(outlooks)
    if memory is None:
        lines.append("Memory is not known before the model is on this machine.")
    else:
        lines.append("Memory: an estimate for one device, without the 1 GB or so that torch itself takes.")
        most = planning_memory.largest(config, DEVICE - planning_memory.TORCH)
        if most is not None:
            lines.append(
                f"Devices of 80 GB would fit up to about {most[0] / 1e9:.1f}B parameters; {most[1]} takes most."
            )
    return "\n".join(lines)


def few_prompts(outlooks: Mapping[str, Outlook]) -> list[str]:
    """That too few prompts will be held out to tell models apart, in a line; none where there are enough or nobody
    knows. As many as rows at most: exact where the rows are checked already.
    """
    data = next((one for one in outlooks.values() if one.node.params.get("min_eval_prompts")), None)
    if data is None:
        return []
    least = data.node.params["min_eval_prompts"]
    if data.result is not None:
        held_out, about = int(data.result.metrics.get("data/eval/prompt", 0)), ""
    else:
        guess = guessed_rows(data.node.params, "prompt", "eval")
        held_out, about = least if guess is None else guess, "at most about "
    if held_out >= least:
        return []
    then = "it will be refused" if data.node.params["few_prompts"] == "refuse" else "differences will be hard to tell"
    fix = f"raise {data.node.field}.eval_fraction, give more rows or data.evaluation"
    return [f"{about}{held_out} prompts will be held out, {least} are asked for: {then}. Fix: {fix}"]


def line(one: Outlook, config: PipelineConfig, outlooks: Mapping[str, Outlook], memory: Mapping[str, int]) -> str:
    """One stage: name, state, steps where it trains, memory where it needs a device."""
    node = one.node
    training = training_of(node, config)
    steps = "" if training is None else steps_of(node, training, outlooks[node.inputs["data"][0]])
    size = planning_memory.readable(memory[alike(node.name)]) if alike(node.name) in memory else ""
    return f"{node.name:20} {STATES[one.state]:8} {steps:>7}  {size}".rstrip()


def alike(name: str) -> str:
    """The stage that takes as much memory: a last test is an evaluation on other prompts."""
    return re.sub(r"^test ", "eval ", name)


def training_of(node: Node, config: PipelineConfig) -> Training | None:
    """The settings of a stage that trains; None for another."""
    if node.stage == "align":
        return CONFIGS[node.params["method"]].model_validate(node.params)
    return {"sft": config.sft, "reward": config.reward, "gold": config.gold}.get(node.field)


def steps_of(node: Node, training: Training, data: Outlook) -> str:
    """Optimizer steps: exact where the rows are checked already, `~` from the lines of the file, `?` without either,
    and where tokens end the training."""
    if "budget" in node.inputs:
        return "?"
    kind = {"sft": "sft", "reward": "ranking"}.get(node.stage)
    if isinstance(training, MethodConfig):
        kind = min(training.needs)
    part = node.params.get("rows", "train")
    if data.result is not None:
        count = data.result.metrics.get(f"data/{part}/{kind}")
        steps = planning_memory.steps(training, None if count is None else int(count))
        return "?" if steps is None else str(steps)
    exact = planning_memory.steps(training, None)
    if exact is not None:
        return str(exact)
    guess = planning_memory.steps(training, guessed_rows(data.node.params, str(kind), part))
    return "?" if guess is None else f"~{guess}"


def guessed_rows(params: Mapping[str, Any], kind: str, part: str) -> int | None:
    """Rows of a part of the data that a request for `validate` asks for; None where a source tells no number."""
    if "sources" not in params:
        return _guessed(ValidateParams.model_validate(params), kind, part)
    mixture = MixtureParams.model_validate(params)
    each = {source.name: _guessed(mixture.of(source), kind, part) for source in mixture.sources}
    known = {name: rows for name, rows in each.items() if rows is not None}
    if len(known) < len(each):
        return None
    return sum((mixture.drawn(known) if part == "train" else known).values())


def _guessed(data: ValidateParams, kind: str, part: str) -> int | None:
    """Rows of a part of a JSONL file, by its lines and the shares that are held out; None for what has no lines."""
    lines = count_lines(Path(data.path).expanduser())
    each = DERIVES[data.kind].get(kind)
    if lines is None or each is None:
        return None
    held_out = max(data.eval_fraction, data.others_eval_fraction) + max(data.test_fraction, data.others_test_fraction)
    train, gold = max(0.0, 1 - held_out), data.gold_fraction
    share = {"eval": data.eval_fraction, "gold": train * gold}.get(part, train * (1 - gold))
    return round(min(lines, data.limit or lines) * each * share)


def count_lines(file: Path) -> int | None:
    """Lines of a JSONL file, packed or not; None for another, a huge one, or one that cannot be read: a
    stage will say why."""
    if not file.is_file() or not file.name.endswith((".jsonl", ".jsonl.gz")):
        return None
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
            lines, read, last = 0, 0, b"\n"
            while piece := stream.read(1 << 20):  # not line by line: one may be longer than memory
                lines, read, last = lines + piece.count(b"\n"), read + len(piece), piece[-1:]
                if read > _MOST_COUNTED:
                    return None
            return lines + (last != b"\n")
    except (OSError, EOFError, zlib.error):
        return None


def dry_run(plan: Plan) -> dict[str, Outlook]:
    """For each node in order: would it be reused, or run? Starts nothing."""
    results: dict[str, Result] = {}
    outlooks = {}
    for name, node in plan.nodes.items():
        known = node.needs <= results.keys()
        result = tracking.find(request_for(node, plan.config, results).key()) if known else None
        if result is not None:
            results[name] = result
        outlooks[name] = Outlook(node, "reused" if result else "run" if known else "unknown", result)
    return outlooks
