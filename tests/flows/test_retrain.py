"""Retraining: what counts as a change, and one life of a champion from end to end, on a tiny model."""

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.events.filters import EventFilter, EventNameFilter

from flows import retrain
from flows.execution import warm
from flows.gate import approval, looks
from flows.planning import config_file as planning_config_file
from flows.planning.plan import Plan, promotion
from flows.results import lineage, registry
from schemas.errors import StageError
from schemas.stage import Artifact, Result
from stages import tracking
from tests.flows.test_cli import write_rows
from tests.support import commands, forked_stages, models
from tests.support.processes import wait_for


def pairs(n: int) -> list[dict[str, str]]:
    texts = [f"{a} {b}" for a in "abcdefgh" for b in "abcdefgh"][:n]
    return [{"prompt": text, "chosen": "yes good one", "rejected": "no bad"} for text in texts]


GATE = {"win_rate_min": 0.0, "kl_max": 1e6, "length_ratio_max": 100.0, "distinct_2_min": 0.0, "prompts_min": 4}
GATE |= {"reference_nll_min": 0.0, "reference_nll_max": 1e6, "empty_max": 1.0}
GATE |= {"unended_more_max": 1.0, "relevance_min": 0.0}


def config_file(folder: Path, **more: Any) -> Path:
    """A config that trains for a step, with a gate that lets pass whatever has won a little."""
    write_rows(folder / "pairs.jsonl", pairs(40))
    config = {
        "name": "trial",
        "model": {"path": str(folder / "model")},
        "data": {"preference": {"path": str(folder / "pairs.jsonl"), "kind": "preference", "eval_fraction": 0.3}},
        "sft": None,
        "reward": None,
        "align": {"dpo": {"max_steps": 2, "batch_size": 4, "learning_rate": 0.01}},
        "evaluate": {"judge": "sentiment", "min_prompts": 4, "max_new_tokens": 6, "bootstrap": 100},
        "promote": {"model": "assistant", "gate": GATE},
        **more,
    }
    file = folder / "config.yaml"
    file.write_text(json.dumps(config))
    return file


def loaded(file: Path, *overrides: str) -> Plan:
    return planning_config_file.load(str(file), overrides)


# --- The plan ---


