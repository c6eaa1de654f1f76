"""Mixtures through stage `validate`: what is read of each source, drawn, kept apart, published and told."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from flows.planning import config_file, explain
from flows.planning.plan import Planner
from schemas.commands import MixtureCommand
from schemas.config.data import Kind, MixtureParams, ValidateParams
from schemas.errors import StageError
from stages.commands.validate import main
from stages.engine.tables import PARTS
from stages.validate import check, check_mixture, run
from stages.validate.context import Context
from stages.validate.mixtures.drawing import alternate, draw
from stages.validate.mixtures.report import MixtureReport, lines
from tests.stages.validate.test_validate import quarantine, write
from tests.support.context import MemoryContext
from tests.support.models import given

ROOT = Path(__file__).parents[3]


def answers(name: str, n: int) -> list[dict[str, str]]:
    """Rows of kind `sft` with prompts of their own."""
    return [{"prompt": f"{name} question {i}", "response": f"{name} answer {i}"} for i in range(n)]


def pairs(name: str, n: int) -> list[dict[str, str]]:
    return [{"prompt": f"{name} {i}", "chosen": f"{name} good {i}", "rejected": f"{name} bad {i}"} for i in range(n)]


def params_of(folder: Path, rows: Mapping[str, Sequence[Any]], sources: dict[str, Any], **more: Any) -> MixtureParams:
    """A mixture of the rows, by the sources' names, each written to a file."""
    every = [
        {"path": str(write(folder / f"{name}.jsonl", some)), "kind": "sft", **sources.get(name, {})}
        for name, some in rows.items()
    ]
    return MixtureParams.model_validate({"sources": every, **more})


def mixed(
    folder: Path, rows: Mapping[str, Sequence[Any]], sources: dict[str, Any] | None = None, **more: Any
) -> MixtureReport:
    params = params_of(folder, rows, sources or {}, **more)
    return check_mixture(params, {one.name: Context(params.of(one)) for one in params.sources}, folder / "out")


def rows_of(folder: Path, part: str, kind: Kind = "sft") -> Counter[tuple[str, int]]:
    """(source, row) -> how often it stands in a file."""
    return Counter(given(folder / "out", part, kind).select("source", "row").iter_rows())


# --- what is drawn ---


def test_weights_draw_shares_of_the_rows_to_train_on_and_of_no_others(tmp_path: Path) -> None:
    rows = {"a": answers("a", 100), "b": answers("b", 50)}
    report = mixed(tmp_path, rows, {"a": {"weight": 1}, "b": {"weight": 1}}, eval_fraction=0.3, seed=0)
    a, b = report.sources["a"], report.sources["b"]
    have = {name: one.parts["train"]["sft"] for name, one in report.sources.items()}
    held = {name: one.parts["eval"]["sft"] for name, one in report.sources.items()}
    assert {name: have[name] + held[name] for name in have} == {"a": 100, "b": 50}
    assert (a.drawn["sft"], b.drawn["sft"]) == (have["b"], have["b"])  # b has the fewer rows, and half of all are its
    taken = rows_of(tmp_path, "train")
    assert Counter(source for source, _ in taken.elements()) == {"a": have["b"], "b": have["b"]}
    assert set(taken.values()) == {1}
    assert Counter(source for source, _ in rows_of(tmp_path, "eval").elements()) == held
    assert report.parts["train"]["sft"] == 2 * have["b"] and report.parts["eval"]["sft"] == sum(held.values())


def test_all_exhausted_takes_every_row_and_some_again(tmp_path: Path) -> None:
    rows = {"a": answers("a", 30), "b": answers("b", 8)}
    weights = {"a": {"weight": 2}, "b": {"weight": 1}}
    mixed(tmp_path, rows, weights, eval_fraction=0, stopping="all_exhausted", seed=0)
    taken = rows_of(tmp_path, "train")  # 30 / (2/3) = 45 rows, 15 of them b's: once all 8, and 7 of them again
    assert [taken["a", i] for i in range(30)] == [1] * 30
    assert sorted(taken["b", i] for i in range(8)) == [1] + [2] * 7


