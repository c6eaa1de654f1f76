"""Retraining as a Prefect flow: train when data or config changed, and promote the candidate if the gate lets it pass.

It ends as Unchanged, Promoted, Rejected or Conflict, or fails with the problem of the first stage to stop. What was
done before is reused, so that a schedule which finds nothing new costs seconds.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from prefect import flow, get_run_logger, tags
from prefect.exceptions import Pause
from prefect.runtime import deployment, flow_run
from prefect.states import Completed, Failed, State

from flows import pipeline
from flows.execution import process
from flows.gate import approval, looks, smoke
from flows.gate.described import described
from flows.planning import config_file, requests
from flows.planning.allowed_paths import check_source
from flows.planning.plan import Plan, plan, promotion
from flows.planning.plan_checks import candidate, check_gate
from flows.results import announce, history, registry
from flows.results.registry import Version
from schemas import read_stored
from schemas.config import PipelineConfig
from schemas.errors import StageError, refuse
from schemas.promotion import Decision, PromoteConfig
from schemas.stage import SOURCE, STAGES, Artifact, Request, Result
from stages import tracking

Ending = Literal["Unchanged", "Promoted", "Rejected"]


@dataclass(frozen=True)
class Outcome:
    """How a retraining ended, and the version that it is about."""

    ending: Ending
    message: str
    version: Version | None = None
    decision: Decision | None = None
    news: bool = False
    """Whether it is the first time that this comes out, so that a person should be told."""


@dataclass(frozen=True)
class Fingerprint:
    """What a retraining would be made from: digests of all source files, and of everything else that decides."""

    data: str
    config: str

    def tags(self) -> dict[str, str]:
        """As a registered version carries them."""
        return {"data.digest": self.data, "config.digest": self.config}


def fingerprint(planned: Plan) -> Fingerprint:
    """Digests of the source files and of the settings that decide the result, the gate and the code's stage versions
    included; neither paths nor places matter.

    Raises:
        StageError: a file is missing, or it is not clear who the candidate is.
    """
    data, rest = {}, {}
    for name, node in {**planned.nodes, **promotion(planned, champion=False).nodes}.items():
        asked = Request(stage=node.stage, version=STAGES[node.stage].version, params=node.params, seed=node.seed)
        request = requests.with_sources(asked, node.field)
        if node.stage == "validate" and request.inputs:
            files = {name: file.sha256 for name, file in request.inputs.items()}
            data[name] = files.get(SOURCE, files)
            blank = dict.fromkeys(files, Artifact(uri="", sha256=""))  # the data's part; else the path would count
            request = request.model_copy(update={"inputs": blank})
        rest[name] = [request.key(), sorted(node.inputs.items())]
    return Fingerprint(_digest(data), _digest(rest))


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def run_name() -> str:
    """The flow run's name: the config's source, and what differs from it."""
    given = flow_run.parameters
    changed = [*given.get("overrides", []), *filter(None, [given.get("data")])]
    return f"retrain {history.run_name(given['source'], changed)}"


@flow(name="retrain", flow_run_name=run_name, persist_result=False, result_serializer="json")
def retrain(
    source: str,
    overrides: list[str] = [],  # noqa: B006 - Prefect's form
    force: bool = False,
    data: str | None = None,
) -> State[Any]:
    """Retrain from a preset or config file when its data or settings changed since the champion was trained.

    Prefect's form shows the following.

    Args:
        source: A preset's name, such as demo, or the path of a config file on the worker's machine.
        overrides: What to change, as after --set: align.dpo.beta=0.2
        force: Train even if nothing changed.
        data: One more change, which data that has arrived brings: data.preference.path=/data/pairs.jsonl
    """
    process.begin()
    overrides = [*overrides, *([data] if data else [])]
    with history.recorded(str(flow_run.id), f"retrain {source}", overrides) as entry:
        try:
            if deployment.id and source not in config_file.presets():
                check_source(source, deployed=True)
            with process.stages_of_flow():
                outcome = retrained(config_file.load(source, overrides), str(flow_run.id), force)
        except Pause:
            entry.note(state="waiting")
            raise
        except StageError as error:
            entry.fail(error)
            conflict = error.problem.kind == "conflict"
            if error.status != "preempted":
                announce.emit("failed", history.run_name(source, []), str(error))
            return Failed(name="Conflict" if conflict else error.status.title(), message=str(error), data=error)
        if outcome.news and outcome.version is not None:
            announce.emit(outcome.ending.lower(), outcome.version.model, outcome.message, outcome.version.number)
        entry.note(state=outcome.ending.lower(), best=[str(outcome.version)] if outcome.version else [])
    return Completed(name=outcome.ending, message=outcome.message, data=outcome)


def retrained(planned: Plan, pipeline_run: str, force: bool = False) -> Outcome:
    """Look, train, judge, decide, act.

    Raises:
        StageError: a stage stopped; the config lacks something; or another champion was made in the meantime
            (kind `conflict`).
    """
    if planned.config.promote is None:  # the gate's defaults, written out, so that its prompts are asked for
        planned = plan(planned.config.model_copy(update={"promote": PromoteConfig()}))
    config = planned.config
    pipeline.prepare(config)
    name = model_name(config)
    if (asked := approval.asked_by(name, pipeline_run)) is not None:  # it was suspended, or died while it waited
        return as_outcome(approval.answered(asked))
    made_from = fingerprint(planned)
    champion = registry.settled_champion(name)
    if champion is not None and not force and made_from.tags().items() <= champion.tags.items():
        message = f"data and config are those of the champion, {champion}; nothing to do (use --force to train anyway)."
        return Outcome("Unchanged", message, champion)
    gate = (config.promote or PromoteConfig()).gate
    known = looks.looks(name)
    # Else this may be a retraining that was killed in a look, or while it waited for a person: it takes no new one.
    if not any(look.decision == looks.OPEN for look in known) and not approval.pending(name):
        looks.check_budget(name, known, gate)  # before anything is trained in vain
    get_run_logger().info("gate: %s", gate.power(gate.prompts_min))
    results = run_all(planned, pipeline_run)
    trained = results[candidate(config)]
    champion = registry.champion(name)  # training takes long: judge against the champion of now
    return already_settled(name, trained, champion) or decide(planned, results, champion, made_from, pipeline_run)


def model_name(config: PipelineConfig) -> str:
    """The registered model's name."""
    return (config.promote or PromoteConfig()).model or config.name


