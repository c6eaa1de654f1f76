"""Mixtures on their way from a config to requests: what is checked, overridden, planned, keyed and guessed."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from flows import retrain
from flows.planning import allowed_paths, config_file, dry_run
from flows.planning.explain import validate
from flows.planning.plan import Plan, plan
from flows.planning.requests import request_for, with_sources
from flows.results import lineage
from flows.submit import absolute
from schemas import environment
from schemas.config import PipelineConfig
from schemas.errors import StageError
from schemas.stage import STAGES, Artifact, Request
from stages import tracking
from stages.tracking import StageRun
from tests.support.commands import alignflow

A, B = [{"prompt": f"a {i}", "response": "one"} for i in range(40)], [{"prompt": "b", "response": "two"}]


def write(file: Path, rows: Sequence[object]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with rows of two sources."""
    write(tmp_path / "a.jsonl", A)
    write(tmp_path / "b.jsonl", B)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def raw(*sources: Any, **more: Any) -> dict[str, Any]:
    given = list(sources) or [{"path": "a.jsonl", "weight": 3}, {"path": "b.jsonl", "weight": 1}]
    data = {"sft": given} if not more else {"sft": {"sources": given, **more}}
    return {"name": "t", "model": {"scratch": {}}, "data": data, "align": {}, "evaluate": {"judge": "rule"}}


def key(*sources: Any, seed: int = 0, **more: Any) -> str:
    """The key of the request for the mixture, as a run would ask for it."""
    planned = plan(validate({**raw(*sources, **more), "seed": seed}))
    return asked(planned).key()


def asked(planned: Plan) -> Request:
    node = planned.nodes["data sft"]
    params = Request(stage="validate", version=STAGES["validate"].version, params=node.params, seed=node.seed)
    return with_sources(params, node.field)


# --- what is checked and said ---


def test_every_source_is_looked_for(folder: Path) -> None:
    with pytest.raises(StageError) as refused:
        config_file.planned(raw({"path": "a.jsonl"}, {"path": "bb.jsonl"}, {"path": "s3://x/y.jsonl"}))
    lines = str(refused.value).splitlines()
    assert lines[0].startswith("data.sft.sources.1.path = bb.jsonl: no such file. Fix: Did you mean 'b.jsonl'?")
    assert lines[1].startswith("data.sft.sources.2.sha256 = null: the file at s3://x/y.jsonl needs a digest.")


@pytest.mark.parametrize(
    ("overrides", "weights"),
    [
        (["data.sft.0.weight=5"], [5, 1]),
        (["data.sft.sources.1.weight=7", "data.sft.0.weight=2"], [2, 7]),
        (["data.sft=[{path: a.jsonl}]"], [None]),
        (["data.sft.1={path: c.jsonl, weight: 9}"], [3, 9]),
    ],
)
def test_an_override_names_an_item_by_its_number(overrides: list[str], weights: list[Any]) -> None:
    config = raw()
    for override in overrides:
        config_file.apply(config, override)
    data: Any = validate(config).data.sft
    assert [source.weight for source in data.sources] == weights


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "data.sft.path=c.jsonl",
            "data.sft is a list of 2. Fix: name an item by its number from 0, such as data.sft.0",
        ),
        ("data.sft.2.weight=1", "data.sft is a list of 2."),
        ("data.sft.-1.weight=1", "data.sft is a list of 2."),
        ("data.sft.sources=[]", "data.sft is a list of 2."),
        ("data.sft.0.path.x=1", "data.sft.0.path is 'a.jsonl' and has no keys. Fix: set data.sft.0.path as a whole"),
    ],
)
def test_what_an_override_cannot_mean(override: str, words: str) -> None:
    with pytest.raises(StageError) as refused:
        config_file.apply(raw(), override)
    assert words in str(refused.value)