def test_epochs_take_every_row_so_often_and_a_part_once_more(tmp_path: Path) -> None:
    rows = {"a": answers("a", 10), "b": answers("b", 10), "c": answers("c", 10)}
    report = mixed(tmp_path, rows, {"a": {"epochs": 2.5}, "b": {"epochs": 0.5}}, eval_fraction=0, seed=0)
    taken = rows_of(tmp_path, "train")
    assert sorted(taken["a", i] for i in range(10)) == [2] * 5 + [3] * 5
    assert sorted(taken["b", i] for i in range(10)) == [0] * 5 + [1] * 5
    assert [taken["c", i] for i in range(10)] == [1] * 10
    assert {name: one.drawn["sft"] for name, one in report.sources.items()} == {"a": 25, "b": 5, "c": 10}
    assert report.metrics()["data/train/sft"] == 40


def test_another_seed_draws_other_rows_and_the_same_one_the_same(tmp_path: Path) -> None:
    rows = {"a": answers("a", 40), "b": answers("b", 10)}
    weights = {"a": {"weight": 1}, "b": {"weight": 1}}
    found = []
    for place, seed in enumerate((0, 0, 1)):
        (tmp_path / str(place)).mkdir()
        mixed(tmp_path / str(place), rows, weights, eval_fraction=0, seed=seed)
        found.append(rows_of(tmp_path / str(place), "train"))
    assert found[0] == found[1] != found[2] and found[0].total() == found[2].total() == 20


def test_of_all_derived_kinds_the_same_rows_are_drawn(tmp_path: Path) -> None:
    rows = {"a": pairs("a", 40), "b": pairs("b", 10)}
    sources = {name: {"kind": "preference", "weight": 1} for name in rows}
    report = mixed(tmp_path, rows, sources, eval_fraction=0, seed=3)
    chosen = rows_of(tmp_path, "train", "preference")
    every: dict[Kind, int] = {"ranking": 1, "sft": 1, "prompt": 1, "feedback": 2}
    for kind, each in every.items():
        assert rows_of(tmp_path, "train", kind) == Counter({key: each * n for key, n in chosen.items()}), kind
        assert report.sources["a"].drawn[kind] == 10 * each


def test_a_draw_takes_the_rows_with_the_smallest_lots() -> None:
    frame = pl.DataFrame({"source": ["a"] * 5, "row": [0, 1, 2, 3, 4]})
    least = [draw(frame, {"a": n}, 7)["row"].to_list() for n in range(1, 6)]
    assert all(set(few) < set(more) and more == sorted(more) for few, more in pairwise(least))
    assert draw(frame, {"a": 11}, 7)["row"].to_list() == [0, 1, 2, 3, 4] * 2 + least[0]
    assert draw(frame, {}, None).height == 0 and draw(frame, {"a": 5}, None).equals(frame)


def test_the_first_rows_of_a_file_are_a_fair_sample(tmp_path: Path) -> None:
    frame = pl.DataFrame({"source": ["a"] * 6 + ["b"] * 3 + ["c"], "row": [*range(6), *range(3), 0]})
    # Places (i + 1/2) / n: a 1/12, 3/12, ..., b 1/6 = 2/12, 6/12, 10/12, c 6/12; of equal ones the first source.
    shown = alternate(frame).rows()
    expected = ["a0", "b0", "a1", "a2", "b1", "c0", "a3", "a4", "b2", "a5"]
    assert [f"{source}{row}" for source, row in shown] == expected
    mixed(tmp_path, {"a": answers("a", 60), "b": answers("b", 30)}, eval_fraction=0)
    first = given(tmp_path / "out", "train", "sft")["source"].head(30).to_list()
    assert Counter(first) == {"a": 20, "b": 10}


def test_a_source_without_rows_for_its_weight_is_refused(tmp_path: Path) -> None:
    rows = {"a": answers("a", 20), "b": answers("b", 3)}
    weights = {"a": {"weight": 1}, "b": {"weight": 0.5}}
    with pytest.raises(StageError) as refused:
        mixed(tmp_path, rows, weights, eval_fraction=1.0, seed=0)
    problem = refused.value.problem
    assert (problem.field, problem.kind, problem.value) == ("sources.0.weight", "nothing_to_draw", "1.0")
    assert not list((tmp_path / "out").glob("*/*.parquet"))
    assert MixtureReport.model_validate_json((tmp_path / "out" / "report.json").read_text()).error == str(refused.value)


# --- one data set of several ---