def run_all(planned: Plan, pipeline_run: str, known: Mapping[str, Result] | None = None) -> dict[str, Result]:
    """Results of all nodes, and of the known ones. Raises StageError, the first one, when a stage stopped."""
    results, errors = pipeline.run_nodes(planned, pipeline_run, known)
    announce.report(planned, results, aloud=True)
    if (record := history.find(pipeline_run)) is not None:
        announce.group(planned, results, record, "FAILED" if errors else "FINISHED")
    if errors:
        raise next(iter(errors.values()))
    return results


def already_settled(name: str, trained: Result, champion: Version | None) -> Outcome | None:
    """The outcome for a candidate that needs no judging: it is the champion itself, or was rolled back."""
    digest = trained.outputs["model"].sha256
    if champion is not None and champion.artifact.sha256 == digest:
        return Outcome("Unchanged", f"training gives the champion's own weights, {champion}.", champion)
    known = registry.of_digest(name, digest)
    try:
        if known is not None:
            registry.check_not_rolled_back(known)
    except StageError as error:
        return Outcome("Rejected", str(error), known)
    return None


def decide(
    planned: Plan, trained: Mapping[str, Result], champion: Version | None, made_from: Fingerprint, pipeline_run: str
) -> Outcome:
    """Judge the candidate beside the champion, register it, and move the alias or not."""
    registered, gate = model_name(planned.config), (planned.config.promote or PromoteConfig()).gate
    key = look_key(planned, trained, champion)
    look = looks.take(registered, key, trained[candidate(planned.config)].outputs["model"].sha256, gate)
    judging = promotion(planned, champion is not None, looks.seed(registered, look))
    known = dict(trained) if champion is None else {**trained, "champion": as_result(champion)}
    results = run_all(judging, pipeline_run, known)
    name, judged = candidate(planned.config), judging.nodes["promote"].inputs["candidate"][0]
    decided = tracking.fetch(results["promote"].outputs["decision"]) / "decision.json"
    decision = read_stored(Decision, decided.read_text())
    decision = smoke.checked(
        decision,
        planned.config.promote or PromoteConfig(),
        trained[candidate(planned.config)].outputs["model"],
        trained[judging.nodes[judged].inputs["data"][0]].outputs["data"],
        planned.config.evaluate.max_new_tokens,
        results["promote"].run_id,
    )
    looks.note(registered, look, decision)
    model, run_id = results[name].outputs["model"], results[name].run_id
    tags = {
        **made_from.tags(),
        "decision": "promoted" if decision.promote else "rejected",
        "decision.reasons": "; ".join(map(str, decision.reasons or decision.checks)),
        "decision.against": "sft" if champion is None else f"version {champion.number}",
        "decision.look": str(look.number),
        "train.run_id": run_id or "",
        "eval.run_id": results[judged].run_id or "",
        "promote.run_id": results["promote"].run_id or "",
        "stage.key": results[name].key,
        "candidate": name,
        "code.version": tracking.client().get_run(run_id or "").data.tags.get("code.version", "unknown"),
        "pipeline.run": pipeline_run,
        "decided.at": registry.now(),
    }
    page = described(decision, tags["decision.against"], results, name)
    expected, promote = None if champion is None else champion.number, planned.config.promote or PromoteConfig()
    if decision.promote and promote.approval:
        asked = approval.ask(registered, model, run_id, tags, expected, promote.approval_hours, page)
        version, news = approval.answered(asked), asked.tags["decision"] == approval.WAITING
    else:
        version = registry.register_and_promote(
            registered, model, run_id, tags, promote=decision.promote, expected=expected, description=page
        )
        news = look.decision == looks.OPEN or decision.promote
    return as_outcome(version, decision, news)