def test_roots_hold_for_every_source(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = folder / "inside"
    write(inside / "a.jsonl", A)
    monkeypatch.setenv(environment.ROOTS, str(inside))
    checked = validate(raw({"path": "inside/a.jsonl"}, {"path": "b.jsonl"}, {"path": "hub:x/y"}))
    with pytest.raises(StageError) as refused:
        allowed_paths.check_roots(checked, deployed=True)
    problems = [line.partition(" = ")[0] for line in str(refused.value).splitlines()]
    assert problems == ["data.sft.sources.1.path", "data.sft.sources.2.path"]


def test_roots_hold_for_every_source_of_a_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source whose file is an input is read from there: its path does not count, that of the input does."""
    inside = folder / "inside"
    write(inside / "a.jsonl", A)
    monkeypatch.setenv(environment.ROOTS, str(inside))
    sources = [{"name": name, "path": f"/etc/{name}.jsonl", "kind": "sft"} for name in "abc"]
    sources.append({"path": "/etc/d.jsonl", "kind": "sft"})  # of its default name, whatever input is called None
    inputs = {
        "source.a": Artifact(uri=str(inside / "a.jsonl"), sha256="0" * 64),
        "source.b": Artifact(uri=str(folder / "b.jsonl"), sha256="0" * 64),
        "source.None": Artifact(uri=str(inside / "a.jsonl"), sha256="0" * 64),
    }
    request = Request(stage="validate", version=1, params={"sources": sources}, inputs=inputs)  # type: ignore[dict-item]
    with pytest.raises(StageError) as refused:
        allowed_paths.check_request_roots(request, deployed=True)
    problems = [line.partition(" = ")[0] for line in str(refused.value).splitlines()]
    assert problems == ["params.sources.2.path", "params.sources.3.path", "inputs.source.b.uri"]


# --- the plan ---


def test_the_run_s_seed_draws_where_something_is_drawn(folder: Path) -> None:
    def seeds(*sources: Any, **more: Any) -> tuple[Any, int]:
        node = plan(validate({**raw(*sources, **more), "seed": 7})).nodes["data sft"]
        return node.params["seed"], node.seed

    assert seeds() == (7, 0)
    assert seeds({"path": "a.jsonl", "epochs": 1.5}, {"path": "b.jsonl"}) == (7, 0)
    assert seeds({"path": "a.jsonl", "epochs": 2}, {"path": "b.jsonl"}) == (None, 0)
    assert seeds({"path": "a.jsonl", "weight": 1}, seed=3) == (3, 0)


def test_a_slot_gives_what_all_of_its_sources_give(folder: Path) -> None:
    config = raw({"path": "a.jsonl"}, {"path": "p.jsonl", "kind": "preference"})
    planned = plan(validate({**config, "data": {**config["data"], "preference": [{"path": "p.jsonl"}]}}))
    assert planned.nodes["sft"].inputs["data"] == ("data sft", "data")
    assert planned.nodes["reward"].inputs["data"] == ("data preference", "data")
    with pytest.raises(StageError, match="needs preference data, which nothing gives"):
        plan(validate({**config, "align": {"dpo": {}}}))


def test_all_data_leaves_out_what_a_mixture_holds_out(folder: Path) -> None:
    config = raw(eval_fraction=0.4)
    config["data"]["preference"] = {"path": "p.jsonl", "kind": "preference", "eval_fraction": 0.1}
    nodes = plan(validate(config)).nodes
    assert nodes["data preference"].params["others_eval_fraction"] == 0.4 == nodes["data sft"].params["eval_fraction"]


# --- what is reused ---


def test_places_do_not_count_and_names_weights_bytes_order_and_seed_do(folder: Path) -> None:
    first = key()
    assert first == key()
    named = [{"path": "a.jsonl", "weight": 3, "name": "a"}, {"path": "b.jsonl", "weight": 1, "name": "b"}]
    assert key(*named) == first
    write(folder / "elsewhere" / "a.jsonl", A)
    assert key({"path": "elsewhere/a.jsonl", "weight": 3}, named[1]) == first
    write(folder / "renamed.jsonl", A)
    assert key({"path": "renamed.jsonl", "weight": 3, "name": "a"}, named[1]) == first
    others = {
        "another name": key({"path": "renamed.jsonl", "weight": 3}, named[1]),
        "another weight": key({**named[0], "weight": 2}, named[1]),
        "another order": key(*named[::-1]),
        "another seed": key(*named, seed=1),
        "another stopping": key(*named, stopping="all_exhausted"),
        "another share held out": key(*named, eval_fraction=0.2),
    }
    write(folder / "b.jsonl", [*B, *B])
    others["other bytes"] = key(*named)
    assert len({first, *others.values()}) == 1 + len(others)


def test_a_request_has_an_input_for_each_file(folder: Path) -> None:
    request = asked(plan(validate(raw({"path": "a.jsonl"}, {"path": "demo:sft"}))))
    assert {name: one.sha256 for name, one in request.inputs.items()} == {
        "source.a": tracking.digest(folder / "a.jsonl")
    }
    (folder / "a.jsonl").unlink()
    with pytest.raises(StageError, match=r"data\.sft\.sources\.0\.path = .*a\.jsonl: there is no such file"):
        asked(plan(validate(raw({"path": "a.jsonl"}, {"path": "demo:sft"}))))


def test_a_single_source_has_the_key_that_it_had(folder: Path) -> None:
    """The digest of what decided it before there were mixtures, worked out here."""
    import hashlib

    from schemas.stage import ENGINE_VERSION, STAGES

    config = validate({**raw(), "data": {"sft": {"path": "a.jsonl", "kind": "sft"}}})
    request = asked(plan(config))
    params = {name: value for name, value in request.params.items() if name not in ("path", "few_prompts")}
    assert "sources" not in params and list(request.inputs) == ["source"]
    decides = {
        "stage": "validate",
        "version": STAGES["validate"].version,
        "engine": ENGINE_VERSION,
        "params": params,
        "inputs": {"source": tracking.digest(folder / "a.jsonl")},
        "seed": 0,
    }
    assert request.key() == hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def test_a_retraining_sees_new_bytes_of_any_source(folder: Path) -> None:
    def fingerprint() -> retrain.Fingerprint:
        more = {"align": {"ppo": {}}, "reward_model": str(folder / "reward")}
        return retrain.fingerprint(plan(validate({**raw(), **more})))

    (folder / "reward").mkdir()
    before = fingerprint()
    write(folder / "b.jsonl", [*B, *A])
    after = fingerprint()
    assert after.data != before.data and after.config == before.config


# --- guesses ---


@pytest.mark.parametrize(
    ("sources", "more", "rows"),
    [
        # 40 and 20 lines, half of the prompts held out: 20 and 10 rows to train on.
        ([{}, {}], {}, 30),
        ([{"epochs": 2.5}, {}], {}, 60),
        ([{"weight": 1}, {"weight": 1}], {}, 20),
        ([{"weight": 1}, {"weight": 3}], {}, 13),  # 10 / (3/4) = 13.3
        ([{"weight": 1}, {"weight": 1}], {"stopping": "all_exhausted"}, 40),
        ([{"limit": 4}, {}], {}, 12),
    ],
)
def test_rows_to_train_on_are_guessed_by_the_lines_of_all_files(
    sources: list[dict[str, Any]], more: dict[str, Any], rows: int, folder: Path
) -> None:
    write(folder / "b.jsonl", A[:20])
    files = [{"path": f"{name}.jsonl", **source} for name, source in zip("ab", sources, strict=True)]
    node = plan(validate(raw(*files, eval_fraction=0.5, **more))).nodes["data sft"]
    assert dry_run.guessed_rows(node.params, "sft", "train") == rows
    assert dry_run.guessed_rows(node.params, "sft", "gold") == 0


def test_nothing_is_guessed_where_a_source_has_no_lines(folder: Path) -> None:
    node = plan(validate(raw({"path": "a.jsonl"}, {"path": "demo:sft"}))).nodes["data sft"]
    assert dry_run.guessed_rows(node.params, "sft", "train") is None


# --- the command line ---


def test_the_data_of_a_config_is_checked_as_a_run_would_read_it(folder: Path) -> None:
    config = raw({"path": "a.jsonl", "weight": 3}, {"path": "b.jsonl", "weight": 1}, eval_fraction=0.25)
    config["data"]["preference"] = {"path": "p.jsonl", "kind": "preference", "eval_fraction": 0.5}
    write(folder / "b.jsonl", [{"prompt": f"b {i}", "response": "two"} for i in range(40)])
    (folder / "my.yaml").write_text(json.dumps(config))
    answer = alignflow("validate", "my.yaml", "--kind", "sft", "--out", "out")
    assert answer.returncode == 0, answer.stderr
    report = json.loads((folder / "out" / "report.json").read_text())
    drawn = {name: source["drawn"]["sft"] for name, source in report["sources"].items()}
    have = {name: source["parts"]["train"]["sft"] for name, source in report["sources"].items()}
    assert drawn["a"] == have["a"] and abs(drawn["b"] - have["a"] / 3) < 1  # a ends first
    assert report["notes"]["held_out_elsewhere"] > 0  # `preference` may hold those prompts out
    first = answer.stdout.splitlines()
    assert first[0] == "my.yaml: data.sft: 80 rows, 80 kept, 0 quarantined"
    assert first[1].split() == ["source", "rows", "kept", "quarantined", "train", "drawn", "share", "eval"]
    assert first[2].split()[:4] == ["a", "40", "40", "0"]
    assert "next      alignflow run my.yaml --dry-run" in first
    again = alignflow("validate", "my.yaml", "--kind", "sft", "--out", "out", "--json")
    assert again.returncode == 0 and json.loads(again.stdout)["source"] == "my.yaml: data.sft"
    write(folder / "b.jsonl", [*A, *B])
    other = alignflow("validate", "my.yaml", "--kind", "sft", "--out", "out")
    assert other.returncode == 65 and "add --force to replace them" in other.stderr


def test_a_single_source_of_a_config_is_checked_too(folder: Path) -> None:
    config = raw()
    config["data"]["sft"] = {"path": "a.jsonl", "kind": "sft", "limit": 30}
    (folder / "my.yaml").write_text(json.dumps(config))
    answer = alignflow("validate", "my.yaml", "--kind", "sft", "--out", "out", "--json")
    assert answer.returncode == 0 and json.loads(answer.stdout)["rows"] == 30


def test_the_turns_that_sft_learns_are_those_of_the_config(folder: Path) -> None:
    """A row whose last answer has weight 0 has an earlier one to learn."""
    talk = [{"role": role, "content": f"{role} {turn}"} for turn in "ab" for role in ("user", "assistant")]
    rows = [{"messages": [{**talk[0], "content": f"q {i}"}, *talk[1:3], {**talk[3], "weight": 0}]} for i in range(20)]
    write(folder / "talks.jsonl", rows)
    config = raw()
    config["data"]["sft"] = {"path": "talks.jsonl", "kind": "sft"}
    for learn, kept in (("all", 20), ("last", 0)):
        config["sft"] = {"learn": learn}
        (folder / "my.yaml").write_text(json.dumps(config))
        answer = alignflow("validate", "my.yaml", "--kind", "sft", "--out", learn)
        assert answer.returncode == (0 if kept else 65), answer.stderr
        assert json.loads((folder / learn / "report.json").read_text())["kept"] == kept


def test_a_mixture_is_submitted_with_whole_paths(folder: Path) -> None:
    sources = absolute(validate(raw()))["data"]["sft"]["sources"]
    assert [source["path"] for source in sources] == [str(folder / f"{name}.jsonl") for name in "ab"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--kind", "preference"], "--kind = preference: my.yaml has no data.preference. Fix: use one of sft"),
        (["--kind", "sft", "--max-bad", "0.5"], "--max-bad = 0.5: how data is read and split stands in the config."),
        (["--kind", "sft", "--columns", "prompt=q"], "--columns = "),
        (["--kind", "sft", "--eval-fraction", "0"], "--eval-fraction = 0.0: how data is read and split stands in the"),
        (["--kind", "sft", "--learn", "all"], "Fix: write it into sft.learn"),
    ],
)
def test_options_that_a_config_says_itself(options: list[str], words: str, folder: Path) -> None:
    (folder / "my.yaml").write_text(json.dumps(raw()))
    answer = alignflow("validate", "my.yaml", "--out", "out", *options)
    assert answer.returncode == 65 and words in answer.stderr and not (folder / "out").exists()


# --- lineage ---


def test_lineage_goes_from_a_model_to_each_source_and_back(ready_home: Path, folder: Path) -> None:
    def run(stage: str, request: Request, output: str, work: Callable[[StageRun], None] = lambda run: None) -> Artifact:
        made = folder / f"made {stage}"
        made.mkdir()
        (made / "content").write_text(stage)
        with StageRun(request) as context:
            work(context)
            artifact = context.publish(output, made, model=output == "model")
            context.finish({})
        return artifact

    asks = asked(plan(validate(raw())))
    named = {one: {"path": f"{one}.jsonl"} for one in "ab"}
    data = run("validate", asks, "data", lambda context: context.params({"source": named}))
    request = Request(stage="sft", version=1, params={}, inputs={"data": data}, name="sft", pipeline_run="p")
    model = run("sft", request, "model")
    titles = [item.title for item in lineage.lineage(model.sha256).below[0].below[0].below]
    assert titles == ["source a: a.jsonl", "source b: b.jsonl"]
    forth = lineage.lineage("./b.jsonl")
    assert forth.facts["paths"] == ["b.jsonl"] and forth.below[0].title.endswith("by its input source.b")
    assert forth.below[0].below[0].title == "sft, by its input data"


def test_a_source_that_changes_while_it_is_read_is_refused(ready_home: Path, folder: Path) -> None:
    with pytest.raises(StageError) as refused, StageRun(asked(plan(validate(raw())))) as context:
        assert context.input("source.a").is_file() and context.input("source.b").is_file()
        write(folder / "b.jsonl", A)
        context.publish("data", folder / "a")
    problem = refused.value.problem
    assert (problem.kind, problem.field) == ("source_changed", "source.b")


def test_the_config_of_a_whole_run_with_mixtures(folder: Path) -> None:
    """All of its requests can be made as far as their needs are known."""
    config = PipelineConfig.model_validate(raw())
    planned = plan(config)
    assert request_for(planned.nodes["base"], config, {}).stage == "base"
    assert config.model_dump()["data"]["sft"]["sources"][0]["name"] == "a"
