"""The registry on a real MLflow database: versions by content, the alias by compare-and-swap, races, rollbacks."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from flows.results import registry
from flows.servers import mlflow_prefect, supervisor
from schemas.errors import StageError
from schemas.stage import Artifact, Request
from stages import tracking
from stages.tracking import StageRun
from tests.support import forked_servers
from tests.support.commands import alignflow
from tests.support.forks import PYTHON

TAGS = {"decision": "promoted", "data.digest": "d1"}


def model_of(folder: Path, weights: str) -> tuple[Artifact, str]:
    """A model that a training stage has published, and its run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights").write_text(weights)
    request = Request(stage="align", version=1, params={"weights": weights}, name="dpo", experiment="tests")
    with StageRun(request) as run:
        artifact = run.publish("model", folder, model=True)
        run.finish({})
    return artifact, run.run_id


@pytest.fixture
def models(ready_home: Path, tmp_path: Path) -> list[tuple[Artifact, str]]:
    """Three models of different content."""
    return [model_of(tmp_path / name, name) for name in ("one", "two", "three")]


def settle(made: tuple[Artifact, str], expected: str | None, promote: bool = True) -> registry.Version:
    return registry.register_and_promote("assistant", *made, TAGS, promote=promote, expected=expected)


def statuses() -> list[str]:
    """Of all versions, the oldest first."""
    return [one.tags["status"] for one in reversed(registry.versions("assistant"))]


def aliases() -> dict[str, str]:
    return registry.aliases("assistant")


def test_a_version_is_registered_from_the_logged_model_with_its_tags(models: list[tuple[Artifact, str]]) -> None:
    artifact, run_id = models[0]
    settle(models[0], None)
    found = tracking.client().get_model_version_by_alias("assistant", "champion")
    assert str(found.version) == "1" and found.run_id == run_id and found.source == artifact.uri
    told = {"decision": "promoted", "z.data.digest": "d1", "status": "champion"}
    names = list(found.tags)
    assert names[0] == "status" and names.index("decision") < names.index("z.data.digest"), "lists show them as set"
    assert found.tags.items() >= {**told, "sha256": artifact.sha256, "champion.former": "none"}.items()
    assert registry.version("assistant", "1").tags["data.digest"] == "d1"
    assert tracking.locate("models:/assistant@champion") == tracking.fetch(artifact)
    assert aliases() == {"champion": "1"}
    champion = registry.champion("assistant")
    assert champion is not None and champion.artifact == artifact and champion.run_id == run_id


def test_the_former_champion_is_kept(models: list[tuple[Artifact, str]]) -> None:
    settle(models[0], None)
    settle(models[1], "1")
    assert aliases() == {"champion": "2", "previous": "1"}
    assert registry.version("assistant", "2").tags["champion.former"] == "1"
    assert "champion.until" in registry.version("assistant", "1").tags


def test_the_status_says_what_became_of_each_version(models: list[tuple[Artifact, str]]) -> None:
    def told() -> dict[str, str]:
        return {one.number: one.tags["status"] for one in registry.versions("assistant")}

    settle(models[0], None)
    settle(models[1], "1", promote=False)
    assert told() == {"1": "champion", "2": "rejected"}
    settle(models[2], "1")
    assert told() == {"1": "former champion", "2": "rejected", "3": "champion"}
    settle(models[2], "3", promote=False)
    assert told()["3"] == "champion", "a champion that is judged again is not rejected"
    with pytest.raises(StageError, match="version 1 was champion when"):
        settle(models[1], "1")
    assert told() == {"1": "former champion", "2": "conflict", "3": "champion"}
    registry.rollback("assistant")
    assert told() == {"1": "champion", "2": "conflict", "3": "rolled back"}


def test_tags_of_before_they_had_a_prefix_are_read_and_give_way(models: list[tuple[Artifact, str]]) -> None:
    settle(models[0], None)
    client = tracking.client()
    client.delete_model_version_tag("assistant", "1", "z.data.digest")
    client.set_model_version_tag("assistant", "1", "data.digest", "of before")
    assert registry.version("assistant", "1").tags["data.digest"] == "of before"
    settle(models[0], "1")
    assert registry.version("assistant", "1").tags["data.digest"] == "d1"


class Killed(BaseException):
    """The process dies here."""


def dies(*given: object) -> None:
    raise Killed