def as_outcome(version: Version, decision: Decision | None = None, news: bool = True) -> Outcome:
    """The outcome that the tags of a version tell, which was decided on."""
    by = f" Approved by {version.tags['approval.by']}." if version.tags.get(approval.APPROVAL) == "approved" else ""
    if version.tags["decision"] == "promoted":
        former = registry.former_of(version)
        instead = "the first champion" if former is None else f"replaces version {former}"
        return Outcome("Promoted", f"{version} is {instead}.{by}", version, decision, news)
    message = f"{version} is not promoted: {version.tags['decision.reasons']}."
    return Outcome("Rejected", message, version, decision, news)


def look_key(planned: Plan, trained: Mapping[str, Result], champion: Version | None) -> str:
    """Digest of what decides a look apart from its seed: the models, the held-out data, the judge and the gate.

    An equal candidate before an equal champion is the same look, whose decision stands: else a schedule that finds the
    same candidate each week would try its luck each week.
    """
    judging = promotion(planned, champion is not None)
    asked = [[name, STAGES[node.stage].version, node.params] for name, node in sorted(judging.nodes.items())]
    inputs = {need for node in judging.nodes.values() for need in node.inputs.values() if need[0] in trained}
    given = [[name, output, trained[name].outputs[output].sha256] for name, output in sorted(inputs)]
    return _digest([asked, given, None if champion is None else champion.artifact.sha256])


def as_result(champion: Version) -> Result:
    """The champion as if a stage of this run had made it.

    Raises:
        StageError: nothing says what its files should be.
    """
    if not champion.artifact.sha256:
        fix = "point the alias at a version that `alignflow retrain` has registered"
        message = "the champion was registered by other means: its content's sha256 is not known."
        raise refuse("champion", champion, message, fix, kind="registry")
    key = champion.tags.get("stage.key", "")
    return Result(status="done", key=key, run_id=champion.run_id, outputs={"model": champion.artifact}, reused=True)


def run(source: str, overrides: Sequence[str] = (), force: bool = False) -> Outcome:
    """Retrain from this process and wait for it.

    Raises:
        StageError: as `retrained`; or the run was stopped by Ctrl-C or SIGTERM (status `preempted`).
    """
    config = config_file.load(source, overrides).config
    check_gate(config)  # what is missing is said before a server starts
    with tags(*pipeline.tags_of(config, "retrain"), *overrides):
        return pipeline.run_locally(lambda: cast("Outcome", retrain(source, list(overrides), force)))
