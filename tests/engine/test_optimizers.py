"""Moments in 8 bits: what they take, that training learns as with whole ones, and what never becomes 0."""

import pytest
import torch
from torch import nn

from schemas.config.training import Training
from stages.engine.training import optimizers
from stages.engine.training.optimizers import optimizer_for


def trained(optimizer: str, steps: int = 30) -> tuple[nn.Module, torch.optim.Optimizer, list[float]]:
    """A least-squares fit of 96 x 70 weights with a bias; losses of all steps."""
    torch.manual_seed(0)
    model, rows_NI = nn.Linear(70, 96), torch.randn(64, 70)
    target_NO = rows_NI @ torch.randn(70, 96) * 0.1
    training = Training.model_validate({"optimizer": optimizer, "learning_rate": 0.02, "weight_decay": 0.5})
    chosen, losses = optimizer_for({"model": list(model.parameters())}, training), []
    for _ in range(steps):
        loss = (model(rows_NI) - target_NO).square().mean()
        loss.backward()
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


def test_a_small_moment_beside_large_ones_is_never_divided_by_eps_alone() -> None:
    """The large gradient's first moment cancels out, so that the small one is kept; the second moment of the small one
    is 1e-8 of the largest. Rounded to 0 it would make the third step thousands of learning rates long."""
    weight = nn.Parameter(torch.zeros(96, 70))
    training = Training.model_validate({"optimizer": "adamw8bit", "learning_rate": 0.02})
    optimizer = optimizer_for({"model": [weight]}, training)
    for large, small in ((1e4, 1e-4), (-0.9e4, 1e-4), (0.0, 0.0)):
        before, weight.grad = weight.detach().clone(), torch.full((96, 70), small)
        weight.grad[:, 0] = large
        optimizer.step()
    moved = (weight.detach() - before)[:, 1:].abs()
    assert 0 < moved.max() < 0.02
