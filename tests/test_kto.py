"""KTO: the loss and its reference point against formulas worked here, and the method on a real model."""

import math

import pytest
import torch

from stages.align.kto import class_weights, kto_loss, reference_point


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
