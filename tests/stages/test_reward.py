"""The reward model: the ranking loss by hand, ties, margins, held-out numbers, and the scores' scale."""

import json
import logging
import math
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from schemas.config import RewardConfig
from schemas.errors import StageError
from stages import reward
from stages.engine.data.codec import Codec
from stages.engine.data.order import order
from stages.engine.data.trees import Tree
from stages.engine.models.loading import load_policy, load_scorer
from stages.engine.models.lora import base_of
from stages.engine.sampling import sample, seed_of
from tests.support import models
from tests.support.context import MemoryContext

pytestmark = pytest.mark.usefixtures("home")


def softplus(x: float) -> float:
    """-log sigmoid(-x)."""
    return math.log1p(math.exp(x))


def config(**changes: Any) -> RewardConfig:
    return RewardConfig(**{"batch_size": 4, "learning_rate": 3e-3, **changes})


def make(
    folder: Path, training: RewardConfig, rows: list[dict[str, Any]], seed: int = 0, **more: Any
) -> tuple[reward.Reward, MemoryContext]:
    model = models.model_folder(folder / "model")
    data = models.data_folder(folder / "data", ranking=rows, **more)
    run = MemoryContext(folder / "work", training, {"model": model, "data": data}, stage="reward", seed=seed)
    return reward.Reward(training, run), run


def ranking(number: int, responses: list[str], pairs: list[tuple[int, int]], margins: Any = None) -> dict[str, Any]:
    winners, losers = [w for w, _ in pairs], [loser for _, loser in pairs]
    prompt = f"{models.WORDS[number]} red"
    return models.row(number, prompt, responses=responses, winners=winners, losers=losers, margins=margins)


def head(method: reward.Reward) -> nn.Linear:
    score = method.scorer.plain.score
    assert isinstance(score, nn.Linear)
    return score


def scores(method: reward.Reward, row: int) -> list[float]:
    """A row's scores, as `scores_of`."""
    return scores_of(method, method.trees[row])


def scores_of(method: reward.Reward, tree: Tree) -> list[float]:
    """Scores by plain transformers in float64, one sequence at a time: the score head at the last token."""
    plain = method.scorer.plain.double().eval()
    found = []
    for answer in tree.answers:
        with torch.no_grad():
            hidden_1TD = plain.base_model(input_ids=torch.tensor([[*tree.prompt, *answer]])).last_hidden_state
            found.append(float(head(method)(hidden_1TD[0, -1])))
    plain.float()
    return found


def test_loss_is_the_pairwise_formula() -> None:
    difference = torch.tensor([-40.0, -1.0, 0.0, 2.0], dtype=torch.float64)
    margin = torch.tensor([0.0, 0.5, 0.0, 3.0], dtype=torch.float64)
    expected = [softplus(40.0), softplus(1.5), math.log(2), softplus(1.0)]
    assert reward.reward_loss(difference, margin).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_a_ranking_weighs_its_comparisons_by_their_number_and_reads_each_answer_once(
    tmp_path: Path, layout: str
) -> None:
    rows = [
        ranking(0, ["yes good", "no", "bad bad two", "blue"], [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]),
        ranking(1, ["no", "yes one"], [(1, 0)]),
        ranking(2, ["good", "green", "bad"], [(0, 2), (1, 2)]),  # the first two are tied
    ]
    method, _ = make(tmp_path, config(batch_size=3, layout=layout), rows)
    expected, right, margins = [], [], []
    for row, example in enumerate(method.examples):
        s, pairs = scores(method, row), list(zip(example.row["winners"], example.row["losers"], strict=True))
        expected.append(sum(softplus(s[loser] - s[winner]) for winner, loser in pairs) / len(pairs))
        right.append(sum(s[winner] > s[loser] for winner, loser in pairs) / len(pairs))
        margins.append(sum(s[winner] - s[loser] for winner, loser in pairs) / len(pairs))
    loss, metrics = models.one_step(method)
    assert loss == pytest.approx(fmean(expected), rel=1e-5)
    assert fmean(right) != 0.5 and float(metrics["train/accuracy"]) == pytest.approx(fmean(right))
    assert fmean(margins) != 0 and float(metrics["train/margin"]) == pytest.approx(fmean(margins), rel=1e-3)
    assert sum(micro.batch.answers for micro in next(method.batches(0))) == 4 + 2 + 3


