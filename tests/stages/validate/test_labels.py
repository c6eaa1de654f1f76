"""What label columns mean, told by all their values; each reading by the answers that come out on top."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from schemas.config.data import Kind, ValidateParams
from schemas.errors import StageError
from stages.validate import check
from stages.validate.context import Context
from stages.validate.quarantine import Report
from tests.support.models import given


def run(
    labels: list[Any], folder: Path, kind: Kind = "feedback", names: dict[str, str] | None = None, **more: Any
) -> tuple[Report, list[Any]]:
    """The report, and per kept row its thumb, or the letter of the better answer."""
    columns = names or {}
    label, a, b = (columns.get(name, name) for name in ("label", "a", "b"))
    answers = {"completion": "A"} if kind == "feedback" else {a: "A", b: "B"}
    rows = [{"prompt": f"question {i}", **answers, label: value} for i, value in enumerate(labels)]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    params = ValidateParams(path=str(file), kind=kind, eval_fraction=0, columns=columns, **more)
    report = check(Context(params), folder / "out")
    frame = given(folder / "out", "train", kind).sort("row")
    return report, frame["label" if kind == "feedback" else "chosen"].to_list()


def refusal(labels: list[Any], folder: Path, kind: Kind = "feedback", **more: Any) -> str:
    with pytest.raises(StageError) as caught:
        run(labels, folder, kind, **more)
    assert caught.value.problem.kind == "unknown_labels"
    assert not list((folder / "out").rglob("*.parquet"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([1, 0, 1], [True, False, True]),
        (["1.0", "0.0"], [True, False]),
        ([1.0, 0.0], [True, False]),
        ([True, False, "thumbs_down"], [True, False, False]),
        (["TRUE", "0", "1"], [True, False, True]),
        (["Thumbs up", "thumbs_down"], [True, False]),
        (["desirable", "undesirable"], [True, False]),
        (["chosen", "rejected"], [True, False]),
        ([1, -1], [True, False]),
        (["\U0001f44d", "\U0001f44e", " no "], [True, False, False]),
    ],
)
def test_thumbs(labels: list[Any], expected: list[bool], tmp_path: Path) -> None:
    assert run(labels, tmp_path)[1] == expected


def test_votes_with_a_neutral_one(tmp_path: Path) -> None:
    """Between -1 and 1, 0 is neither."""
    report, thumbs = run([-1, 0, 1], tmp_path)
    assert (report.reasons, thumbs) == ({"skipped": 1}, [False, True])


@pytest.mark.parametrize(
    "labels",
    [
        [1, 2, 3, 4, 5],
        [0, 1, 1, 0, 1, 0, 0, 1, 2],
        ["1", "5"],
        [-3, 2, 1],
        [0.2, 0.9],
        [1, 2],
        ["good", 1, 0],
        ["fine", "poor"],
        ["a", "b"],
    ],
)
def test_other_scales_are_refused_whole(labels: list[Any], tmp_path: Path) -> None:
    """Whatever share of bad rows is allowed: the rows that would stay are not those that are right."""
    told = refusal(labels, tmp_path, max_bad=0.1)
    assert "1 and 0, true and false" in told and "--label-map" in told and "max_bad" not in told
    if not any(isinstance(label, str) and not label.isdigit() for label in labels):
        assert "--label-map" in refusal(labels, tmp_path, max_bad=1.0)


def test_the_values_found_are_named_with_their_counts(tmp_path: Path) -> None:
    told = refusal([5, 5, 1, 3], tmp_path, names={"label": "stars"})
    assert told.startswith("label = 1 (1), 3 (1), 5 (2): column `stars` holds a scale")
    assert (
        "--label-map 1=... --label-map 3=... --label-map 5=... (config: `label_map: {1: ..., 3: ..., 5: ...}`)" in told
    )


def test_a_few_words_that_are_no_labels_are_put_aside(tmp_path: Path) -> None:
    report, thumbs = run(["yes", "no"] * 10 + ["maybe"], tmp_path)
    assert (report.reasons, len(thumbs)) == ({"not_a_label": 1}, 20)


def test_a_map_says_what_labels_mean(tmp_path: Path) -> None:
    """Single values go before bounds; what is to be skipped is no bad row."""
    by = {"<=2": "down", "3": "skip", ">=4": "up"}
    report, thumbs = run([1, 2, 3, 4, "5.0"], tmp_path, label_map=by)
    assert (thumbs, report.reasons) == ([False, False, True, True], {"skipped": 1})
    assert run([1, 4], tmp_path, label_map={">=0": "up", "4": "down"})[1] == [True, False]
    told = refusal([1, 2, 3], tmp_path, label_map={"1": "down", "3": "up"})
    assert told.startswith("label = 2 (1): ") and "--label-map 2=..." in told
    assert run([True, False], tmp_path, "preference", label_map={"true": "a", "false": "b"})[1] == ["A", "B"]


def test_the_example_of_a_refusal_works(tmp_path: Path) -> None:
    """Of many values bounds are proposed, and what is proposed can be given as it stands."""
    scores = [i / 20 for i in range(20)]
    told = refusal(scores, tmp_path)
    proposed = shlex.split(told.split("such as ")[1].split(" (config")[0])
    label_map = dict(pair.rsplit("=", 1) for pair in proposed[1::2])
    assert proposed[::2] == ["--label-map", "--label-map"]
    assert run(scores, tmp_path, label_map=label_map)[1] == [score >= 0.5 for score in scores]


@pytest.mark.parametrize(
    ("label_map", "kind", "words"),
    [
        ({"1": "good"}, "feedback", "up, down, skip"),
        ({"1": "up"}, "preference", "a, b, tie, skip"),
        ({">=x": "up"}, "feedback", "not a bound"),
        ({"1": "up"}, "ranking", "kind ranking has no labels"),
        ({"": "skip", "1": "up"}, "feedback", "not a label"),
        ({"1": "up", "1.0": "down"}, "feedback", "label 1 is given twice, as up and as down"),
        ({"Good": "up", "good ": "down"}, "feedback", "label good is given twice, as up and as down"),
    ],
)
def test_maps_that_say_nothing(label_map: dict[str, str], kind: Kind, words: str, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=words):
        run([1, 0], tmp_path, kind, label_map=label_map)


def test_maps_in_yaml() -> None:
    """YAML reads 1 and true as a number and a truth value."""
    raw: dict[str, Any] = {"path": "x.csv", "kind": "feedback", "label_map": {2: "up", True: "up", -1.0: "down"}}
    assert ValidateParams.model_validate(raw).label_map == {"2": "up", "True": "up", "-1.0": "down"}


IDS = {"label": "better_response_id", "a": "response_0", "b": "response_1"}


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["a", "B", "tie"], {}, ["A", "B"]),
        ([1, 2, "2"], {}, ["A", "B", "B"]),
        (["model_b", "model_a", "tie (bothbad)"], {}, ["B", "A"]),
        (["response_2", "response_1"], {}, ["B", "A"]),
        (["[[A]]", "[[B]]"], {}, ["A", "B"]),
        ([0, 1, 1], IDS, ["A", "B", "B"]),
        ([1, 1], IDS, ["B", "B"]),
        ([1, 1], {"label": "winner", "a": "answer1", "b": "answer2"}, ["A", "A"]),
        (["response_1", "response_0"], IDS, ["B", "A"]),
        ([1, 0], {"label": "choice"}, ["B", "A"]),
        (["left", "right"], {"label": "pick"}, ["A", "B"]),
    ],
)
def test_sides(labels: list[Any], names: dict[str, str], expected: list[str], tmp_path: Path) -> None:
    """0 is the first answer where the columns' names say that they are counted from 0, else numbers begin at 1."""
    assert run(labels, tmp_path, "preference", names=names)[1] == expected


