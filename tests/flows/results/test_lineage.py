"""Lineage both ways, over runs that real stages' runs have logged to MLflow, with made contents."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.results import lineage
from schemas.errors import StageError
from schemas.stage import Request
from stages import tracking
from tests.support.lineage_world import World


@pytest.fixture(scope="module")
def world(database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One for all tests, which only look."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copy(database, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNFLOW_HOME", str(folder))
        yield World(folder)


def walk(item: lineage.Item) -> Iterator[lineage.Item]:
    yield item
    for inner in item.below:
        yield from walk(inner)


def titles(item: lineage.Item) -> list[str]:
    return [one.title for one in walk(item)]


def test_from_the_alias_to_the_rows(world: World) -> None:
    tree = lineage.lineage("models:/assistant@champion")
    assert titles(tree) == [
        "models:/assistant@champion",
        "model: dpo",
        "data: data preference",
        "evaluation: data evaluation",
        f"source: {world.folder / 'questions.jsonl'}",
        "model: base",
        f"source: {world.folder / 'pairs.jsonl'}",
        "model: sft",
        "data: data preference (see above)",
        "model: base (see above)",
    ]
    dpo = tree.below[0].facts
    assert dpo["sha256"] == world.dpo.sha256 and dpo["code"] == tracking.code_version()
    run = tracking.client().get_run(dpo["run_id"])
    assert run.data.tags["stage.key"] == dpo["stage_key"] and run.info.run_name == "dpo"
    assert Request.model_validate_json(tracking.locate(dpo["config"]).read_text()).name == "dpo"
    source = next(item for item in walk(tree) if item.title.endswith("pairs.jsonl"))
    assert source.facts["sha256"] == hashlib.sha256(b"rows of pairs.jsonl").hexdigest()
    first = lineage.as_text(tree).splitlines()[0]
    assert first.endswith("[assistant v2 @champion, promoted]")
    assert "[assistant v1 @previous, promoted]" in lineage.as_text(lineage.lineage("models:/assistant/1"))


def test_a_model_of_the_last_run_and_a_digest_lead_there_too(world: World) -> None:
    by_alias = lineage.lineage("dpo").below
    assert lineage.lineage(world.dpo.sha256).below == by_alias == lineage.lineage(world.dpo.sha256[:12]).below


def test_from_a_file_to_every_model_that_saw_it(world: World) -> None:
    tree = lineage.lineage(world.files["pairs"].uri)
    assert titles(tree) == [
        world.files["pairs"].uri,
        "data preference, by its input source",
        "sft, by its input data",
        "dpo, by its input model",
        "kto, by its input model",
        "dpo, by its input data (see above)",
        "kto, by its input data (see above)",
    ]
    text = lineage.as_text(tree)
    assert "[assistant v2 @champion, promoted]" in text and "[assistant v1 @previous, promoted]" in text
    assert lineage.lineage(world.files["pairs"].sha256).below == tree.below
    assert titles(lineage.lineage(world.data.sha256))[1:3] == ["sft, by its input data", "dpo, by its input model"]
    whole = json.loads(lineage.as_json(tree))
    (dpo,) = [item for item in whole["below"][0]["below"][0]["below"] if item["title"].startswith("dpo")]
    assert dpo["facts"]["registered"][0]["aliases"] == ["champion"]
    assert dpo["facts"]["outputs"] == {"model": world.dpo.sha256}


def test_models_that_did_not_see_the_data_are_not_named(world: World) -> None:
    assert titles(lineage.lineage(world.files["other"].uri))[1:] == [
        "data other, by its input source",
        "lone, by its input data",
    ]
    # held-out prompts were only kept out of training data, and only answered in an evaluation
    assert titles(lineage.lineage(world.files["questions"].uri))[1:] == ["data evaluation, by its input source"]


def test_a_run_without_the_tags_is_followed_by_its_files(ready_home: Path, tmp_path: Path) -> None:
    world = World(tmp_path)
    before = titles(lineage.lineage(world.files["pairs"].uri)), titles(lineage.lineage("dpo"))
    for run in list(tracking.runs("tags.`stage.key` != ''")):
        for name in run.data.tags:
            if name.startswith(("input.", "output.", "code.")):
                tracking.client().delete_tag(run.info.run_id, name)
    assert (titles(lineage.lineage(world.files["pairs"].uri)), titles(lineage.lineage("dpo"))) == before


def test_what_a_deleted_run_made_is_not_from_outside(ready_home: Path, tmp_path: Path) -> None:
    World(tmp_path)
    before = titles(lineage.lineage("dpo"))
    (run,) = [run for run in tracking.runs("tags.`stage.key` != ''") if run.data.tags["stage"] == "base"]
    tracking.client().delete_run(run.info.run_id)
    told = next(title for title in titles(lineage.lineage("dpo")) if "trash" in title)
    assert told.endswith(f"whose run is in MLflow's trash (mlflow runs restore --run-id {run.info.run_id})")
    tracking.client().restore_run(run.info.run_id)  # what that command does
    assert titles(lineage.lineage("dpo")) == before


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("models:/assistant@challenger", "there is no such registered model"),
        ("models:/assistant/7", "there is no such registered model"),
        ("ppo", "there is no such model"),
        ("0123456789ab", "no known digests begin so"),
    ],
)
def test_what_is_not_there_is_said(world: World, what: str, words: str) -> None:
    with pytest.raises(StageError, match=words) as error:
        lineage.lineage(what)
    assert error.value.problem.fix


def test_a_file_that_no_stage_has_read_is_said(world: World) -> None:
    new = world.file("changed.jsonl")
    with pytest.raises(StageError, match=f"sha256 {new.sha256[:12]}.*no stage has taken this data"):
        lineage.lineage(new.uri)