def test_two_answers_are_the_pairwise_loss(tmp_path: Path) -> None:
    rows = [ranking(i, ["yes good", "bad two bad"], [(0, 1)]) for i in range(4)]
    method, _ = make(tmp_path, config(), rows)
    pairwise = []
    for row in range(4):
        chosen, rejected = scores(method, row)
        pairwise.append(softplus(rejected - chosen))
    assert models.one_step(method)[0] == pytest.approx(fmean(pairwise), rel=1e-5)


def test_margins_are_taken_off_where_asked_for_and_given(tmp_path: Path) -> None:
    rows = [
        ranking(0, ["yes", "no", "bad"], [(0, 1), (0, 2)], [0.5, None]),
        ranking(1, ["yes", "no"], [(0, 1)]),
    ]
    method, _ = make(tmp_path, config(batch_size=2, margin=True), rows)
    (a, b, c), (d, e) = scores(method, 0), scores(method, 1)
    expected = ((softplus(b - a + 0.5) + softplus(c - a)) / 2 + softplus(e - d)) / 2
    assert models.one_step(method)[0] == pytest.approx(expected, rel=1e-5)


def test_margins_of_wide_scores_are_scaled_to_three(tmp_path: Path) -> None:
    """Differences of 50 and 25 become 3 and 1.5: the loss stays a sigmoid. Up to 3 they are taken as they are."""
    rows = [ranking(0, ["yes", "no"], [(0, 1)], [50.0]), ranking(1, ["yes", "no"], [(0, 1)], [25.0])]
    method, _ = make(tmp_path, config(batch_size=2, margin=True), rows)
    (a, b), (c, d) = scores(method, 0), scores(method, 1)
    assert models.one_step(method)[0] == pytest.approx((softplus(b - a + 3.0) + softplus(d - c + 1.5)) / 2, rel=1e-5)
    assert reward.margin_scale([{"margins": [3.0, None]}, {"margins": None}]) == 1.0


def test_margins_that_no_row_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="no row has a margin") as stopped:
        make(tmp_path, config(margin=True), models.rows(3, *models.RANKINGS))
    assert stopped.value.problem.field == "reward.margin"


def test_rows_of_ties_alone_are_left_out(tmp_path: Path) -> None:
    tied = {"responses": ["yes", "no"], "winners": [], "losers": [], "margins": None}
    method, _ = make(tmp_path, config(), models.rows(6, *models.RANKINGS, tied))
    assert [example.row["row"] for example in method.examples] == [0, 1, 2, 4, 5]
    with pytest.raises(StageError, match="holds no rows of kind `ranking`"):
        make(tmp_path, config(), models.rows(3, tied))


def test_gold_rows_are_another_part_of_the_data(tmp_path: Path) -> None:
    rows = models.rows(6, *models.RANKINGS)
    method, _ = make(tmp_path, config(rows="gold"), rows[:2], gold_ranking=rows[2:])
    assert [example.row["row"] for example in method.examples] == [2, 3, 4, 5]
    with pytest.raises(StageError, match="gold_fraction"):
        make(tmp_path / "other", config(rows="gold"), rows)


def test_the_fresh_head_is_a_function_of_the_seed(tmp_path: Path) -> None:
    heads: list[Tensor] = []
    for seed in (0, 0, 1):
        method, _ = make(tmp_path, config(), models.rows(3, *models.RANKINGS), seed)
        heads.append(head(method).weight.detach().clone())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_calibration_by_hand() -> None:
    # sigmoid(log 3) = 3/4 falls into bin [.75, .8) of ten over [.5, 1]: 2 of 3 right there; 0 is a tie, half right.
    differences = [math.log(3.001), math.log(3.001), -math.log(3.001), 0.0]
    assert reward.calibration_error(differences) == pytest.approx((3 * (3.001 / 4.001) - 2) / 4, abs=1e-9)
    assert reward.calibration_error([50.0, 60.0]) == pytest.approx(0.0, abs=1e-9)
    assert reward.calibration_error([-50.0]) == pytest.approx(1.0, abs=1e-9)


