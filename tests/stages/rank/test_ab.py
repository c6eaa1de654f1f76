"""`alignflow ab`: blind verdicts on two models, what they come to, and how far the judge agrees."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from schemas.commands import AbCommand
from schemas.errors import StageError
from schemas.stage import PEOPLE
from stages import compare
from stages.commands.ab import __main__ as ab
from stages.commands.ab.contest import Contest
from stages.commands.rank.session import Session
from stages.commands.rank.verdicts import Verdicts
from stages.compare import people
from stages.compare.page import render_html
from stages.engine.scoring.evaluation_record import Evaluation, without_text
from tests.stages.test_compare import Page
from tests.support.context import MemoryContext
from tests.support.evaluations import ENDPOINT, N, made

SCORES = [1.0] * 70 + [-1.0] * 30 + [0.0] * 20
"""Of dpo; SFT has 0 everywhere, so that the judge prefers dpo, then SFT, then neither."""


def saved(folder: Path, evaluation: Evaluation, answers: str) -> Path:
    folder.mkdir()
    samples = [replace(one, answer=f"{answers} {i}") for i, one in enumerate(evaluation.samples)]
    replace(evaluation, samples=samples).save(folder)
    return folder


@pytest.fixture
def command(tmp_path: Path) -> AbCommand:
    folders = {
        "first": saved(tmp_path / "dpo", made(SCORES), "yes"),
        "second": saved(tmp_path / "sft", made([0.0] * N), "no"),
    }
    values = {"model": "dpo", "other": "sft", "annotator": "anna", "terminal": True, "out": tmp_path / "out"}
    return AbCommand.model_validate(values | folders)


def prefer(contest: Contest, session: Session, prompts: dict[int, str]) -> None:
    """Judge prompts by their numbers in the evaluation: dpo, sft or tie, wherever the page shows them."""
    numbers = {contest.sides[item.id].one.prompt[0]["content"]: n for n, item in enumerate(contest.items)}
    for prompt, who in prompts.items():
        number = numbers[f"say {prompt}"]
        shown = session.order(session.items[number])
        best = shown.index({"dpo": 0, "sft": 1, "tie": 0}[who])
        session.judge(number, [[0, 1]] if who == "tie" else [[best], [1 - best]], "", 1.0)


def person(contest: Contest, file: Path, name: str) -> Session:
    return Session(contest.items, Verdicts(file), name, "pairs", 0)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (3, 5, 0.14663, 0.94726),  # as tables give it
        (0, 10, 0.0, 1 - 0.025**0.1),  # P(X = 0 | c) = (1 - c)^10 = 0.025
        (10, 10, 0.025**0.1, 1.0),
        (1, 1, 0.025, 1.0),
    ],
)
def test_the_interval_is_clopper_and_pearsons(successes: int, trials: int, low: float, high: float) -> None:
    interval = people.exact_interval(successes, trials)
    assert (interval.low, interval.high) == (pytest.approx(low, abs=1e-5), pytest.approx(high, abs=1e-5))


def test_cohens_kappa_by_hand() -> None:
    """20 both yes, 5 yes and no, 10 no and yes, 15 both no: p_o = 0.7, p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5."""
    pairs = [(1.0, 1.0)] * 20 + [(1.0, 0.0)] * 5 + [(0.0, 1.0)] * 10 + [(0.0, 0.0)] * 15
    assert people.kappa(pairs) == pytest.approx(0.4)
    assert people.kappa([(1.0, 1.0)] * 3) is None


def test_a_prompt_counts_once_by_the_majority(command: AbCommand, tmp_path: Path) -> None:
    """Anna and Ben judge; on prompt 1 they differ, which is a tie. Judge: dpo on 0 to 69, SFT on 70 to 99, then ties.

    People: dpo 0, 2, 70, 100; SFT 71; tied 1, 101. The judge agrees on 0, 2 and 71, not on 70: 3 of 4 decided by both.
    """
    contest, file = Contest(command), tmp_path / "v.jsonl"
    prefer(contest, person(contest, file, "anna"), {0: "dpo", 1: "dpo", 2: "dpo", 70: "dpo", 71: "sft", 101: "tie"})
    prefer(contest, person(contest, file, "ben"), {0: "dpo", 1: "sft", 100: "dpo"})
    result = contest.result(Verdicts(file).read("pairs"))
    assert result is not None
    assert (result.annotators, result.verdicts, result.prompts) == (2, 9, 7)
    assert (result.won, result.lost, result.tied) == (4, 1, 2) and result.rate == 0.8
    assert result.p == pytest.approx(2 * (1 + 5) / 2**5)  # P(X <= 1 of 5)
    reach = people.exact_interval(4, 5)
    assert (result.low, result.high) == (reach.low, reach.high)
    judge = result.judge
    assert judge is not None and (judge.agreed, judge.decided) == (3, 4)
    assert judge.win_rate == pytest.approx((3 + 2 * 0.5) / 7)  # of 0, 1, 2; 100 and 101 tied; 70 and 71 lost
    # observed: 0, 2, 71, 101 of 7; people 4 won, 2 tied, 1 lost; judge 3, 2, 2
    chance = (4 * 3 + 2 * 2 + 1 * 2) / 49
    assert judge.kappa == pytest.approx((4 / 7 - chance) / (1 - chance))
    assert result.alpha is not None


def test_prompts_are_asked_blind_in_one_order_and_equal_answers_are_left_out(
    command: AbCommand, tmp_path: Path
) -> None:
    other = Evaluation.load(command.second)
    same = [replace(one, answer=f"yes {i}" if i < 20 else one.answer) for i, one in enumerate(other.samples)]
    replace(other, samples=same).save(command.second)
    contest = Contest(command)
    assert (len(contest.items), contest.identical) == (100, 20)
    prompts = [item.question.prompt[0]["content"] for item in contest.items]
    assert prompts != [f"say {i}" for i in range(20, 120)] and prompts == [
        i.question.prompt[0]["content"] for i in Contest(command).items
    ]
    few = Contest(command.model_copy(update={"limit": 7}))
    assert [item.id for item in few.items] == [item.id for item in contest.items[:7]]
    session = person(contest, tmp_path / "v.jsonl", "anna")
    first = [session.order(item)[0] for item in session.items]
    assert 25 < first.count(0) < 75  # which model stands first says nothing
    assert not {"dpo", "sft"} & set(json.dumps([session.view(n) for n in range(100)]).replace('"', " ").split())


def test_who_comes_again_goes_on_and_the_result_is_written(
    command: AbCommand, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = command.model_copy(update={"limit": 3})
    monkeypatch.setattr("sys.stdin", iter_lines("1", "q"))
    assert ab.main(few) == 0
    monkeypatch.setattr("sys.stdin", iter_lines("2", "="))
    assert ab.main(few) == 0
    out = capsys.readouterr().out
    assert "3 prompts, 0 of them judged by anna" in out and "3 prompts, 1 of them judged by anna" in out
    (result,) = people.read(few.out / "results")
    assert (result.model, result.other, result.prompts, result.tied) == ("dpo", "sft", 3, 1)
    assert result.sentences[0] in out and "The judge" in out


def iter_lines(*lines: str) -> Any:
    return io.StringIO("".join(f"{line}\n" for line in lines))


def test_models_without_texts_or_of_other_conditions_are_refused(command: AbCommand) -> None:
    other = Evaluation.load(command.second)
    replace(other, settings=other.settings | {"seed": 5}).save(command.second)
    with pytest.raises(StageError, match="seed = 0, sft with 5"):
        Contest(command)
    replace(other, samples=list(map(without_text, other.samples))).save(command.second)
    with pytest.raises(StageError, match=r"holds no answers\. Fix: evaluate with log_text: true"):
        Contest(command)
    Evaluation.load(command.first).save(command.second)
    with pytest.raises(StageError, match="the same answer to every prompt"):
        Contest(command)


def test_a_judge_that_compares_is_not_asked_again(tmp_path: Path) -> None:
    folders = {
        name: saved(tmp_path / name, made([value] * N, ENDPOINT), name) for name, value in (("dpo", 1.0), ("kto", -1.0))
    }
    folders["sft"] = saved(tmp_path / "sft", made([0.0] * N, ENDPOINT), "no")
    base = {"annotator": "anna", "out": tmp_path / "out"}
    for pair, verdicts in ((("dpo", "sft"), {1.0}), (("sft", "kto"), {1.0}), (("dpo", "kto"), {None})):
        values = base | {"model": pair[0], "other": pair[1], "first": folders[pair[0]], "second": folders[pair[1]]}
        assert {side.judge for side in Contest(AbCommand.model_validate(values)).sides.values()} == verdicts


def result(**changes: Any) -> people.People:
    judge = people.Agreement(agreed=3, decided=4, low=0.19, high=0.99, kappa=0.25, win_rate=0.6)
    values = {"model": "dpo", "other": "sft", "evaluations": ("a", "b"), "annotators": 2, "verdicts": 9, "prompts": 7}
    values |= {"won": 4, "lost": 1, "tied": 2, "low": 0.28, "high": 0.99, "p": 0.375, "judge": judge}
    return people.People.model_validate(values | changes)


def test_the_report_shows_peoples_verdict_beside_the_judges(tmp_path: Path) -> None:
    folders = {"dpo": saved(tmp_path / "dpo", made(SCORES), "yes"), "sft": saved(tmp_path / "s", made([0.0] * N), "no")}
    (tmp_path / "said").mkdir()
    people.write(result(), tmp_path / "said" / "dpo-sft.json")
    people.write(result(model="gone"), tmp_path / "said" / "gone-sft.json")
    run = MemoryContext(tmp_path, {}, folders | {PEOPLE: tmp_path / "said"}, stage="compare")
    compare.run(run)
    page = Page((run.published["comparison"] / "report.html").read_text()).text
    for shown in ("dpo against sft", "80 % [28, 99]", "75 % [19, 99]", "0.25", "60 %"):
        assert shown in page
    assert "gone" not in page
    written = json.loads((run.published["comparison"] / "comparison.json").read_text())
    assert [one["won"] for one in written["people"]] == [4] and any("People (2 people)" in n for n in written["notes"])
    (tmp_path / "said" / "dpo-sft.json").write_text("{}")
    with pytest.raises(StageError, match="not a result of `alignflow ab`"):
        people.read(tmp_path / "said")


def test_without_people_the_report_says_how_to_ask_them() -> None:
    page = Page(render_html(compare.compare({"sft": made([0.0] * N), "dpo": made(SCORES)}))).text
    assert "alignflow ab" in page and "What people say" not in page


def test_nothing_decided_has_no_share_but_all_of_them() -> None:
    counts = people.counted([0.0, 0.0], ["a", "b"])
    assert (counts["low"], counts["high"], counts["p"]) == (0.0, 1.0, 1.0)
    assert math.isclose(result(won=0, lost=0).rate, 0.5) and "nothing is decided" in result(won=0, lost=0).sentences[0]
