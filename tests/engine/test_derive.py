"""Derived kinds: what each row becomes, worked out by hand, and that the result is clean by its own kind's model."""

from pathlib import Path
from typing import Any, cast

import polars as pl
import pytest

from schemas.config.data import DERIVES, Kind
from schemas.rows.models import problems
from stages.engine.tables import kinds, table
from stages.engine.tables.derive import derive
from stages.validate import parts
from stages.validate.forms.formats import parse, to_frame
from stages.validate.parts import write


def derived(kind: Kind, *rows: dict[str, Any]) -> dict[Kind, pl.DataFrame]:
    """All kinds from raw rows, as `DERIVES` promises them to plans and estimates; each frame is clean."""
    frame = to_frame(kind, range(len(rows)), [parse(kind, row) for row in rows])
    if kind == "feedback":  # to_frame leaves labels as they are given, and the rows here have true and false
        frame = frame.with_columns(label=pl.col("label") == "true")
    made: dict[Kind, pl.DataFrame] = {name: make() for name, make in derive(kind, frame).items()}
    assert set(made) == set(DERIVES[kind])
    for name, frame in made.items():
        assert problems(name, frame).height == 0
        most = DERIVES[kind][name]
        assert most is None or frame.height <= most * len(rows)
    return made


def stored(folder: Path, kind: Kind, *rows: dict[str, Any]) -> Path:
    """A data folder as `validate` writes it: rows of their own kind, all to train on."""
    frame = to_frame(kind, range(len(rows)), [parse(kind, row) for row in rows])
    folder.mkdir()
    write(kind, frame.with_columns(part=pl.lit("train")), folder)
    assert [file.name for file in folder.rglob("*.parquet")] == [f"{kind}.parquet"]
    return folder


RANKED = (
    {"prompt": "p", "responses": ["a", "b", "c"], "scores": [0.5, 0, 1]},
    {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 1]},
)


def test_a_folder_gives_each_kind_as_it_is_derived(tmp_path: Path) -> None:
    """Of the two rankings one is tied: it gives its prompt, and is no ranking. One of ties alone gives no rankings."""
    folder, expected = stored(tmp_path / "data", "ranking", *RANKED), derived("ranking", *RANKED)
    for kind, frame in expected.items():
        found = table(folder, "train", kind)
        assert found is not None and found.equals(frame), kind
    assert [frame.height for frame in expected.values()] == [2, 1, 3, 2, 1]
    assert kinds(folder, "train") == set(expected) and kinds(folder, "eval") == set()
    assert table(folder, "eval", "ranking") is None
    tied = stored(tmp_path / "tied", "ranking", RANKED[1])
    assert [kind for kind in expected if table(tied, "train", kind) is not None] == ["prompt"]


def test_a_folder_with_a_table_of_every_kind_reads_the_same(tmp_path: Path) -> None:
    """As `validate` wrote them once, and mixtures are: what is written of a kind counts, and nothing is derived."""
    expected = derived("ranking", *RANKED)
    (tmp_path / "train").mkdir()
    for kind, frame in expected.items():
        frame.with_columns(source=pl.lit("chat")).write_parquet(tmp_path / "train" / f"{kind}.parquet")
    for kind, frame in expected.items():
        found = table(tmp_path, "train", kind)
        assert found is not None and found.drop("source").equals(frame), kind


def test_rows_are_counted_as_they_are_derived(tmp_path: Path) -> None:
    """Of pairs in one part: a shares its prompt and its better answer, and once is beaten; b and c stand alone.

    Of `a`: x beats y, x beats z, z beats x: that is a tie, so that x beats y is left: 1 up, 1 down, 1 to imitate.
    """
    pairs = [("a", "x", "y"), ("b", "x", "y"), ("a", "x", "z"), ("a", "z", "x"), ("c", "x", "y")]
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in pairs]
    frame = to_frame("preference", range(5), [parse("preference", row) for row in rows])
    sides = pl.Series("part", ["train", "eval", "train", "train", "train"])
    counts = write("preference", frame.with_columns(sides), tmp_path)
    shared = {"preference": 4, "ranking": 4, "prompt": 2, "feedback": 2 + 2, "sft": 1 + 1}
    alone = {"preference": 1, "ranking": 1, "prompt": 1, "feedback": 2, "sft": 1}
    assert counts == {"train": shared, "eval": alone, "gold": {}, "test": {}}
    for part, rows_of in counts.items():
        for kind, height in rows_of.items():
            found = table(tmp_path, part, cast(Kind, kind))
            assert found is not None and found.height == height, kind


def test_other_kinds_are_counted_as_they_are_derived(tmp_path: Path) -> None:
    """Rows that share a prompt with no other, and two that share one."""
    thumbs = [{"prompt": prompt, "completion": "x", "label": up} for prompt, up in (("a", True), ("b", False))]
    answers = [{"prompt": prompt, "response": text} for prompt, text in (("a", "x"), ("a", "y"), ("b", "x"))]
    expected: dict[Kind, tuple[list[dict[str, Any]], dict[str, int]]] = {
        "sft": (answers, {"sft": 3, "prompt": 2}),
        "prompt": ([{"prompt": "a"}, {"prompt": "b"}], {"prompt": 2}),
        "feedback": (thumbs, {"feedback": 2, "sft": 1, "prompt": 2}),
        "ranking": (list(RANKED), {"ranking": 1, "preference": 3, "feedback": 2, "sft": 1, "prompt": 2}),
    }
    for kind, (rows, heights) in expected.items():
        frame = to_frame(kind, range(len(rows)), [parse(kind, row) for row in rows])
        if kind == "feedback":
            frame = frame.with_columns(label=pl.col("label") == "true")
        counts = write(kind, frame.with_columns(part=pl.lit("train")), tmp_path)
        assert counts["train"] == heights, kind