def test_held_out_accuracy_counts_comparisons_with_ties_as_half(tmp_path: Path) -> None:
    held_out = [
        ranking(0, ["yes good", "no", "bad bad two"], [(0, 1), (0, 2), (1, 2)]),
        ranking(1, ["yes", "yes"], [(0, 1)]),  # equal answers get equal scores
        ranking(2, ["yes", "no"], []),
    ]
    method, _ = make(tmp_path, config(), held_out, eval_ranking=held_out)
    a, b, c = scores(method, 0)
    metrics = method.held_out_metrics()
    assert metrics["eval/accuracy"] == pytest.approx(((a > b) + (a > c) + (b > c) + 0.5) / 4)
    assert metrics["eval/pairs"] == 4
    assert metrics["eval/calibration"] == pytest.approx(reward.calibration_error([a - b, a - c, b - c, 0.0]), abs=1e-5)


@pytest.mark.parametrize("lora", [None, models.LORA])
def test_stage_learns_and_publishes_scores_of_mean_0_and_std_1(tmp_path: Path, lora: Any) -> None:
    rows = models.rows(24, *models.RANKINGS)
    training = config(epochs=12, lora=lora, learning_rate=1e-2)
    _, run = make(tmp_path, training, rows[:18], eval_ranking=rows[18:])
    metrics = reward.run(run)
    assert metrics["eval/accuracy"] > 0.8
    assert fmean(run.steps("train/loss")[-3:]) < fmean(run.steps("train/loss")[:3]) - 0.2

    folder = run.published["model"]
    scale = json.loads((folder / "config.json").read_text())["alignflow_score"]
    assert scale == pytest.approx({"mean": metrics["data/score_mean"], "std": metrics["data/score_std"]})
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    assert not [name for name in plain.state_dict() if "lora" in name]
    assert base_of(folder) == (run.request.inputs["model"].sha256 if lora else None)

    # The same samples scored by the published model: what PPO will see.
    again = reward.Reward(training, run)
    again.scorer = again.model = load_scorer(folder, trainable=False)
    normalised = reward.reference_scores(again)
    assert fmean(normalised) == pytest.approx(0.0, abs=1e-4)
    assert pstdev(normalised) == pytest.approx(1.0, abs=1e-4)
    assert Codec.load(folder).end_id == again.codec.end_id


def test_the_scale_is_that_of_the_reference_models_own_answers_with_one_end_each(tmp_path: Path) -> None:
    """Sampled behind the training prompts at temperature 1, as long as the longest answer; cut ones get an end too."""
    method, run = make(tmp_path, config(), models.rows(6, *models.RANKINGS))
    prompts = list(dict.fromkeys(tree.prompt for tree in method.trees))
    prompts = [prompts[i] for i in order(len(prompts), 0, epoch=0)]
    longest = max(len(answer) - 1 for tree in method.trees for answer in tree.answers)  # without the end
    codec = method.codec
    answers = sample(
        load_policy(run.input("model"), trainable=False),
        prompts,
        max_new_tokens=longest,
        temperature=1.0,
        seeds=[seed_of("reward", 0, i) for i in range(len(prompts))],
        stop_ids=codec.stop_ids,
        pad_id=codec.pad_id,
    )
    assert any(answer[-1] not in codec.stop_ids for answer in answers)
    found = reward.reference_scores(method)
    bodies = [answer[:-1] if answer[-1] in codec.stop_ids else answer for answer in answers]
    trees = [Tree(prompt, ((*body, codec.end_id),)) for prompt, body in zip(prompts, bodies, strict=True)]
    assert found == pytest.approx([scores_of(method, tree)[0] for tree in trees], abs=1e-5)


def test_a_constant_reward_model_is_not_scaled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    method, run = make(tmp_path, config(), models.rows(6, *models.RANKINGS))
    with torch.no_grad():
        head(method).weight.zero_()
    with caplog.at_level(logging.WARNING):
        assert method.finish(run.work / "model") == {"data/score_mean": 0.0, "data/score_std": 1.0}
    assert "the same score" in caplog.text
