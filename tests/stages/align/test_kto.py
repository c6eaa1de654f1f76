"""KTO: the loss and its reference point against formulas worked here, and the method on a real model."""

import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from schemas.config import methods
from schemas.config.training import LoRA
from schemas.errors import StageError
from stages import align
from stages.align.kto import KTO, class_weights, kto_loss, partners, reference_point
from stages.engine.data.trees import Tree
from stages.engine.models.saving import save_policy
from tests.support import models
from tests.support.context import MemoryContext

pytestmark = pytest.mark.usefixtures("home")


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_loss_is_equation_8() -> None:
    beta, z0, weights = 0.3, 0.7, (1.25, 0.8)
    ratios = torch.tensor([1.5, -2.0, 1.5, -2.0], dtype=torch.float64)
    desirable = torch.tensor([True, True, False, False])
    loss = kto_loss(ratios, desirable, torch.tensor(z0, dtype=torch.float64), beta, weights)
    expected = [
        1.25 * (1 - sigmoid(beta * (1.5 - z0))),
        1.25 * (1 - sigmoid(beta * (-2.0 - z0))),
        0.8 * (1 - sigmoid(beta * (z0 - 1.5))),
        0.8 * (1 - sigmoid(beta * (z0 + 2.0))),
    ]
    assert loss.tolist() == pytest.approx(expected, abs=1e-12)


def test_gradient_is_the_papers_and_does_not_reach_the_reference_point() -> None:
    beta, z0 = 0.5, torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    ratios = torch.tensor([0.4, -0.9], dtype=torch.float64, requires_grad=True)
    kto_loss(ratios, torch.tensor([True, False]), z0, beta, (1.5, 0.5)).sum().backward()
    # d/dr of -lambda sigmoid(beta (r - z0)) is -lambda beta s (1 - s); the sign turns for an undesirable answer.
    up, down = sigmoid(beta * (0.4 - 0.2)), sigmoid(beta * (0.2 + 0.9))
    assert ratios.grad is not None
    assert ratios.grad.tolist() == pytest.approx([-1.5 * beta * up * (1 - up), 0.5 * beta * down * (1 - down)])
    assert z0.grad is None


def test_loss_at_the_start_is_half_the_weight() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    loss = kto_loss(zero, torch.tensor([True, False, True]), torch.tensor(0.0), 0.1, (1.2, 0.4))
    assert loss.tolist() == pytest.approx([0.6, 0.2, 0.6])


@pytest.mark.parametrize(("total", "count", "expected"), [(6.0, 4, 1.5), (-6.0, 4, 0.0), (0.0, 0, 0.0)])
def test_reference_point_is_the_mean_clamped_at_zero(total: float, count: int, expected: float) -> None:
    kl = torch.tensor(total, requires_grad=True)
    z0 = reference_point(kl, torch.tensor(float(count)))
    assert z0.item() == expected
    assert not z0.requires_grad


def test_weights_make_the_classes_weigh_the_same() -> None:
    up, down = class_weights(30, 10, None, None)
    assert 30 * up == pytest.approx(10 * down)
    assert (30 * up + 10 * down) / 40 == pytest.approx(1.0)
    assert class_weights(30, 10, 2.0, None) == pytest.approx((2.0, 6.0))
    assert class_weights(30, 10, None, 3.0) == pytest.approx((1.0, 3.0))
    assert class_weights(30, 10, 1.0, 4.0) == (1.0, 4.0)


@pytest.mark.parametrize("desirable", [True, False])
def test_an_empty_class_gives_no_nan(desirable: bool) -> None:
    up, down = (5, 0) if desirable else (0, 5)
    weights = class_weights(up, down, None, None)
    assert weights == (1.0, 1.0)
    ratios = torch.zeros(5, requires_grad=True)
    loss = kto_loss(ratios, torch.full((5,), desirable), torch.tensor(0.0), 0.1, weights).sum()
    loss.backward()
    assert math.isfinite(loss.item())
    assert ratios.grad is not None and torch.isfinite(ratios.grad).all()


# --- the method on a real model ---


def config(**changes: Any) -> methods.KTO:
    return methods.KTO(**{"batch_size": 6, "learning_rate": 1e-2, "beta": 0.3, **changes})


def make(
    folder: Path, training: methods.KTO, rows: Any = None, seed: int = 0, **more: Any
) -> tuple[KTO, MemoryContext]:
    model = models.model_folder(folder / "model")
    data = models.data_folder(folder / "data", feedback=rows or models.rows(12, *models.THUMBS), **more)
    run = MemoryContext(folder / "work", training, {"model": model, "data": data}, seed=seed)
    return KTO(training, run), run