def test_the_plan_of_a_promotion(tmp_path: Path) -> None:
    models.model_folder(tmp_path / "model")
    planned = loaded(config_file(tmp_path))
    first = promotion(planned, champion=False).nodes
    assert list(first) == ["gate sft", "gate dpo", "promote"]
    evaluations = {"candidate": ("gate dpo", "evaluation"), "sft": ("gate sft", "evaluation")}
    assert first["promote"].inputs == evaluations and first["promote"].about == {"candidate": "dpo"}
    later = promotion(planned, champion=True).nodes
    assert list(later) == ["gate sft", "gate dpo", "gate champion", "promote"]
    champion, dpo, sft = (later[f"gate {name}"] for name in ("champion", "dpo", "sft"))
    assert champion.inputs == {**dpo.inputs, "model": ("champion", "model")}
    assert dpo.inputs == {**planned.nodes["eval dpo"].inputs, "baseline": ("gate sft", "evaluation")}
    assert champion.params == dpo.params == sft.params
    asked = {"temperatures": [0.3], "samples_per_prompt": 1, "gate": True}  # the gate's own, not the run's
    assert champion.params == planned.nodes["eval dpo"].params | asked
    assert later["promote"].inputs == {**evaluations, "champion": ("gate champion", "evaluation")}
    fresh = promotion(planned, champion=True, seed=77).nodes
    assert {node.seed for node in fresh.values()} == {77}  # all sides answer anew, and alike


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["align.kto={}"], "promote.candidate = null: align has dpo, kto. Fix: set it to one of dpo, kto"),
        (["promote.candidate=ppo"], "promote.candidate = ppo: there is no such method. Fix: set it to one of dpo"),
        (["align={}"], "promote.candidate = null: align has no method."),
        (["evaluate.limit=3"], "promote.gate.prompts_min = 4: evaluate.limit is 3, which is too few"),
        (["promote.gate.tolerances.acuracy=1"], "'acuracy' is not a metric with a better direction"),
        (["promote.gate.klmax=1"], "promote.gate.klmax: unknown key. Did you mean 'kl_max'?"),
        (["align={champion: {method: dpo}}"], "align = champion: this name cannot be used"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(tmp_path: Path, overrides: Sequence[str], words: str) -> None:
    models.model_folder(tmp_path / "model")
    file = config_file(tmp_path)
    with pytest.raises(StageError) as error:
        retrain.fingerprint(loaded(file, *overrides))
    assert words in str(error.value)


def test_without_the_key_promote_all_defaults_hold(tmp_path: Path) -> None:
    models.model_folder(tmp_path / "model")
    planned = loaded(config_file(tmp_path, promote=None), "align.kto={}")  # a plain run promotes nothing
    with pytest.raises(StageError, match=r"promote\.candidate = null: align has dpo, kto"):
        promotion(planned, champion=False)
    assert retrain.model_name(planned.config) == "trial"


# --- What counts as a change ---


def test_data_settings_and_gate_count_and_places_do_not(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name in "ab":
        models.model_folder(tmp_path / name / "model")
    here, there = config_file(tmp_path / "a"), config_file(tmp_path / "b")
    before = retrain.fingerprint(loaded(here))
    assert retrain.fingerprint(loaded(there)) == before
    assert retrain.fingerprint(loaded(here, "parallel=2")) == before
    asked = loaded(here, "promote.approval=true", "promote.approval_hours=1")  # who has the last word changes no result
    assert retrain.fingerprint(asked) == before

    for changed in ("align.dpo.beta=0.5", "promote.gate.kl_max=7", "evaluate.judge=rule", "seed=1"):
        after = retrain.fingerprint(loaded(here, changed))
        assert after.data == before.data and after.config != before.config
    write_rows(tmp_path / "a" / "pairs.jsonl", pairs(41))
    after = retrain.fingerprint(loaded(here))
    assert after.data != before.data and after.config == before.config
    models.model_folder(tmp_path / "b" / "model", seed=5)
    after = retrain.fingerprint(loaded(there))
    assert after.data == before.data and after.config != before.config


# --- What a look is, and what it draws ---


def trained_of(planned: Plan) -> dict[str, Result]:
    """Results of all nodes of a plan, as if they had run: the digest of an output is its node's and its own name."""
    needs = {need for node in promotion(planned, champion=False).nodes.values() for need in node.inputs.values()}
    needs |= {need for node in planned.nodes.values() for need in node.inputs.values()} | {("dpo", "model")}
    outputs: dict[str, dict[str, Artifact]] = {}
    for name, output in needs:
        outputs.setdefault(name, {})[output] = Artifact(uri="", sha256=f"{name} {output}")
    return {name: Result(status="done", key=name, run_id=name, outputs=outputs[name]) for name in outputs}


def champion_of(sha256: str) -> registry.Version:
    return registry.Version("assistant", "1", Artifact(uri="", sha256=sha256), "run", {})


def test_another_candidate_champion_gate_or_held_out_set_is_another_look(tmp_path: Path) -> None:
    """An equal one is the same look, whatever its place."""
    models.model_folder(tmp_path / "model")
    planned = loaded(config_file(tmp_path))
    given = trained_of(planned)

    def other(name: str, output: str) -> dict[str, Result]:
        changed = {**given[name].outputs, output: Artifact(uri="", sha256="other")}
        return {**given, name: given[name].model_copy(update={"outputs": changed})}

    key = retrain.look_key(planned, given, champion_of("a"))
    assert retrain.look_key(planned, given, champion_of("a")) == key
    others = [
        retrain.look_key(planned, given, None),
        retrain.look_key(planned, given, champion_of("b")),
        retrain.look_key(planned, other("dpo", "model"), champion_of("a")),
        retrain.look_key(planned, other("data preference", "data"), champion_of("a")),
        retrain.look_key(loaded(config_file(tmp_path), "promote.gate.kl_max=7"), given, champion_of("a")),
        retrain.look_key(loaded(config_file(tmp_path), "promote.temperature=0.9"), given, champion_of("a")),
    ]
    assert len({key, *others}) == 7


def test_both_sides_answer_anew_with_the_seed_of_their_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.model_folder(tmp_path / "model")
    planned = loaded(config_file(tmp_path))
    look = looks.Look(3, "2026-01-01T00:00:00+00:00", 0.01, "key", "candidate")
    taken, judged = [], []

    def take(model: str, key: str, candidate: str, gate: object) -> looks.Look:
        taken.append((model, key, candidate))
        return look

    def run_all(judging: Plan, *more: Any) -> None:
        judged.extend(judging.nodes.values())
        raise StageError("enough")

    monkeypatch.setattr(looks, "take", take)
    monkeypatch.setattr(retrain, "run_all", run_all)
    given, champion = trained_of(planned), champion_of("a")
    with pytest.raises(StageError, match="enough"):
        retrain.decide(planned, given, champion, retrain.Fingerprint("d", "c"), "run")
    assert taken == [("assistant", retrain.look_key(planned, given, champion), "dpo model")]
    assert {node.name for node in judged} == {"gate sft", "gate dpo", "gate champion", "promote"}
    assert {node.seed for node in judged} == {looks.seed("assistant", look)} != {planned.config.seed}


# --- From end to end ---


@pytest.fixture(scope="module")
def forked() -> Iterator[None]:
    """Stages of flows in this process are forks of one that need not import everything first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warm, "Warm", forked_stages.Warm)
        yield


def states(prefect: SyncPrefectClient) -> list[tuple[str, str]]:
    """Name and message of all flow runs' final states, in their order."""
    runs = sorted(prefect.read_flow_runs(), key=lambda run: str(run.created))
    return [(run.state.name or "", run.state.message or "") for run in runs if run.state is not None]


def runs_of(stage: str) -> int:
    """Finished MLflow runs of a stage in the experiment."""
    query = f"tags.stage = '{stage}' and attributes.status = 'FINISHED'"
    return len(tracking.client().search_runs([tracking.experiment("trial")], query))


@pytest.mark.slow
def test_the_life_of_a_champion(
    prefect: SyncPrefectClient, forked: None, ready_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.model_folder(tmp_path / "model")
    config = str(config_file(tmp_path))
    # No champion yet: compared with the SFT model, and promoted.
    first = retrain.run(config)
    assert first.ending == "Promoted" and first.decision is not None and first.decision.against == "sft"
    assert registry.aliases("assistant") == {"champion": "1"}
    champion = registry.champion("assistant")
    assert champion is not None
    trained = tracking.client().get_run(champion.tags["train.run_id"]).data
    assert trained.tags["stage"] == "align" and champion.tags["stage.key"] == trained.tags["stage.key"]
    assert trained.tags["output.model"] == champion.tags["sha256"] == champion.artifact.sha256
    assert champion.tags["decision"] == "promoted" and "win_rate_p is" in champion.tags["decision.reasons"]
    assert champion.tags["code.version"] == tracking.code_version()
    assert (runs_of("align"), runs_of("promote")) == (1, 1)

    # Nothing changed: an early end. Forced: all is reused, and the candidate is the champion itself.
    assert retrain.run(config).ending == "Unchanged"
    forced = retrain.run(config, force=True)
    assert forced.ending == "Unchanged" and "own weights" in forced.message
    assert (runs_of("align"), runs_of("promote")) == (1, 1)

    # New data, a gate that nobody passes: trained, compared with the champion, registered, not promoted.
    write_rows(tmp_path / "pairs.jsonl", pairs(48))
    shut = ["promote.gate.win_rate_min=0.999"]
    rejected = retrain.run(config, shut)
    assert rejected.ending == "Rejected" and "win_rate_p is" in rejected.message
    assert rejected.decision is not None and rejected.decision.against == "champion"
    assert registry.aliases("assistant") == {"champion": "1"}
    second = registry.version("assistant", "2")
    page = tracking.client().get_model_version("assistant", "2").description or ""
    assert page.startswith("Failed the gate, judged against version 1. Candidate: dpo.\n\nFailed: win_rate_p")
    assert "| win_rate_p | " in page and f"- data `preference`: `{tmp_path / 'pairs.jsonl'}` (sha256 " in page
    assert f"/runs/{second.run_id})" in page and "/artifacts/comparison/report.html)" in page
    assert second.tags["decision"] == "rejected" and "true win rate of 0.999" in second.tags["decision.reasons"]
    assert second.tags["decision.against"] == "version 1" and second.tags["data.digest"] != champion.tags["data.digest"]
    evaluated = tracking.client().search_runs([tracking.experiment("trial")], "tags.model = 'champion'")
    assert [run.data.params["train.run_id"] for run in evaluated] == [champion.run_id]
    assert runs_of("align") == 2

    # With an open gate it would pass; but the champion is taken away while it is judged, so nothing moves.
    judge = retrain.run_all

    def meanwhile(*arguments: Any) -> Any:
        results = judge(*arguments)
        if "promote" in results:
            tracking.client().delete_registered_model_alias("assistant", "champion")
        return results

    with monkeypatch.context() as patch:
        patch.setattr(retrain, "run_all", meanwhile)
        with pytest.raises(StageError, match="version 1 was champion when the candidate was judged, now it is none"):
            retrain.run(config)
    assert registry.aliases("assistant") == {}
    assert registry.version("assistant", "2").tags["decision"] == "conflict"
    tracking.client().set_registered_model_alias("assistant", "champion", "1")

    # It passes the gate, but does not answer in time as it would be served: nothing moves.
    asked = ["promote.smoke=true", "promote.smoke_minutes=0.0001"]
    silent = retrain.run(config, asked)
    assert (
        silent.ending == "Rejected" and "smoke is 0, must be >= 1 (no answers within 0.0001 minutes" in silent.message
    )
    assert registry.aliases("assistant") == {"champion": "1"}

    # Once more, undisturbed: nothing is made again, and the candidate takes the champion's place.
    promoted = retrain.run(config)
    assert promoted.ending == "Promoted" and promoted.message.endswith("replaces version 1.")
    assert (runs_of("align"), runs_of("promote")) == (2, 3)
    assert registry.aliases("assistant") == {"champion": "2", "previous": "1"}
    assert retrain.run(config).ending == "Unchanged"

    # Rolled back: the next schedule does not promote it again.
    registry.rollback("assistant")
    assert registry.aliases("assistant") == {"champion": "1"}
    barred = retrain.run(config)
    assert barred.ending == "Rejected" and "version 2, which was rolled back" in barred.message
    assert registry.aliases("assistant") == {"champion": "1"}

    names = [name for name, _ in states(prefect)]
    assert names == [
        *("Promoted", "Unchanged", "Unchanged", "Rejected"),
        *("Conflict", "Rejected", "Promoted", "Unchanged", "Rejected"),
    ]
    assert states(prefect)[3][1] == rejected.message

    # Automations are told once of each decision: not of those that stand, nor where nothing changed.
    assert events(prefect) == [
        ("alignflow.promoted", "assistant", "1", first.message),
        ("alignflow.rejected", "assistant", "2", rejected.message),
        ("alignflow.failed", "config", "", states(prefect)[4][1]),
        ("alignflow.promoted", "assistant", "2", promoted.message),
    ]
    check_lineage(tmp_path, champion)


def events(prefect: SyncPrefectClient) -> list[tuple[str, str, str, str]]:
    """Our events: name, what about, version and finding, in their order."""
    ours = EventFilter(event=EventNameFilter(prefix=["alignflow."]))
    wait_for(lambda: len(prefect.read_events(filter=ours, limit=50).events) >= 4, 30)
    read = sorted(prefect.read_events(filter=ours, limit=50).events, key=lambda event: event.occurred)
    return [
        (one.event, one.resource["prefect.resource.name"], one.payload["version"], one.payload["finding"])
        for one in read
    ]


def check_lineage(folder: Path, champion: registry.Version) -> None:
    """From the alias to the rows of then, and from the rows of now to the models that saw them."""
    back = lineage.lineage("models:/assistant@champion")
    text = lineage.as_text(back)
    assert "[assistant v1 @champion, promoted]" in text and f"run {champion.run_id}" in text
    write_rows(folder / "then.jsonl", pairs(40))
    then = tracking.digest(folder / "then.jsonl")
    assert f"source: {folder / 'pairs.jsonl'}  sha256 {then[:12]}" in text

    forth = json.loads(lineage.as_json(lineage.lineage(str(folder / "pairs.jsonl"))))
    seen = {one["version"] for item in walk(forth) for one in item["facts"].get("registered", [])}
    assert seen == {"2"}
    assert "rolled back" in lineage.as_text(lineage.lineage(str(folder / "pairs.jsonl")))


def walk(item: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield item
    for inner in item["below"]:
        yield from walk(inner)


@pytest.mark.slow
def test_a_candidate_waits_for_a_person_and_outlives_the_process_that_waits(
    prefect: SyncPrefectClient, forked: None, ready_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.model_folder(tmp_path / "model")
    config = str(config_file(tmp_path, promote={"model": "assistant", "gate": GATE, "approval": True}))
    killed = commands.begun(["retrain", config], tmp_path / "log", tmp_path / "log")
    asks = lambda: any("approval" in one.tags for one in registry.versions("assistant"))  # noqa: E731
    wait_for(lambda: not killed.is_alive() or asks(), 300, (tmp_path / "log").read_text)
    killed.kill()
    killed.join()
    asked = registry.version("assistant", "1")
    assert asked.tags["decision"] == "waiting" and "win_rate_p is" in asked.tags["decision.reasons"]
    assert registry.aliases("assistant") == {}

    def answer() -> None:
        """Once the second process waits."""
        first = asked.tags["pipeline.run"]
        wait_for(lambda: registry.version("assistant", "1").tags["pipeline.run"] != first, 300)
        approval.decide(None, approve=True, by="ada")

    monkeypatch.setattr(approval, "LOOK_SECONDS", 0.2)
    person = threading.Thread(target=answer, daemon=True)
    person.start()
    outcome = retrain.run(config)
    person.join()
    assert outcome.ending == "Promoted", outcome
    assert outcome.message == "assistant version 1 is the first champion. Approved by ada."
    assert registry.aliases("assistant") == {"champion": "1"}
    settled = registry.version("assistant", "1").tags
    assert settled["approval.until"] == asked.tags["approval.until"]
    assert settled["decision.reasons"] == asked.tags["decision.reasons"]  # of the gate
    assert [look.decision for look in looks.looks("assistant")] == ["promote"]  # one look, though two processes asked
    assert (runs_of("align"), runs_of("promote")) == (1, 1)
    assert retrain.run(config).ending == "Unchanged"
