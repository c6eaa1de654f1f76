"""Moments in 8 bits: what they take, that training learns as with whole ones, and what never becomes 0."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from schemas.config.training import Training
from stages.engine.training import optimizers
from stages.engine.training.optimizers import optimizer_for


def trained(
    optimizer: str, steps: int = 30, scale: Callable[[Tensor], Tensor] = lambda g: g
) -> tuple[nn.Module, torch.optim.Optimizer, list[float]]:
    """A least-squares fit of 96 x 70 weights with a bias, its gradients scaled; losses of all steps."""
    torch.manual_seed(0)
    model, rows_NI = nn.Linear(70, 96), torch.randn(64, 70)
    target_NO = rows_NI @ torch.randn(70, 96) * 0.1
    training = Training.model_validate({"optimizer": optimizer, "learning_rate": 0.02, "weight_decay": 0.01})
    chosen, losses = optimizer_for({"model": list(model.parameters())}, training), []
    for _ in range(steps):
        loss = (model(rows_NI) - target_NO).square().mean()
        loss.backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad = scale(parameter.grad)
        chosen.step()
        chosen.zero_grad()
        losses.append(loss.item())
    return model, chosen, losses


def test_moments_in_8_bits_learn_as_whole_ones_do() -> None:
    (model, optimizer, losses), (whole, _, expected) = trained("adamw8bit"), trained("adamw")
    assert losses[-1] < 0.1 * losses[0] and losses == pytest.approx(expected, rel=0.02)
    torch.testing.assert_close(model.state_dict(), whole.state_dict(), rtol=0, atol=0.02)
    matrix, bias = (optimizer.state[parameter] for parameter in model.parameters())
    # A row of 70 numbers is one block: two codes a weight, two scales a row.
    assert sum(value.nbytes for value in matrix.values()) == 2 * 96 * 70 + 2 * 4 * 96 + 4
    assert sum(value.nbytes for value in bias.values()) == 2 * 4 * 96 + 4


def test_an_update_by_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _, _ = trained("adamw8bit", 5)
    monkeypatch.setattr(optimizers, "PIECE", 70 * 7)  # seven rows
    pieces, _, _ = trained("adamw8bit", 5)
    for one, other in zip(whole.parameters(), pieces.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_gradient_far_below_its_blocks_largest_moves_its_weight_no_farther() -> None:
    """Adam's steps are about as long as the learning rate, however small the gradient; divided by a moment that was
    rounded to 0 they would be as long as gradient / eps."""
    far = torch.ones(96, 70)
    far[:, 1:] = 3e-9

    def scale(gradient: Tensor) -> Tensor:
        return gradient.sign() * far if gradient.ndim == 2 else gradient

    before, _, _ = trained("adamw8bit", 0)
    after, _, _ = trained("adamw8bit", 2, scale)
    moved = (next(after.parameters()) - next(before.parameters())).detach().abs()
    assert moved.max() < 2 * 0.02 * 1.1