@pytest.mark.parametrize(("label", "word"), [(True, "thumb up"), (False, "thumb down")])
def test_thumbs_of_one_kind_are_told(label: bool, word: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = models.rows(6, {"completion": "yes good one", "label": label})
    with caplog.at_level("WARNING", "alignflow"):
        make(tmp_path / "one", config(), rows)
        assert f"all 6 rows have a {word}: KTO learns from both kinds" in caplog.text
        caplog.clear()
        make(tmp_path / "both", config())
        assert "KTO learns from both kinds" not in caplog.text


def test_partners_have_another_prompt_whatever_the_order() -> None:
    prompts = ["a", "a", "a", "b", "a", "c", "a", "a", "b", "a"]
    for seed in range(20):
        found = partners(prompts, seed)
        assert all(prompts[row] != prompts[other] for row, other in enumerate(found))
        assert found == partners(prompts, seed)
    assert len({tuple(partners(prompts, seed)) for seed in range(20)}) > 1
    # Every answer of another prompt can be drawn.
    assert {partners(prompts, seed)[0] for seed in range(100)} == {3, 5, 8}


@pytest.mark.parametrize("n", [1, 3])
def test_a_single_prompt_is_refused(tmp_path: Path, n: int) -> None:
    rows = [models.row(i, "a b", completion="yes", label=bool(i % 2)) for i in range(n)]
    with pytest.raises(StageError, match="at least two different prompts") as stopped:
        make(tmp_path, config(), rows)
    assert stopped.value.problem.field == "data.feedback"
    assert stopped.value.problem.fix


def step_by_hand(method: KTO, run: MemoryContext, moved: Path) -> tuple[float, float, float]:
    """Loss, z0 and margin of the first step in float64, from plain transformers' log-probs."""

    def ratio(tree: Tree) -> float:
        return sum(models.logps(moved, tree)[0]) - sum(models.logps(run.input("model"), tree)[0])

    rows = [row for micro in next(method.batches(0)) for row in micro.rows]
    z0 = max(0.0, fmean(ratio(method.mismatched[row]) for row in rows))
    up, down = method.weights
    beta, losses = method.config.beta, []
    rewards: dict[bool, list[float]] = {True: [], False: []}
    for row in rows:
        r = ratio(method.trees[row])
        rewards[method.up[row]].append(beta * r)
        losses.append(up * (1 - sigmoid(beta * (r - z0))) if method.up[row] else down * (1 - sigmoid(beta * (z0 - r))))
    liked, disliked = (fmean(some) if some else 0.0 for some in (rewards[True], rewards[False]))
    return fmean(losses), z0, liked - disliked


@pytest.mark.parametrize("budget", [16, 40, 4096])
@pytest.mark.parametrize(("lora", "seed", "above"), [(None, 4, True), (None, 5, False), (models.LORA, 11, True)])
def test_step_against_float64_log_probs(tmp_path: Path, budget: int, lora: Any, seed: int, above: bool) -> None:
    """A policy moved away from the reference so that the KL estimate is above 0, or below."""
    method, run = make(tmp_path, config(tokens_per_micro_batch=budget, lora=lora))
    assert method.weights == pytest.approx((12 / (2 * 9), 12 / (2 * 3)))
    models.perturb(method.model, seed, scale=0.2)
    save_policy(method.policy, method.codec, tmp_path / "moved")
    loss, z0, margin = step_by_hand(method, run, tmp_path / "moved")
    assert (z0 > 0.5) is above
    got, metrics = models.one_step(method)
    assert got == pytest.approx(loss, rel=1e-4)
    assert float(metrics["train/z0"]) == pytest.approx(z0, rel=1e-3, abs=1e-5)
    assert abs(margin) > 1e-3 and float(metrics["train/margin"]) == pytest.approx(margin, abs=1e-4)
    raw = float(metrics["train/z0_raw"])
    assert float(metrics["train/z0_clamped"]) == (0.0 if above else 1.0)
    assert raw == pytest.approx(z0, rel=1e-3) if above else raw < 0


def test_the_reference_point_is_read_without_dropout(tmp_path: Path) -> None:
    """Adapters that do something, and a dropout that would drop half of it: twice the same number, and in between the
    model trains with dropout all the same.
    """
    method, _ = make(tmp_path, config(lora=LoRA(rank=4, dropout=0.5)))
    models.perturb(method.model, scale=0.2)
    method.model.train()
    micros = next(method.batches(0))
    first, second = (float(method.prepare(micros)["kl"]) for _ in range(2))
    assert first == second != 0
    assert method.model.training


@pytest.mark.parametrize(("raw", "told"), [(-1.0, True), (1.0, False)])
def test_a_reference_point_that_is_always_clamped_is_said(
    raw: float, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    method, run = make(tmp_path, config(), eval_feedback=models.rows(4, *models.THUMBS))
    clamped = {"train/z0_clamped": float(raw < 0)}
    for _ in range(9):
        method.after_step(clamped)
    again, _ = make(tmp_path / "again", config())
    again.load_state_dict(method.state_dict())  # as after a resume
    again.after_step({"train/z0_clamped": 0.0})  # one step in ten that is not
    again.finish(run.work / "model")
    assert ("in 9 of 10 steps" in caplog.text) is told


def test_the_fall_of_thumbs_up_answers_is_measured(tmp_path: Path) -> None:
    """Of the held-out answers those with a thumb up: here the longer ones, whose change is that of their own tokens."""
    rows = models.rows(8, {"completion": "yes good one", "label": True}, {"completion": "no", "label": False})
    method, run = make(tmp_path, config(), eval_feedback=rows)
    models.perturb(method.model, scale=0.3)
    save_policy(method.policy, method.codec, tmp_path / "moved")
    liked = method.test
    assert len(liked) == 4 and all(len(tree.answers[0]) == 4 for tree in liked)  # three words and the end
    changes = [
        sum(models.logps(tmp_path / "moved", tree)[0]) - sum(models.logps(run.input("model"), tree)[0])
        for tree in liked
    ]
    change = method.finish(run.work / "model")["eval/chosen_logp_change"]
    assert change == pytest.approx(fmean(changes), abs=1e-3)


def test_reference_point_is_taken_without_gradient_over_the_whole_step(tmp_path: Path) -> None:
    method, _ = make(tmp_path, config(tokens_per_micro_batch=16))
    models.perturb(method.model)
    micros = next(method.batches(0))
    totals = method.prepare(micros)
    assert len(micros) > 1
    assert not any(total.requires_grad for total in totals.values())
    parts = [method.prepare([micro]) for micro in micros]
    assert float(totals["kl"]) == pytest.approx(sum(float(part["kl"]) for part in parts), rel=1e-4)
    assert float(totals["rows"]) == 6 == float(totals["up"] + totals["down"])


def test_mismatched_answers_are_fixed_and_rows_shuffled_over_epochs(tmp_path: Path) -> None:
    method, _ = make(tmp_path, config(epochs=3))
    other, _ = make(tmp_path, config(epochs=1))
    assert method.mismatched == other.mismatched
    epochs = [[row for micro in micros for row in micro.rows] for micros in method.batches(0)]
    seen = [epochs[i] + epochs[i + 1] for i in (0, 2, 4)]
    assert all(sorted(rows) == list(range(12)) for rows in seen)
    assert len({tuple(rows) for rows in seen}) == 3


def test_mismatched_answers_are_cut_to_the_longest_length(tmp_path: Path) -> None:
    rows = [
        models.row(0, "a b c d e f", completion="yes", label=True),
        models.row(1, "a", completion="no bad no bad no bad", label=False),
    ]
    method, _ = make(tmp_path, config(max_length=8), rows)
    assert [len(tree.answers[0]) for tree in method.mismatched] == [8 - 6, 2]


@pytest.mark.parametrize("label", [True, False])
def test_one_class_alone_trains(tmp_path: Path, label: bool) -> None:
    rows = models.rows(8, {"completion": "yes good", "label": label})
    _, run = make(tmp_path, config(epochs=10, lora=models.LORA), rows)
    metrics = align.run(run)
    assert all(math.isfinite(value) for value in run.logged.values())
    assert metrics["train/loss"] < run.steps("train/loss")[0] == pytest.approx(0.5)


@pytest.mark.parametrize("lora", [None, models.LORA])
def test_stage_learns_from_thumbs(tmp_path: Path, lora: Any) -> None:
    thumbs = [{"completion": "yes good one", "label": True}, {"completion": "no bad", "label": False}]
    _, run = make(tmp_path, config(epochs=20, lora=lora), models.rows(12, *thumbs))
    metrics = align.run(run)
    assert metrics["train/loss"] < run.steps("train/loss")[0] - 0.1
    assert metrics["train/reward_desirable"] > 0 > metrics["train/reward_undesirable"]
    assert run.published["model"].is_dir()