@pytest.mark.parametrize(
    "labels", [[0, 1], [1, 1], [0, 1, 2], [True, False], [-2, 1, 3], ["a", 2], ["x", "y"], [1, 2, 3]]
)
def test_sides_that_could_be_either(labels: list[Any], tmp_path: Path) -> None:
    told = refusal(labels, tmp_path, "preference")
    assert "a and b" in told and "1 and 2" in told and "--label-map" in told
    assert "max_bad" not in told


def test_an_index_of_1_alone_could_be_either(tmp_path: Path) -> None:
    """It is the second answer beside 0 and the first beside 2, whatever the column is called."""
    names = {"label": "choice"}
    assert "whether the first answer is 0 or 1" in refusal([1, 1], tmp_path, "preference", names=names)
    assert run([1, 2], tmp_path, "preference", names=names)[1] == ["A", "B"]
    assert run([0, 0], tmp_path, "preference", names=names)[1] == ["A", "A"]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([1, 1], {"label": "choice"}),
        ([1, 1], {"label": "winner_idx", "a": "answer_a", "b": "answer_b"}),
        ([0, 1], {**IDS, "label": "response_0_better"}),
        ([0, 1], {**IDS, "label": "is_0_better"}),
        ([0, 1], {**IDS, "label": "first_better"}),
        ([0, 1], {**IDS, "label": "worse_response_id"}),
        ([0, 1], {"label": "rejected_idx"}),
        (["a", "b"], {"label": "loser"}),
    ],
)
def test_sides_that_their_column_may_turn_around(labels: list[Any], names: dict[str, str], tmp_path: Path) -> None:
    """1 alone may be the first answer, or yes; and the worse answer is named by other columns."""
    assert "--label-map 1=..." in refusal(labels, tmp_path, "preference", names=names) or "a" in labels
    told = run([*labels, "a"], tmp_path, "preference", names=names, label_map={"0": "b", "1": "a", "a": "a", "b": "b"})
    assert told[1][-1] == "A"


