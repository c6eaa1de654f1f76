"""DPO: every variant of the loss against a float64 formula worked here, and the method on a real model."""

import contextlib
import math
import sqlite3
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from schemas.config import methods
from schemas.errors import StageError
from stages import align
from stages.align.dpo import DPO, dpo_loss
from stages.engine.models.saving import save_policy
from stages.engine.scoring import reference_cache
from stages.engine.training import offline
from stages.engine.training.loop import train
from tests.support import models
from tests.support.context import MemoryContext

pytestmark = pytest.mark.usefixtures("home")


def softplus(x: float) -> float:
    """-log sigmoid(-x)."""
    return math.log1p(math.exp(x))


BETA, EPS = 0.2, 0.1
FORMULAS: dict[str, Callable[[float], float]] = {
    "sigmoid": lambda h: (1 - EPS) * softplus(-BETA * h) + EPS * softplus(BETA * h),
    "robust": lambda h: ((1 - EPS) * softplus(-BETA * h) - EPS * softplus(BETA * h)) / (1 - 2 * EPS),
    "hinge": lambda h: max(0.0, 1 - BETA * h),
    "ipo_sum": lambda h: (h - 1 / (2 * BETA)) ** 2,
    "ipo_mean": lambda h: (h - 1 / (2 * BETA)) ** 2,
}


@pytest.mark.parametrize("kind", FORMULAS)
def test_loss_against_its_formula(kind: str) -> None:
    h = [-30.0, -1.5, 0.0, 2.5, 7.0, 40.0]
    loss = dpo_loss(torch.tensor(h, dtype=torch.float64), BETA, kind, EPS)
    assert loss.tolist() == pytest.approx([FORMULAS[kind](x) for x in h], abs=1e-12)


def test_plain_loss_is_log_2_at_the_start_and_stays_finite_far_out() -> None:
    h = torch.tensor([0.0, 1e4, -1e4], dtype=torch.float64)
    assert dpo_loss(h, 0.1).tolist() == pytest.approx([math.log(2), 0.0, 1e3], abs=1e-12)


def test_gradient_is_the_papers() -> None:
    chosen, rejected = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (-4.0, -3.0))
    h = (chosen + 5.0) - (rejected + 4.5)
    dpo_loss(h, BETA).backward()
    # -beta sigmoid(r_rejected - r_chosen) (grad log pi(chosen) - grad log pi(rejected)), r = beta log pi/pi_ref
    weight = BETA / (1 + math.exp(BETA * ((-4.0 + 5.0) - (-3.0 + 4.5))))
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(-weight, abs=1e-12)
    assert rejected.grad.item() == pytest.approx(weight, abs=1e-12)


def test_robust_loss_is_unbiased_under_flipped_labels() -> None:
    """E over a label flipped with probability eps of the robust loss is the plain loss on the true label."""
    h = torch.tensor([-2.0, 0.3, 5.0], dtype=torch.float64)
    expected = (1 - EPS) * dpo_loss(h, BETA, "robust", EPS) + EPS * dpo_loss(-h, BETA, "robust", EPS)
    torch.testing.assert_close(expected, dpo_loss(h, BETA))


@pytest.mark.parametrize("base", ["bf16", "nf4"])
def test_under_adapters_the_reference_is_the_policys_own_base(tmp_path: Path, base: str) -> None:
    """To the bit: the reference's log-probs come from the very weights that the policy begins with."""
    config = methods.DPO.model_validate({"lora": {"rank": 2, "base": base}, "batch_size": 1, "epochs": 2})
    data = models.data_folder(tmp_path / "data", preference=models.rows(1, *models.PAIRS))
    run = MemoryContext(tmp_path / "work", config, {"model": models.model_folder(tmp_path / "model"), "data": data})
    train(DPO(config, run), run)
    assert run.steps("train/margin")[0] == 0.0 != run.steps("train/margin")[1]


@pytest.mark.parametrize("loss", ["ipo_sum", "ipo_mean", "hinge"])
def test_smoothing_that_a_loss_does_not_have_is_refused(loss: Any) -> None:
    with pytest.raises(ValidationError, match=f"label_smoothing = 0.2 changes nothing with loss {loss}"):
        methods.DPO(loss=loss, label_smoothing=0.2)
    methods.DPO(loss=loss)


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        dpo_loss(torch.zeros(1), 0.1, "nonsense")


# --- the method on a real model ---


def config(**changes: Any) -> methods.DPO:
    return methods.DPO(**{"batch_size": 4, "learning_rate": 1e-2, "beta": BETA, **changes})


def make(
    folder: Path, training: methods.DPO, rows: Any = None, seed: int = 0, **more: Any
) -> tuple[DPO, MemoryContext]:
    model = models.model_folder(folder / "model")
    data = models.data_folder(folder / "data", preference=rows or models.rows(8, *models.PAIRS), **more)
    run = MemoryContext(folder / "work", training, {"model": model, "data": data}, seed=seed)
    return DPO(training, run), run