def test_rows_keep_their_order_in_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a part is written in many pieces, and its groups end elsewhere than those."""
    monkeypatch.setattr(parts, "_AT_ONCE", 3)
    monkeypatch.setattr(parts, "_GROUP", 5)
    frame = to_frame("prompt", range(50), [parse("prompt", {"prompt": f"p{row}"}) for row in range(50)])
    pieces = pl.concat([frame[:7], frame[7:20], frame[20:]], rechunk=False)
    sides = pl.Series("part", ["eval" if row % 3 == 1 else "train" for row in range(50)])
    write("prompt", pieces.with_columns(sides), tmp_path)
    for part in ("train", "eval"):
        found = pl.read_parquet(tmp_path / part / "prompt.parquet")
        assert found.equals(frame.filter(sides == part))


def said(frame: pl.DataFrame, *columns: str) -> list[tuple]:
    return frame.select(*columns).rows()


def test_preference() -> None:
    """Two pairs of one prompt: a shared chosen answer is one thumb and one SFT row; margins stay."""
    kinds = derived(
        "preference",
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": "c", "margin": 2},
    )
    assert set(kinds) == {"preference", "ranking", "feedback", "sft", "prompt"}
    assert said(kinds["ranking"], "responses", "winners", "losers", "margins") == [
        (["a", "b"], [0], [1], None),
        (["a", "c"], [0], [1], [2.0]),
    ]
    assert said(kinds["feedback"], "row", "completion", "label") == [(0, "a", True), (0, "b", False), (0, "c", False)]
    assert said(kinds["sft"], "row", "response") == [(0, "a")]
    assert said(kinds["prompt"], "row") == [(0,)]


def test_ranking_by_scores() -> None:
    """K = 3 with one tie. Net wins: x +2, y -1, z -1."""
    kinds = derived("ranking", {"prompt": "p", "responses": ["y", "x", "z"], "scores": [1, 3, 1]})
    assert said(kinds["preference"], "chosen", "rejected", "margin") == [("x", "y", 2.0), ("x", "z", 2.0)]
    assert said(kinds["feedback"], "completion", "label") == [("y", False), ("x", True), ("z", False)]
    assert said(kinds["sft"], "response") == [("x",)]


def test_middle_answers_get_no_thumb() -> None:
    """Of a full order of 3, the middle one won once and lost once."""
    kinds = derived("ranking", {"prompt": "p", "responses": ["a", "b", "c"], "order": [1, 0, 2]})
    assert said(kinds["preference"], "chosen", "rejected", "margin") == [
        ("b", "a", None),
        ("a", "c", None),
        ("b", "c", None),
    ]
    assert said(kinds["feedback"], "completion", "label") == [("b", True), ("c", False)]
    assert said(kinds["sft"], "response") == [("b",)]


def test_of_equally_good_answers_the_first_is_imitated() -> None:
    """Net wins: b 1, c 1, a -2."""
    votes = [{"a": 1, "b": 0, "winner": 1}, {"a": 2, "b": 0, "winner": 2}]
    kinds = derived("ranking", {"prompt": "p", "responses": ["a", "b", "c"], "comparisons": votes})
    assert said(kinds["sft"], "response") == [("b",)]


def test_mixed_margins_and_sources() -> None:
    """Rows with margins stand beside rows without; a tied row gives its prompt and nothing else."""
    kinds = derived(
        "ranking",
        {"prompt": "p", "responses": ["a", "b"], "scores": [0.5, 0]},
        {"prompt": "q", "responses": ["a", "b"], "comparisons": [{"a": 0, "b": 1, "winner": 1}]},
        {"prompt": "r", "responses": ["a", "b"], "ranks": [1, 1]},
    )
    assert said(kinds["preference"], "row", "chosen", "margin") == [(0, "a", 0.5), (1, "b", None)]
    assert said(kinds["prompt"], "row") == [(0,), (1,), (2,)]
    assert said(kinds["ranking"], "row") == [(0,), (1,)]


def test_ranking_of_two_equals_its_pair() -> None:
    """From a pair to a ranking and back is the pair."""
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 1.5}
    ranking = derived("preference", pair)["ranking"]
    assert derive("ranking", ranking)["preference"]().equals(derived("preference", pair)["preference"])


def test_feedback_and_sft() -> None:
    """Thumbs up are worth imitating; an SFT row gives its prompt, once."""
    rows = [{"prompt": "p", "completion": c, "label": up} for c, up in (("a", True), ("b", False), ("c", True))]
    kinds = derived("feedback", *rows)
    assert set(kinds) == {"feedback", "sft", "prompt"}
    assert said(kinds["sft"], "response") == [("a",), ("c",)]
    kinds = derived(
        "sft", {"prompt": "p", "response": "a"}, {"prompt": "p", "response": "b"}, {"prompt": "P", "response": "a"}
    )
    assert set(kinds) == {"sft", "prompt"}
    assert said(kinds["prompt"], "row") == [(0,), (2,)]
    assert set(derived("prompt", {"prompt": "p"})) == {"prompt"}


@pytest.mark.parametrize("kind", ["sft", "preference", "ranking", "feedback", "prompt"])
def test_nothing_gives_nothing(kind: Kind) -> None:
    """Frames without rows pass through."""
    kinds = derived(kind)
    assert all(frame.height == 0 for frame in kinds.values())