def test_a_prompt_of_two_sources_never_leaks(tmp_path: Path) -> None:
    """b has the prompts of a, in other letters too, with answers of its own."""
    b = [{"prompt": f"A  question {i}?", "response": f"another {i}"} for i in range(200)]
    mixed(tmp_path, {"a": answers("a", 200), "b": b}, {"b": {"epochs": 2}}, eval_fraction=0.3, test_fraction=0.2)
    clusters: dict[str, set[str]] = {part: set() for part in PARTS}
    for part in ("train", "eval", "test"):
        for kind in ("sft", "prompt"):
            frame = given(tmp_path / "out", part, kind)
            assert set(frame["source"]) == {"a", "b"}
            clusters[part] |= set(frame["cluster"])
    assert all(clusters[part] for part in ("train", "eval", "test"))
    assert not clusters["train"] & (clusters["eval"] | clusters["test"]) and not clusters["eval"] & clusters["test"]


def test_rows_that_two_sources_have_stay_with_the_first_and_are_no_bad_ones(tmp_path: Path) -> None:
    a, b = answers("a", 20), answers("b", 20)
    report = mixed(tmp_path, {"a": [*a, a[3]], "b": [*a[5:15], *b]}, max_bad=0.05)
    assert report.sources["a"].reasons == {"duplicate": 1} and report.sources["b"].reasons == {"in_another_source": 10}
    assert (report.rows, report.kept, report.quarantined) == (51, 40, 11)
    entries = quarantine(tmp_path / "out")
    assert entries[0] == {
        "source": "a",
        "row": 20,
        "column": "response",
        "reason": "duplicate",
        "value": "same as row 3",
    }
    told = [(one["source"], one["row"], one["value"]) for one in entries[1:]]
    assert told == [("b", i, f"same as row {i + 5} of a") for i in range(10)]
    taken = rows_of(tmp_path, "train") + rows_of(tmp_path, "eval")
    assert taken == Counter([("a", i) for i in range(20)] + [("b", i) for i in range(10, 30)])


def test_a_source_that_earlier_ones_hold_whole_is_refused_as_that(tmp_path: Path) -> None:
    rows = answers("a", 10)
    with pytest.raises(StageError, match=r"source b: .*: the sources before it have all of its rows") as refused:
        mixed(tmp_path, {"a": rows, "b": rows[:4]}, {"a": {}, "b": {}})
    assert str(refused.value.problem.fix).startswith("take it out")


def test_bad_rows_are_counted_and_bounded_for_each_source(tmp_path: Path) -> None:
    """2 of b's 10 rows are bad, which among all 110 would be few."""
    b = [*answers("b", 8), "{", {"prompt": "b", "response": " "}]
    rows = {"a": answers("a", 100), "b": b}
    report = mixed(tmp_path, rows, max_bad=0.2)
    assert report.sources["a"].quarantined == 0 and report.sources["a"].reasons == {}
    assert report.sources["b"].reasons == {"malformed_json": 1, "empty": 1} == report.reasons
    entries = [(one["source"], one["row"], one.get("line")) for one in quarantine(tmp_path / "out")]
    assert entries == [("b", 8, 9), ("b", 9, None)]
    metrics = report.metrics()
    assert metrics["data/b/quarantined"] == 2 and metrics["data/b/quarantined_empty"] == 1
    assert metrics["data/a/kept"] == 100 and metrics["data/rows"] == 110
    with pytest.raises(StageError) as refused:
        mixed(tmp_path, rows, max_bad=0.1)
    assert str(refused.value).startswith("source b: ") and "2 of 10 rows (20.0%) are bad" in str(refused.value)


def test_each_source_lists_its_own_first_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.validate.quarantine.LISTED", 2)
    rows = {name: [*answers(name, 10), "{", "{", "{"] for name in "ab"}
    mixed(tmp_path, rows, max_bad=0.5)
    told = [(one["source"], one["row"], one["reason"]) for one in quarantine(tmp_path / "out")]
    assert sorted(told[:4]) == [(name, row, "malformed_json") for name in "ab" for row in (10, 11)]
    assert sorted(told[4:]) == [("a", None, "left_out"), ("b", None, "left_out")]


def test_contradictions_between_sources_are_seen(tmp_path: Path) -> None:
    """What a prefers b rejects: neither answer is imitated, and none has a thumb."""
    pair = {"prompt": "which", "chosen": "one", "rejected": "two"}
    turned = {"prompt": "which", "chosen": "two", "rejected": "one"}
    kinds = {name: {"kind": "preference"} for name in "ab"}
    report = mixed(tmp_path, {"a": [pair, *pairs("a", 9)], "b": [*pairs("b", 9), turned]}, kinds, eval_fraction=0)
    assert report.notes == {"contradictory": 2}
    assert (report.sources["a"].noted, report.sources["b"].noted) == ({"contradictory": [0]}, {"contradictory": [9]})
    assert rows_of(tmp_path, "train", "preference").total() == 20
    assert rows_of(tmp_path, "train", "sft") == Counter([("a", i) for i in range(1, 10)] + [("b", i) for i in range(9)])