@pytest.mark.parametrize("lora", [None, models.LORA])
@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_first_loss_is_log_2(tmp_path: Path, layout: str, lora: Any) -> None:
    method, _ = make(tmp_path, config(layout=layout, lora=lora))
    loss, metrics = models.one_step(method)
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    assert float(metrics["train/margin"]) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("lora", [None, models.LORA])
def test_step_against_float64_log_probs(tmp_path: Path, kind: str, lora: Any) -> None:
    """Policy moved away from the reference: loss and metrics of a step in pieces, from plain transformers' numbers."""
    smoothing = EPS if kind in methods.SMOOTHED else 0.0
    pieces = config(loss=kind, label_smoothing=smoothing, tokens_per_micro_batch=24, batch_size=6, lora=lora)
    method, run = make(tmp_path, pieces)
    models.perturb(method.model)
    save_policy(method.policy, method.codec, tmp_path / "moved")
    micros = next(method.batches(0))
    assert len(micros) > 1
    losses, right, chosen, margins = [], [], [], []
    for tree in [method.trees[row] for micro in micros for row in micro.rows]:
        policy, reference = models.logps(tmp_path / "moved", tree), models.logps(run.input("model"), tree)
        reduce = fmean if kind == "ipo_mean" else sum
        ratios = [reduce(p) - reduce(r) for p, r in zip(policy, reference, strict=True)]
        losses.append(FORMULAS[kind](ratios[0] - ratios[1]))
        margins.append(BETA * (ratios[0] - ratios[1]))  # implicit reward of the chosen less that of the rejected answer
        right.append(ratios[0] > ratios[1])
        chosen.append(sum(policy[0]))
    loss, metrics = models.one_step(method)
    assert loss == pytest.approx(fmean(losses), rel=1e-3)
    assert float(metrics["train/accuracy"]) == pytest.approx(fmean(right))
    assert float(metrics["train/chosen_logp"]) == pytest.approx(fmean(chosen), rel=1e-4)
    assert abs(fmean(margins)) > 1e-3 and float(metrics["train/margin"]) == pytest.approx(fmean(margins), abs=1e-4)


def test_reference_is_computed_once_for_data_and_model(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = make(tmp_path, config())
    with contextlib.closing(sqlite3.connect(home / "cache" / "reference.sqlite")) as database:
        assert database.execute("SELECT count(*) FROM logps").fetchone() == (2 * 8,)
    computed = []
    real = reference_cache.over_trees

    def counted(policy: Any, values: Any, trees: Any, *more: Any) -> Any:
        computed.extend(trees)
        return real(policy, values, trees, *more)

    monkeypatch.setattr(reference_cache, "over_trees", counted)
    second, _ = make(tmp_path, config(beta=1.0, epochs=2), seed=1)
    assert second.reference == first.reference and computed == []


def test_lora_trains_adapters_alone_and_keeps_the_reference(tmp_path: Path) -> None:
    method, run = make(tmp_path, config(lora=models.LORA, epochs=10))
    before = models.logps(run.input("model"), method.trees[0])
    train(method, run)
    assert all("lora" in name for name, p in method.policy.named_parameters() if p.requires_grad)
    with method.policy.reference():
        after = method.per_answer(method.logps, method.trees[:1])[0]
    assert after == pytest.approx([sum(answer) for answer in before], abs=1e-4)


@pytest.mark.parametrize("lora", [None, models.LORA])
def test_stage_learns_the_preferences(tmp_path: Path, lora: Any) -> None:
    rows = models.rows(24, *models.PAIRS)
    _, run = make(tmp_path, config(epochs=8, lora=lora), rows[:18], eval_preference=rows[18:])
    metrics = align.run(run)
    assert run.steps("train/loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["train/loss"] < 0.5
    assert metrics["train/accuracy"] > 0.9
    assert len(run.steps("train/rejected_logp")) == 36

    # The published model against the reference, in float64, on the held-out chosen answers.
    held_out = DPO(method_config(run), run).test
    both = [(models.logps(run.published["model"], tree), models.logps(run.input("model"), tree)) for tree in held_out]
    gains = [[sum(now) - sum(before) for now, before in zip(*answers, strict=True)] for answers in both]
    assert metrics["eval/chosen_logp_change"] == pytest.approx(fmean(chosen for chosen, _ in gains), abs=1e-3)
    assert metrics["eval/accuracy"] == fmean(chosen > rejected for chosen, rejected in gains)


def method_config(run: MemoryContext) -> methods.DPO:
    return methods.DPO.model_validate(run.request.params)


@pytest.mark.parametrize(("bound", "level"), [(0.0, "WARNING"), (1e6, "INFO")])
def test_a_fall_of_the_chosen_log_prob_is_said_and_a_large_one_warned_of(
    bound: float, level: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "LARGE_FALL", bound)
    caplog.set_level("INFO", logger="alignflow")  # whose INFO a stage shows
    method, run = make(tmp_path, config(), eval_preference=models.rows(4, *models.PAIRS))
    assert method.finish(run.work / "model")["eval/chosen_logp_change"] == pytest.approx(0.0, abs=1e-5)
    caplog.clear()
    models.perturb(method.model, scale=1.0)
    change = method.finish(run.work / "model")["eval/chosen_logp_change"]
    assert change < 0
    [record] = [record for record in caplog.records if record.module == "offline" and record.name == "alignflow"]
    per_token = -change / fmean(len(tree.answers[0]) for tree in method.test)
    assert f"fell by {-change:.2f} nats on average ({per_token:.2f} per token)" in record.getMessage()
    assert record.levelname == level


def test_without_held_out_pairs_no_change_is_reported(tmp_path: Path) -> None:
    method, run = make(tmp_path, config())
    assert method.finish(run.work / "model") == {}


def test_data_without_pairs_is_refused(tmp_path: Path) -> None:
    model = models.model_folder(tmp_path / "model")
    data = models.data_folder(tmp_path / "data", feedback=models.rows(4, *models.THUMBS))
    run = MemoryContext(tmp_path / "work", config(), {"model": model, "data": data})
    with pytest.raises(StageError, match=r"no rows of kind `preference`.*only: feedback") as stopped:
        align.run(run)
    assert stopped.value.problem.field == "data.preference"
