"""Rows of one prompt that speak of the same answers: thumbs and SFT answers come from all of them, contradictions are
counted, and of several verdicts in one row that of people counts."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.engine.test_derive import derived, said
from tests.stages.validate.test_split import talk
from tests.stages.validate.test_validate import checked, quarantine, write
from tests.support.models import given


def pair(chosen: str, rejected: str, prompt: str = "p", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def thumbs(kinds: dict[Any, pl.DataFrame]) -> list[tuple]:
    return said(kinds["feedback"], "completion", "label")


ORDER = ["a", "b", "c", "d"]
SIX = [pair(ORDER[i], ORDER[j]) for i, j in [(2, 3), (0, 3), (1, 2), (0, 1), (1, 3), (0, 2)]]


def test_pairs_of_a_ranking_are_what_the_ranking_is() -> None:
    """Net wins of four answers in order: 3, 1, -1, -3; the pairs themselves stay."""
    kinds = derived("preference", *SIX)
    ranking = derived("ranking", {"prompt": "p", "responses": ORDER, "order": [0, 1, 2, 3]})
    expected = [("a", True), ("b", True), ("c", False), ("d", False)]
    assert sorted(thumbs(kinds)) == sorted(thumbs(ranking)) == expected
    assert said(kinds["sft"], "response") == said(ranking["sft"], "response") == [("a",)]
    assert kinds["preference"].height == kinds["ranking"].height == 6


def test_the_middle_of_three_is_neither_liked_nor_disliked() -> None:
    """Space around an answer makes no other answer."""
    kinds = derived("preference", pair("best", "middle"), pair("middle ", "worst"), pair("other", "one", "q"))
    assert said(kinds["feedback"], "row", "completion", "label") == [
        (0, "best", True),
        (0, "worst", False),
        (2, "other", True),
        (2, "one", False),
    ]
    assert said(kinds["sft"], "row", "response") == [(0, "best"), (2, "other")]


def test_rows_without_a_common_answer_stay_apart() -> None:
    """Neither rows of one prompt that share no answer, nor of prompts that differ in marks alone, are compared."""
    kinds = derived("preference", pair("a", "b"), pair("c", "d"), pair("a", "b", "2+2"), pair("b", "a", "2-2"))
    assert said(kinds["sft"], "row", "response") == [(0, "a"), (1, "c"), (2, "a"), (3, "b")]
    assert kinds["feedback"].height == 8


def test_answers_are_joined_over_others() -> None:
    """The second and third row have nothing in common but what the first shares with each: a 2, d 0, b -1, c -1."""
    kinds = derived("preference", pair("a", "b"), pair("d", "c"), pair("a", "d"))
    assert sorted(thumbs(kinds)) == [("a", True), ("b", False), ("c", False)]
    assert said(kinds["sft"], "response") == [("a",)]


def test_a_pair_goes_by_the_majority_of_its_rows() -> None:
    """Two say a, one says b; of c and d each is said once, so that nothing comes of them."""
    rows = [pair("a", "b", margin=1), pair("b", "a"), pair("a", "b"), pair("c", "d", "q"), pair("d", "c", "q")]
    kinds = derived("preference", *rows)
    assert thumbs(kinds) == [("a", True), ("b", False)]
    assert said(kinds["sft"], "response") == [("a",)]
    assert kinds["prompt"].height == 2


def test_rankings_of_one_prompt_are_joined_too() -> None:
    """b beats a and c beats b; b is in the middle of them, though each row has a best answer."""
    rows = [{"prompt": "p", "responses": ["a", "b"], "order": [1, 0]}]
    rows += [{"prompt": "p", "responses": ["b", "c"], "scores": [0, 1]}]
    kinds = derived("ranking", *rows)
    assert sorted(thumbs(kinds)) == [("a", False), ("c", True)]
    assert said(kinds["sft"], "response") == [("c",)]
    assert kinds["preference"].height == 2


def test_thumbs_both_up_and_down() -> None:
    """More ups are imitated, as many downs are not; the thumbs themselves stay."""
    said_of = [("a", True), ("a ", True), ("a", False), ("b", True), ("b", False), ("c", True)]
    rows = [{"prompt": "p", "completion": answer, "label": label} for answer, label in said_of]
    kinds = derived("feedback", *rows)
    assert thumbs(kinds) == said_of
    assert said(kinds["sft"], "row", "response") == [(0, "a"), (1, "a "), (5, "c")]


@pytest.mark.parametrize(
    ("kind", "rows", "notes"),
    [
        ("preference", [pair("a", "b"), pair("b ", "a"), pair("a", "c")], {"contradictory": [0, 1]}),
        ("preference", [pair("a", "b"), pair("b", "c"), pair("c", "a"), pair("d", "e")], {"cycle": [0, 1, 2]}),
        ("preference", SIX, {}),
        ("preference", [pair("a", "b"), pair("b", "a", "P")], {}),
        (
            "feedback",
            [{"prompt": "p", "completion": a, "label": n} for a, n in [("a", 1), ("b", 1), ("a", 0), ("b ", 1)]],
            {"look_alike": [3], "contradictory": [0, 2]},
        ),
        (
            "ranking",
            [{"prompt": "p", "responses": ["a", "b", c], "ranks": r} for c, r in [("c", [1, 2, 3]), ("d", [2, 1, 3])]],
            {"contradictory": [0, 1]},
        ),
    ],
)
def test_contradictions_are_noted(tmp_path: Path, kind: Any, rows: list[Any], notes: dict[str, list[int]]) -> None:
    report = checked(write(tmp_path / "a.jsonl", rows), tmp_path / "out", kind, eval_fraction=0)
    assert report.kept == len(rows)
    assert report.noted == notes
    assert report.notes == {name: len(numbers) for name, numbers in notes.items()}


def test_nothing_is_learned_from_a_circle(tmp_path: Path) -> None:
    """Each answer has won once and lost once: as pairs and as one ranking."""
    rows = [pair("a", "b"), pair("b", "c"), pair("c", "a")]
    assert derived("preference", *rows)["sft"].height == derived("preference", *rows)["feedback"].height == 0
    comparisons = [{"a": i, "b": (i + 1) % 3, "winner": i} for i in range(3)]
    kinds = derived("ranking", {"prompt": "p", "responses": ["a", "b", "c"], "comparisons": comparisons})
    assert kinds["sft"].height == kinds["feedback"].height == 0 and kinds["preference"].height == 3


@pytest.mark.parametrize(
    ("verdicts", "expected", "margin", "notes"),
    [
        ({"order": [1, 0], "scores": [0.9, 0.1]}, ("b", "a"), None, {"scores_overruled": 1}),
        ({"order": [0, 1], "scores": [0.75, 0.25]}, ("a", "b"), 0.5, {}),
        ({"ranks": [2, 1], "scores": [0, 0]}, ("b", "a"), None, {"scores_overruled": 1}),
        ({"comparisons": [{"a": 0, "b": 1, "winner": 1}], "scores": [3, 1]}, ("b", "a"), None, {"scores_overruled": 1}),
        ({"order": [], "scores": [3, 1]}, ("a", "b"), 2.0, {}),
        ({"order": [1, 0], "ranks": [2, 1]}, ("b", "a"), None, {}),
    ],
)
def test_of_several_verdicts_that_of_people_counts(
    tmp_path: Path, verdicts: dict[str, Any], expected: tuple[str, str], margin: float | None, notes: dict[str, int]
) -> None:
    row = {"prompt": "p", "responses": ["a", "b"], **verdicts}
    report = checked(write(tmp_path / "a.jsonl", [row]), tmp_path / "out", "ranking", eval_fraction=0)
    assert report.notes == notes
    pairs = given(tmp_path / "out", "train", "preference")
    assert said(pairs, "chosen", "rejected", "margin") == [(*expected, margin)]


def test_verdicts_of_people_that_differ_put_the_row_aside(tmp_path: Path) -> None:
    """Of two columns that people fill in nobody knows which one counts."""
    rows = [
        {"prompt": "p", "responses": ["a", "b"], "order": [1, 0], "ranks": [1, 2]},
        {"prompt": "p", "responses": ["a", "b"], "order": [1, 0], "comparisons": [{"a": 0, "b": 1, "winner": 0}]},
        {"prompt": "p", "responses": ["a", "b"], "order": [1, 0], "comparisons": [{"a": 0, "b": 1, "winner": 1}]},
    ]
    report = checked(write(tmp_path / "a.jsonl", rows), tmp_path / "out", "ranking", max_bad=1)
    assert report.checks == {"ranks: verdicts_differ": 1, "comparisons: verdicts_differ": 1}
    assert [entry["row"] for entry in quarantine(tmp_path / "out")] == [0, 1]


def test_first_turns_held_out_under_another_system_message_are_noted(tmp_path: Path) -> None:
    """Deeper turns go with their beginning and are not noted; nor are first turns that are on one side anyway."""
    rows = []
    for i in range(40):
        rows.append({"prompt": talk(f"Topic {i}"), "response": "r"})
        rows.append({"prompt": talk(f"topic {i}!", "So.", "And?"), "response": "r"})
        rows.append({"prompt": talk(f"Topic {i}", system="Be brief."), "response": "r"})
    file = write(tmp_path / "a.jsonl", rows)
    report = checked(file, tmp_path / "out", eval_fraction=0.5)
    sides: dict[str, set[int]] = {part: set(given(tmp_path / "out", part, "sft")["row"]) for part in ("train", "eval")}
    first = [row // 3 for row in sides["eval"]]
    expected = sorted(row for row in sides["train"] if row // 3 in first)
    assert 10 < len(expected) < 60 and report.notes == {"shared_first_turn": len(expected)}
    assert report.noted["shared_first_turn"] == expected[:20]
    assert "shared_first_turn" not in checked(file, tmp_path / "out", eval_fraction=0).notes
