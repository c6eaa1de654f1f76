"""Split and leaks: conversations that begin alike are on one side, in all data, and in no two parts."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from pydantic import ValidationError

from schemas.config.data import ValidateParams
from stages.engine.tables import PARTS
from tests.stages.validate.test_validate import ROWS, checked, quarantine, refused, write
from tests.support.models import given


def talk(first: str, *later: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation: an optional system message, then user and assistant in turn."""
    said = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate([first, *later])]
    return [*([] if system is None else [{"role": "system", "content": system}]), *said]


def test_a_conversation_is_on_one_side_with_what_it_begins(tmp_path: Path) -> None:
    """By the first user turn with the system message; case and marks make no other beginning, another system does."""
    rows = []
    for i in range(60):
        first = {"prompt": talk(f"Topic {i}"), "response": f"So {i}."}
        later = {"prompt": talk(f"topic {i}!", f"So {i}.", "And then?"), "response": "Then this."}
        rows += [first, later, {"prompt": talk(f"Topic {i}", system=f"Mind {i}."), "response": "Minding."}]
    fractions: dict[str, Any] = {"eval_fraction": 0.3, "gold_fraction": 0.3, "test_fraction": 0.2}
    checked(write(tmp_path / "a.jsonl", rows), tmp_path / "out", **fractions)
    part_of = {row: part for part in PARTS for row in given(tmp_path / "out", part, "sft")["row"]}
    assert len(part_of) == 180 and set(part_of.values()) == set(PARTS)
    assert all(part_of[i] == part_of[i + 1] for i in range(0, 180, 3))
    assert any(part_of[i] != part_of[i + 2] for i in range(0, 180, 3))


def test_no_held_out_conversation_of_a_real_set_begins_like_a_trained_one(shared: Path, tmp_path: Path) -> None:
    """Neither by its first turn, nor with the prompt and answer of a row that is trained on."""
    file = shared / "data" / "hh_harmless_pairs.jsonl.gz"
    checked(file, tmp_path / "out", "preference", eval_fraction=0.12, gold_fraction=0.4, max_length=4096)
    trained = pl.concat(given(tmp_path / "out", part, "preference") for part in ("train", "gold"))
    first = {row["prompt"][0]["content"] for row in trained.iter_rows(named=True)}
    said = {
        "\n".join([*(turn["content"] for turn in row["prompt"]), row[answer]])
        for row in trained.iter_rows(named=True)
        for answer in ("chosen", "rejected")
    }
    held_out = given(tmp_path / "out", "eval", "preference")["prompt"].to_list()
    several = [prompt for prompt in held_out if len(prompt) > 1]
    assert len(several) > 100
    assert not any(prompt[0]["content"] in first for prompt in held_out)
    turns = [
        ["\n".join(turn["content"] for turn in prompt[:n]) for n in range(2, len(prompt), 2)] for prompt in several
    ]
    assert not any(text in said for texts in turns for text in texts)


def test_prompts_that_other_data_holds_out_are_not_trained_on(tmp_path: Path) -> None:
    """Between the own share and the largest of all data; noted, and in no part."""
    file = write(tmp_path / "a.jsonl", [{"prompt": f"question {i}", "response": "a"} for i in range(200)])
    others: dict[str, Any] = {"others_eval_fraction": 0.3, "others_test_fraction": 0.2}
    report = checked(file, tmp_path / "out", eval_fraction=0.1, gold_fraction=0.5, **others)
    draws = {
        part: [int(c[:8], 16) / 2**32 for c in given(tmp_path / "out", part, "sft")["cluster"]] for part in PARTS[:3]
    }
    assert max(draws["eval"]) < 0.1
    # The gold model's half is of what is not held out: the next .45.
    assert max(draws["gold"]) < 0.1 + 0.5 * (1 - 0.1) <= min(draws["train"])
    assert all(0.3 <= draw < 0.8 for part in ("train", "gold") for draw in draws[part])
    assert report.notes == {"held_out_elsewhere": 200 - sum(map(len, draws.values()))}
    assert report.notes["held_out_elsewhere"] > 40


def test_the_gold_part_is_a_share_of_what_can_be_trained_on(tmp_path: Path) -> None:
    """Also where other data holds out more than this and its gold part together: draws in [.6, .6 + .4 x .4)."""
    file = write(tmp_path / "a.jsonl", [{"prompt": f"question {i}", "response": "a"} for i in range(200)])
    checked(file, tmp_path / "out", eval_fraction=0.1, gold_fraction=0.4, others_eval_fraction=0.6)
    gold, train = (
        [int(c[:8], 16) / 2**32 for c in given(tmp_path / "out", part, "sft")["cluster"]] for part in ("gold", "train")
    )
    assert gold and train and min(gold) >= 0.6 and max(gold) < 0.76 <= min(train)


def test_the_test_part_is_asked_for_too(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", ROWS)
    said, _ = refused(file, tmp_path / "out", eval_fraction=0.2, test_fraction=0.2, min_test_prompts=20)
    assert "of 20 prompts are in the test part" in said and "raise test_fraction" in said
    with pytest.raises(ValidationError, match="more than all prompts"):
        ValidateParams(path=str(file), kind="sft", eval_fraction=0.9, test_fraction=0.2)


@pytest.mark.parametrize("fractions", [{"eval_fraction": 1.0}, {"eval_fraction": 0.05, "test_fraction": 0.95}])
def test_no_row_is_trained_on_that_begins_like_a_prompt_of_the_evaluation(
    tmp_path: Path, fractions: dict[str, Any]
) -> None:
    """Nor like one of its test part; also where it only looks alike, and where the conversation goes on."""
    asked = write(tmp_path / "e.jsonl", [{"prompt": "Question 3?"}, {"prompt": "something else"}])
    checked(asked, tmp_path / "asked", "prompt", **fractions)
    rows = [*ROWS, {"prompt": talk("question 3", "So.", "Why?"), "response": "Because."}]
    file = write(tmp_path / "a.jsonl", rows)
    report = checked(file, tmp_path / "out", eval_fraction=0, gold_fraction=0.5, evaluation=tmp_path / "asked")
    assert report.reasons == {"leaks_into_evaluation": 2}
    assert [entry["row"] for entry in quarantine(tmp_path / "out")] == [3, 20]
    # The gold judge's rows are no exception.
    report = checked(file, tmp_path / "gold", eval_fraction=0, gold_fraction=0.999, evaluation=tmp_path / "asked")
    assert len(given(tmp_path / "gold", "gold", "sft")) == 19 and report.reasons == {"leaks_into_evaluation": 2}
