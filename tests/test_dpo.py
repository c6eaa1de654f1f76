"""DPO: every variant of the loss against a float64 formula worked here, and the method on a real model."""

import math
from collections.abc import Callable

import pytest
import torch

from stages.align.dpo import dpo_loss


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


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        dpo_loss(torch.zeros(1), 0.1, "nonsense")