def test_kinds_mix_and_what_is_derived_keeps_its_source(tmp_path: Path) -> None:
    """Answers, and the chosen ones of pairs; a pair whose chosen answer is a row of `told` gives it no second time."""
    told, liked = answers("told", 10), pairs("liked", 6)
    liked[2] = {"prompt": told[4]["prompt"], "chosen": told[4]["response"], "rejected": "no"}
    rows = {"told": told, "liked": liked, "more": answers("more", 5)}
    report = mixed(tmp_path, rows, {"liked": {"kind": "preference"}}, eval_fraction=0)
    assert report.kind == "sft" and report.sources["liked"].kind == "preference"
    expected = [("told", i) for i in range(10)] + [("liked", i) for i in (0, 1, 3, 4, 5)]
    assert rows_of(tmp_path, "train") == Counter(expected + [("more", i) for i in range(5)])
    assert report.sources["liked"].notes == {"given_by_another_source": 1} == report.notes
    assert report.sources["liked"].noted == {"given_by_another_source": [2]}
    frame = given(tmp_path / "out", "train", "sft").filter((pl.col("source") == "liked") & (pl.col("row") == 3))
    assert frame["response"].to_list() == ["liked good 3"]
    assert sorted(path.name for path in (tmp_path / "out" / "train").iterdir()) == ["prompt.parquet", "sft.parquet"]


def test_each_source_has_its_own_columns_labels_and_limit(tmp_path: Path) -> None:
    stars = [{"q": f"star {i}", "a": "text", "stars": 1 + i % 5} for i in range(20)]
    thumbs = [{"prompt": f"thumb {i}", "completion": "text", "label": i % 2 == 0} for i in range(20)]
    mapping = {
        "columns": {"prompt": "q", "completion": "a", "label": "stars"},
        "label_map": {"<=3": "down", ">3": "up"},
    }
    sources = {"s": {"kind": "feedback", "limit": 10, **mapping}, "t": {"kind": "feedback"}}
    report = mixed(tmp_path, {"s": stars, "t": thumbs}, sources, eval_fraction=0)
    assert [(one.rows, one.kept) for one in report.sources.values()] == [(10, 10), (20, 20)]
    frame = given(tmp_path / "out", "train", "feedback")
    ups = {name: int(some["label"].sum()) for (name,), some in frame.group_by("source")}
    assert ups == {"s": 4, "t": 10}
    assert any(what.startswith("s: `stars`: ") for what in report.read)


def test_a_source_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    params = params_of(tmp_path, {"a": answers("a", 5), "b": []}, {})
    contexts = {one.name: Context(params.of(one)) for one in params.sources}
    with pytest.raises(StageError, match=r"sources\.1\.path = .*b\.jsonl: source b: the file holds no rows"):
        check_mixture(params, contexts, tmp_path / "out")
    report = MixtureReport.model_validate_json((tmp_path / "out" / "report.json").read_text())
    assert report.sources["a"].rows == 5 and report.error


def test_the_command_names_the_source_of_a_file_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = params_of(tmp_path, {"a": answers("a", 5), "b": answers("b", 5)}, {})
    (tmp_path / "b.jsonl").unlink()
    asked = {"config": tmp_path / "mix.yaml", "slot": "sft", "out": tmp_path / "out"}
    assert main(MixtureCommand.model_validate({**params.model_dump(), **asked})) == 65
    assert re.search(
        r"refused: sources\.1\.path = .*b\.jsonl: source b: there is no such file", capsys.readouterr().err
    )


def test_too_few_held_out_prompts_are_of_all_sources(tmp_path: Path) -> None:
    rows = {"a": answers("a", 50), "b": answers("b", 50)}
    held = mixed(tmp_path, rows, eval_fraction=0.3).parts["eval"]["prompt"]
    mixed(tmp_path, rows, eval_fraction=0.3, min_eval_prompts=held)
    with pytest.raises(StageError, match=rf"a \+ b: {held} of 100 prompts are held out, too few"):
        mixed(tmp_path, rows, eval_fraction=0.3, min_eval_prompts=held + 1)


