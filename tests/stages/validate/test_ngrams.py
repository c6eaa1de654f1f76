"""Near-duplicates and overlap with the evaluation, by sequences of words."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from pydantic import ValidationError

from schemas.config.data import ValidateParams
from stages.validate.checks.ngrams import ngrams
from tests.stages.validate.test_validate import checked, write
from tests.support.models import given

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
WORDS += ["eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen"]


def grams(*texts: str, n: int = 3) -> list[set[int]]:
    frame = ngrams(pl.DataFrame({"row": range(len(texts)), "text": list(texts)}), n)
    return [set(frame.filter(pl.col("row") == row)["gram"]) for row in range(len(texts))]


def test_a_gram_is_n_words_in_order() -> None:
    """Six words have four sequences of three; case and marks make no others; rows do not run into each other."""
    six, same, turned, short, twice = grams(
        "one two three four five six", "One, two: THREE! four five (six)", "three two one", "one two", "a b c a b c"
    )
    assert len(six) == 4 and same == six and not turned & six and not short
    assert len(twice) == 3
    single = [set(pairwise(text.split())) for text in ("a b a b a", "b a b")]
    assert [len(g) for g in grams("a b a b a", "b a b", n=2)] == [len(pairs) for pairs in single]
    assert len(grams("a a a b", n=3)[0]) == 2


def test_scripts_without_spaces_count_by_characters() -> None:
    """Eight characters have six sequences of three; where two of them become another one, two of the six are left."""
    whole, changed, mixed, nothing = grams("猫は静かに眠った", "猫は静と眠った", "see 猫は静", "")
    assert (len(whole), len(changed & whole), len(mixed), nothing) == (6, 2, 2, set())


def prompts(*texts: str) -> list[dict[str, str]]:
    return [{"prompt": text, "response": f"answer {i}"} for i, text in enumerate(texts)]


def test_near_duplicates_are_counted(tmp_path: Path) -> None:
    """Of 14 sequences of 3 words, a changed word at the end costs 1 and in the middle 3; 5 of 14 gone are too many."""
    whole = " ".join(WORDS)
    end = " ".join([*WORDS[:-1], "last"])  # 13 of 14 = .93
    middle = " ".join([*WORDS[:7], "other", *WORDS[8:]])  # 11 of 14 = .79
    longer = f"{whole} and"  # 14 of 15 = .93
    other = "completely different words are here to see what is found in this text today"
    rows = prompts(whole, end, middle, longer, other, whole.upper() + "!")
    report = checked(write(tmp_path / "a.jsonl", rows), tmp_path / "out", ngrams=3, eval_fraction=0)
    assert report.noted == {"near_duplicate": [1, 3]}  # the last is the same prompt
    assert checked(tmp_path / "a.jsonl", tmp_path / "out", eval_fraction=0).notes == {}


def test_overlap_with_the_evaluation_is_counted(tmp_path: Path) -> None:
    """Thirteen words in a row of a prompt that is evaluated, in a prompt or an answer; twelve are too few."""
    asked = " ".join(WORDS)
    checked(write(tmp_path / "e.jsonl", [{"prompt": asked}]), tmp_path / "e", "prompt", eval_fraction=1)
    rows = prompts(
        f"Repeat: {' '.join(WORDS[2:15])}.", f"Recite: {' '.join(WORDS[2:14])}.", "Count!", "Count on!", "Stop!"
    )
    rows[2]["response"] = f"Well, {' '.join(WORDS[:13]).title()}"
    rows[3]["response"] = " ".join(reversed(WORDS))
    more: dict[str, Any] = {"evaluation": tmp_path / "e", "eval_fraction": 0}
    report = checked(write(tmp_path / "a.jsonl", rows), tmp_path / "out", ngrams=13, **more)
    assert report.noted == {"overlaps_evaluation": [0, 2]} and report.kept == 5


def test_overlap_with_the_own_held_out_prompts_is_counted(tmp_path: Path) -> None:
    """Rows on the evaluation's side are not counted themselves."""
    rows = prompts(*(f"number {i} asks whether all of these words are the same in each of the rows" for i in range(40)))
    report = checked(write(tmp_path / "a.jsonl", rows), tmp_path / "out", ngrams=8, eval_fraction=0.5)
    train = given(tmp_path / "out", "train", "sft")["row"]
    assert 10 < len(train) < 30 and report.notes["overlaps_evaluation"] == len(train)


@pytest.mark.parametrize("n", [0, 1, 51])
def test_other_lengths_are_refused(n: int) -> None:
    with pytest.raises(ValidationError, match="ngrams"):
        ValidateParams(path="a.jsonl", kind="sft", ngrams=n)