def test_a_promotion_that_dies_between_its_moves_is_finished(
    models: list[tuple[Artifact, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(models[0], None)
    settle(models[1], "1")
    with monkeypatch.context() as killed, pytest.raises(Killed):
        killed.setattr(registry, "point_previous", dies)
        settle(models[2], "2")
    assert aliases() == {"champion": "3", "previous": "1"}
    champion = registry.settled_champion("assistant")  # as a retraining begins
    assert champion is not None and champion.number == "3" and aliases() == {"champion": "3", "previous": "2"}
    assert statuses() == ["former champion", "former champion", "champion"] and "champion.since" in champion.tags
    with monkeypatch.context() as killed, pytest.raises(Killed):
        killed.setattr(registry, "point_previous", dies)
        registry.rollback()
    assert aliases() == {"champion": "2", "previous": "2"}
    with registry.held("assistant"):  # as a promotion or a rollback begins
        assert aliases() == {"champion": "2", "previous": "1"}
        assert statuses() == ["former champion", "champion", "rolled back"]


def test_aliases_that_people_have_moved_stay(models: list[tuple[Artifact, str]]) -> None:
    settle(models[0], None)
    settle(models[1], "1", promote=False)
    tracking.client().set_registered_model_alias("assistant", "champion", "2")
    tracking.client().set_registered_model_alias("assistant", "previous", "2")
    assert registry.settled_champion("assistant") is not None
    assert aliases() == {"champion": "2", "previous": "2"}


def test_a_rejected_candidate_stays_and_moves_nothing(models: list[tuple[Artifact, str]]) -> None:
    settle(models[0], None)
    reasons = {"decision": "rejected", "decision.reasons": "empty is 0.5"}
    registry.register_and_promote("assistant", *models[1], reasons, promote=False, expected="1")
    assert aliases() == {"champion": "1"}
    assert registry.version("assistant", "2").tags.items() >= reasons.items()


def test_the_same_content_keeps_its_version(models: list[tuple[Artifact, str]], tmp_path: Path) -> None:
    settle(models[0], None)
    settle(models[1], "1", promote=False)
    again, run_id = model_of(tmp_path / "again", "two")  # another run, the same bytes
    assert again.uri != models[1][0].uri or run_id == models[1][1]
    settled = registry.register_and_promote(
        "assistant", again, run_id, {"decision": "promoted"}, promote=True, expected="1"
    )
    assert settled.number == "2" and len(registry.versions("assistant")) == 2
    assert settled.tags["decision"] == "promoted" and aliases() == {"champion": "2", "previous": "1"}


@pytest.mark.parametrize("expected", [None, "2"])
def test_another_champion_than_the_one_decided_against_is_a_conflict(
    models: list[tuple[Artifact, str]], expected: str | None
) -> None:
    settle(models[0], None)
    settle(models[1], "1", promote=False)
    with pytest.raises(StageError, match="now it is version 1; nothing was moved") as error:
        settle(models[2], expected)
    assert error.value.problem.kind == "conflict" and error.value.problem.fix
    assert aliases() == {"champion": "1"}
    assert registry.version("assistant", "3").tags["decision"] == "conflict"


def test_rollback_restores_the_former_champion_and_bars_the_way_back(models: list[tuple[Artifact, str]]) -> None:
    settle(models[0], None)
    settle(models[1], "1")
    settle(models[2], "2")
    bad, restored = registry.rollback("assistant")
    assert (bad.number, restored.number) == ("3", "2")
    assert aliases() == {"champion": "2", "previous": "1"}
    assert "rolled_back" in registry.version("assistant", "3").tags
    with pytest.raises(StageError, match="version 3, which was rolled back at") as error:
        settle(models[2], "2")
    assert error.value.problem.kind == "rolled_back" and "delete the version's tag" in str(error.value.problem.fix)
    assert aliases()["champion"] == "2"
    registry.rollback("assistant")
    assert aliases() == {"champion": "1"}
    with pytest.raises(StageError, match="there was no champion before it"):
        registry.rollback("assistant")
    tracking.client().delete_model_version_tag("assistant", "3", "rolled_back")  # as the fix says
    assert settle(models[2], "1").number == "3" and aliases()["champion"] == "3"


def test_a_former_champion_that_was_rolled_back_is_not_restored(models: list[tuple[Artifact, str]]) -> None:
    settle(models[0], None)
    settle(models[1], "1")
    settle(models[0], "2")  # the first one again
    registry.rollback("assistant")
    assert aliases()["champion"] == "2"
    with pytest.raises(StageError, match="version 1, was rolled back itself"):
        registry.rollback("assistant")


def test_the_command_line_rolls_back_the_only_model_with_a_champion(models: list[tuple[Artifact, str]]) -> None:
    for name in ("other", "it's", None):
        with pytest.raises(StageError) as error:
            registry.rollback(name)
        assert error.value.status == "refused" and error.value.problem.fix
    settle(models[0], None)
    settle(models[1], "1")
    answer = alignflow("rollback")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == "restored assistant version 1 as champion; rolled back version 2\n"
    assert aliases()["champion"] == "1"


@pytest.mark.slow
def test_through_an_mlflow_server_it_is_the_same(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = mlflow_prefect.mlflow_server(supervisor.port(None, 0, "port"))
    with forked_servers.running(server):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
        models = [model_of(tmp_path / name, name) for name in ("one", "two")]
        settle(models[0], None)
        settle(models[1], "1")
        assert aliases() == {"champion": "2", "previous": "1"}
        champion = registry.champion("assistant")
        assert champion is not None and champion.artifact == models[1][0]
        assert champion.tags.items() >= TAGS.items()
        assert (tracking.fetch(champion.artifact) / "weights").read_text() == "two"
        assert "promotions from other hosts are not kept out" in caplog.text
        with pytest.raises(StageError, match="now it is version 2"):
            settle(models[0], "1")
        registry.rollback()
        assert aliases() == {"champion": "1"}


# --- Races ---

# Looks where the alias points, then waits long enough for the other to look too. Without a lock both would move it.
RACER = """
import sys, time
from pathlib import Path
from flows.results import registry
from schemas.errors import StageError
from schemas.stage import Artifact

look = registry.check_still_champion
def slowly(*arguments):
    look(*arguments)
    time.sleep(2)
registry.check_still_champion = slowly
ready, start, uri, sha256, run_id = sys.argv[1:]
Path(ready).touch()
while not Path(start).exists():
    time.sleep(0.01)
try:
    model = Artifact(uri=uri, sha256=sha256)
    won = registry.register_and_promote("assistant", model, run_id, {}, promote=True, expected="1")
    print("won", won.number)
except StageError as error:
    print(error.problem.kind)
"""


def race(models: list[tuple[Artifact, str]], folder: Path, *environments: dict[str, str]) -> list[str]:
    """Two processes promote the second and the third model against the first, at once; what each says."""
    start = folder / "start"
    racers = []
    for number, ((artifact, run_id), environment) in enumerate(zip(models[1:], environments, strict=True)):
        arguments = [str(folder / f"ready{number}"), str(start), artifact.uri, artifact.sha256, run_id]
        racers.append(
            subprocess.Popen(
                [*PYTHON, "-c", RACER, *arguments],
                env={**os.environ, **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    end = time.monotonic() + 120
    while not all((folder / f"ready{number}").exists() for number in range(2)) and time.monotonic() < end:
        time.sleep(0.05)
    start.touch()
    said = []
    for racer in racers:
        out, err = racer.communicate(timeout=180)
        assert racer.returncode == 0, err
        said.append(out.strip())
    return said


def check_one_winner(said: list[str]) -> None:
    (winner,) = [words for words in said if words.startswith("won")]
    assert sorted(said) == sorted([winner, "conflict"])
    number = winner.split()[1]
    assert aliases() == {"champion": number, "previous": "1"}
    other = {"2": "3", "3": "2"}[number]
    assert registry.version("assistant", other).tags["decision"] == "conflict"


@pytest.mark.slow
def test_two_racing_promotions_leave_one_winner(models: list[tuple[Artifact, str]], tmp_path: Path) -> None:
    settle(models[0], None)
    check_one_winner(race(models, tmp_path, {}, {}))


@pytest.mark.slow
def test_two_hosts_that_share_a_prefect_server_leave_one_winner(
    server: str, models: list[tuple[Artifact, str]], tmp_path: Path
) -> None:
    """Homes of their own, so that no file's lock joins the two: the lease alone does."""
    settle(models[0], None)
    shared = {"PREFECT_API_URL": server, "MLFLOW_TRACKING_URI": tracking.tracking_uri()}
    homes = [{"ALIGNFLOW_HOME": str(tmp_path / f"host{number}"), **shared} for number in range(2)]
    check_one_winner(race(models, tmp_path, *homes))
