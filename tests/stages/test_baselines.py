"""The SFT model's baselines on tiny models: whose answers they are, how far they are, and by whom they are picked."""

import math
from pathlib import Path
from typing import Any

import pytest

from schemas.config import BaselinesParams, EvaluateConfig, SentimentJudge
from schemas.errors import StageError
from stages import baselines
from stages.engine.models.loading import load_scorer
from stages.engine.models.saving import save_scorer
from stages.engine.scoring.evaluation_record import Evaluation, load_all
from stages.engine.scoring.judges import RewardJudge
from tests.stages.test_evaluate import MAX_NEW_TOKENS, N, World, exact_kls, sampled, settings
from tests.support.context import MemoryContext

DRAWS = 4


@pytest.fixture
def world(tmp_path: Path, home: Path) -> World:
    return World(tmp_path)


def made(world: World, reward: bool = True, **changes: Any) -> tuple[dict[str, float], dict[str, Evaluation]]:
    params = BaselinesParams(
        **{
            "judge": SentimentJudge(),
            "max_new_tokens": MAX_NEW_TOKENS,
            "samples_per_prompt": 1,
            "limit": None,
            "min_prompts": 2,
            "temperatures": [0.5],
            "best_of": [2, DRAWS],
            **changes,
        }
    )
    inputs = {"model": world.sft, "reference": world.sft, "data": world.data}
    if reward:
        inputs["reward"] = world.folder / "reward"
        save_scorer(load_scorer(world.sft, seed=5), world.codec, inputs["reward"])
    run = MemoryContext(world.folder / "baselines", params, inputs, "baselines")
    final = baselines.run(run)
    return final, load_all(run.published["baselines"])


def test_they_are_the_sft_models_answers_sharpened_and_the_best_rewarded_of_the_first(world: World) -> None:
    final, found = made(world)
    assert list(found) == ["T=0.5", "best of 2", "best of 4"]
    prompts, sharp = sampled(world, world.sft, temperature=0.5)
    assert [row.answer for row in found["T=0.5"].samples] == [world.codec.text(ids) for ids in sharp]
    # The distance is that of pi_T, on its own answers, from pi at temperature 1.
    kls = exact_kls(world.sft, world.sft, prompts, sharp, temperature=0.5)
    assert kls.mean() > 0.1
    assert final["baselines/T0.5/kl_to_reference"] == pytest.approx(kls.mean(), abs=1e-4)

    plain = [[world.codec.text(ids) for ids in sampled(world, world.sft, draw=k)[1]] for k in range(DRAWS)]
    conversations = [row["prompt"] for row in world.rows]
    scorer = RewardJudge(world.folder / "reward")
    scores = [scorer.score(conversations, texts) for texts in plain]
    for n in (2, DRAWS):
        best = [max(range(n), key=lambda k, i=i: scores[k][i]) for i in range(N)]
        samples = found[f"best of {n}"].samples
        assert [row.answer for row in samples] == [plain[k][i] for i, k in enumerate(best)]
        assert [row.sft_answer for row in samples] == plain[0]  # judged against the SFT model's first answer
        assert final[f"baselines/best_of_{n}/kl_to_reference"] == pytest.approx(math.log(n) - (n - 1) / n)
    assert any(best)  # the first is not always the best, so that the lines above say something
    won = [(row.score > row.sft_score) + 0.5 * (row.score == row.sft_score) for row in found["T=0.5"].samples]
    assert final["baselines/T0.5/win_rate_vs_sft"] == sum(won) / N


def test_several_draws_meet_the_same_draw_of_the_sft_model(world: World) -> None:
    _, found = made(world, samples_per_prompt=2, best_of=[])
    samples = found["T=0.5"].samples
    assert [row.draw for row in samples] == [0, 1] * N and found["T=0.5"].temperatures == [0.5]
    for draw in (0, 1):
        for temperature, field in ((0.5, "answer"), (1.0, "sft_answer")):
            answers = [
                world.codec.text(ids) for ids in sampled(world, world.sft, temperature=temperature, draw=draw)[1]
            ]
            assert [getattr(row, field) for row in samples if row.draw == draw] == answers


def test_without_a_reward_model_nothing_is_picked(world: World, caplog: pytest.LogCaptureFixture) -> None:
    _, found = made(world, reward=False)
    assert list(found) == ["T=0.5"] and "no reward model to pick by" in caplog.text


def test_the_bound_of_the_best_of_n() -> None:
    """KL of the best of n where all answers differ in reward: the chosen one's rank has density n u^(n - 1)."""
    for n in (1, 2, 16):
        steps = [(i + 0.5) / 100_000 for i in range(100_000)]
        exact = sum(n * u ** (n - 1) * math.log(n * u ** (n - 1)) for u in steps) / len(steps)
        assert baselines.best_of_kl(n) == pytest.approx(exact, abs=1e-3)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="several evaluations"):
        load_all(tmp_path)


def test_they_are_sorted_from_near_to_far_and_each_is_there_once() -> None:
    config = EvaluateConfig.model_validate({"baselines": {"temperatures": [0.3, 0.9], "best_of": [8, 2]}}).baselines
    assert config and (config.temperatures, config.best_of) == ([0.9, 0.3], [2, 8])
    for wrong in ({"temperatures": [0.3, 0.3]}, {"temperatures": [1.0]}, {"best_of": [1]}, {"best_of": [2, 2]}):
        with pytest.raises(ValueError, match=r"temperatures|best_of"):
            EvaluateConfig.model_validate({"baselines": wrong})
    assert settings(baselines=None).baselines is None