def test_a_mixture_of_one_holds_the_rows_of_the_source_alone(tmp_path: Path) -> None:
    report = mixed(tmp_path, {"a": answers("a", 50)})
    alone = check(Context(ValidateParams(path=str(tmp_path / "a.jsonl"), kind="sft")), tmp_path / "alone")
    for part in ("train", "eval"):
        for kind in ("sft", "prompt"):
            own = given(tmp_path / "out", part, kind)
            assert own.drop("source").equals(given(tmp_path / "alone", part, kind)) and set(own["source"]) == {"a"}
    assert (
        report.parts == alone.parts and report.sources["a"].sha256 == alone.sha256 and report.lengths == alone.lengths
    )
    assert "sources" not in json.loads((tmp_path / "alone" / "report.json").read_text())


# --- the stage ---


def test_the_stage_logs_each_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files come as inputs of their own: the paths of the parameters are those of another machine."""
    params = params_of(tmp_path, {"a": answers("a", 20), "b": answers("b", 10)}, {"b": {"epochs": 2}})
    files = {f"source.{one.name}": Path(one.path) for one in params.sources}
    asked = params.model_dump(mode="json")
    for one in asked["sources"]:
        one["path"] = f"/elsewhere/{one['name']}.jsonl"
    context = MemoryContext(tmp_path / "work", asked, files, stage="validate")
    logged: list[tuple[str, str, int]] = []
    told: dict[str, Any] = {}
    monkeypatch.setattr(context, "dataset", lambda name, path, digest, rows: logged.append((name, digest, rows)))
    monkeypatch.setattr(context, "params", told.update)
    metrics = run(context)
    report = MixtureReport.model_validate_json((context.published["data"] / "report.json").read_text())
    assert logged == [(name, one.sha256, one.rows) for name, one in report.sources.items()]
    assert {name: context.tags[f"data.{name}.sha256"] for name in "ab"} == {
        name: one.sha256 for name, one in report.sources.items()
    }
    assert told["source"]["b"] == {"path": "/elsewhere/b.jsonl", "kind": "sft", "weight": None, "epochs": 2.0}
    assert metrics["data/b/rows_drawn"] == 2 * metrics["data/b/rows_train"] > 0
    assert metrics["data/a/rows_drawn"] == metrics["data/a/rows_train"] == 20 - metrics["data/a/rows_eval"]
    assert metrics["data/train/sft"] == metrics["data/a/rows_drawn"] + metrics["data/b/rows_drawn"]


def test_the_lines_for_people(tmp_path: Path) -> None:
    rows = {"a": answers("a", 30), "bb": answers("b", 10)}
    report = mixed(tmp_path, rows, {"a": {"weight": 3}, "bb": {"weight": 1}}, eval_fraction=0, seed=0)
    assert lines(report) == [
        "source  rows  kept  quarantined  train  drawn   share  eval",
        "a         30    30            0     30     30  75.0 %     0",
        "bb        10    10            0     10     10  25.0 %     0",
    ]


def test_the_papers_mixture_holds_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config of schemas/README.md, on 540, 180 and 270 rows to train on, gives 540, 180 and 180."""
    text = (ROOT / "schemas" / "README.md").read_text().partition("## Mixtures")[2].partition("\n## ")[0]
    (block,) = re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    config = explain.validate(config_file.parse(block))
    write(Path("chat.jsonl"), answers("chat", 540))
    Path("math.csv").write_text("question,answer\n" + "".join(f"{i} and {i},{2 * i}\n" for i in range(180)))
    write(Path("pairs.jsonl"), pairs("pair", 270))
    write(Path("experts.jsonl"), pairs("expert", 100))
    planner = Planner(config, {})
    for slot, expected in {
        "sft": {"chat": 540, "math": 180, "preferred": 180},
        "preference": {"pairs": 270, "experts": 250},
    }.items():
        asked = planner.data_params(slot) | {"eval_fraction": 0.0}
        context = MemoryContext(tmp_path / slot, asked, {}, stage="validate")
        metrics = run(context)
        assert {name: metrics[f"data/{name}/rows_drawn"] for name in expected} == expected
        assert metrics[f"data/train/{slot}"] == sum(expected.values())
    assert "540, 180 and 180" in text and planner.data_params("preference")["eval_fraction"] == 0.2
