"""The benchmark's own plumbing, on our side alone: the peer's environment is no part of these tests."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench import work
from tests.bench.__main__ import FLOORS, line, parse
from tests.bench.pipeline import covered
from tests.bench.sides import ours
from tests.bench.work import Work
from tests.support import models

TINY = Work(
    method="dpo",
    folder="",
    model="",
    reward="",
    batch_size=4,
    steps=4,
    learning_rate=1e-3,
    precision="fp32",
    max_length=64,
    tokens=256,
    answer_length=4,
    ppo_epochs=1,
    threads=1,
)


def pairs(n: int) -> list[dict[str, object]]:
    return models.rows(n, *models.PAIRS)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kto", "ppo"])
def test_our_side_takes_turns(method: str, tmp_path: Path) -> None:
    model = models.model_folder(tmp_path / "model")
    reward = work.with_score_head(model, tmp_path / "reward")
    plan = replace(TINY, method=method, folder=str(tmp_path / "work"), model=str(model), reward=str(reward))
    work.lay_out(plan, pairs(plan.rows))
    worker = ours(plan)
    try:
        set_up, first, second = worker.turn(), worker.turn(), worker.turn()
    finally:
        worker.end()
    assert set_up["reference"] > 0 if method == "kto" else set_up["reference"] == 0
    assert first["loss"] != second["loss"] and first["memory"] > 50
    assert {"trunk, forward", "trunk, backward", "optimizer"} <= first["sections"].keys()
    assert sum(first["sections"].values()) <= first["seconds"]


def test_the_peer_gets_the_rows_in_our_order(tmp_path: Path) -> None:
    model = models.model_folder(tmp_path / "model")
    plan = replace(TINY, folder=str(tmp_path / "work"), model=str(model), method="kto")
    work.lay_out(plan, pairs(plan.rows))
    partner = work.mismatched(plan)
    assert sorted(partner) == sorted(partner.values()) == list(range(plan.rows))
    assert all(row != other for row, other in partner.items())


def test_stages_that_work_side_by_side_count_once() -> None:
    """1 to 4 and 3 to 6 with 4 to 5 within: five seconds; 8 to 9: one more."""
    assert covered([(3.0, 6.0), (1.0, 4.0), (8.0, 9.0), (4.0, 5.0)]) == 6.0
    assert covered([]) == 0.0


def test_a_ratio_below_its_floor_fails() -> None:
    floor, ceiling = FLOORS["sft"]
    fast = line(TINY, "sft", [1.0, 1.0, 1.0], [1.0, floor + 0.01, 9.0], 100 * ceiling, 100)
    assert fast["ratio"] == floor + 0.01 and fast["passed"]
    assert not line(TINY, "sft", [1.0], [floor - 0.01], 1.0, 100.0)["passed"]
    assert not line(TINY, "sft", [1.0], [9.0], 100 * ceiling + 1, 100.0)["passed"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "dpo,dqo"], "argument --only: 'dqo' is none of sft, reward"),
        (["--data", "missing.jsonl"], "argument --data: 'missing.jsonl' is no file"),
        (["--skip-equal", "--skip-speed"], "leave nothing to do"),
        (["--rounds", "0"], "argument --rounds: '0' is no whole number above 0"),
        (["--batch-size", "-1"], "argument --batch-size: '-1' is no whole number above 0"),
    ],
)
def test_options_that_cannot_be(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_each_model_is_made_for_itself(tmp_path: Path) -> None:
    one, other = (models.model_folder(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "other")))
    made = [work.base_model(str(path), tmp_path / "models") for path in (one, other, one)]
    assert made[0] == made[2] != made[1]
    with pytest.raises(SystemExit, match=r"--model: model\.path = nonsense: there is no such model"):
        work.base_model("nonsense", tmp_path / "models")


def test_rows_that_are_too_few_or_too_long(tmp_path: Path) -> None:
    plan = replace(
        TINY, folder=str(tmp_path / "work"), model=str(models.model_folder(tmp_path / "model")), max_length=5
    )
    with pytest.raises(SystemExit, match="--data: dpo needs 16 rows of at most 5 tokens, and 0 of 16 are"):
        work.lay_out(plan, pairs(16))