@pytest.mark.parametrize("name", ["toxic", "is_bad", "isHarmful", "rejected"])
@pytest.mark.parametrize("labels", [[1, 0], [True, False], ["yes", "no"]])
def test_thumbs_that_their_column_turns_around(labels: list[Any], name: str, tmp_path: Path) -> None:
    told = refusal(labels, tmp_path, names={"label": name})
    assert f"column `{name}` has" in told and "may say the reverse" in told and "--label-map" in told
    assert run(["good", "bad"], tmp_path, names={"label": name})[1] == [True, False]
    assert run(labels, tmp_path, names={"label": f"not_{name}"})[1] == [True, False]
    told_by = {"1": "down", "0": "up", "true": "down", "false": "up", "yes": "down", "no": "up"}
    assert run(labels, tmp_path, names={"label": name}, label_map=told_by)[1] == [False, True]


def test_strengths_with_their_sign(tmp_path: Path) -> None:
    sides = run([-3, 0, 2], tmp_path, "preference", label_map={"<0": "a", "0": "tie", ">0": "b"})[1]
    assert sides == ["A", "B"]


def compared(winners: list[Any], folder: Path, **more: Any) -> list[str]:
    """The better answer of each row whose two answers were compared."""
    rows = [
        {"prompt": f"q{i}", "responses": ["A", "B"], "comparisons": [{"a": 0, "b": 1, "winner": winner}]}
        for i, winner in enumerate(winners)
    ]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    check(Context(ValidateParams(path=str(file), kind="ranking", eval_fraction=0, **more)), folder / "out")
    frame = given(folder / "out", "train", "preference").sort("row")
    return frame["chosen"].to_list()


def test_winners_of_comparisons(tmp_path: Path) -> None:
    """Words for sides and ties; where many winners are numbers of no answer, 1 is not the second answer either."""
    assert compared(["model_a", "b", "tie (bothbad)", "Tie", "second"], tmp_path) == ["A", "B", "B"]
    with pytest.raises(StageError, match=r"comparisons.winner = 2: in 2 of 4 rows it names neither"):
        compared([1, 2, 1, 2], tmp_path, max_bad=1)
    assert compared([1, 0] * 10 + [7], tmp_path) == ["B", "A"] * 10
