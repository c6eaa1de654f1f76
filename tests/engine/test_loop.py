"""The loop: the same result however a step is cut, exact resume, and a stop at what is not finite."""

import math
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from schemas.config.training import Training, steps_for
from schemas.errors import StageError
from stages.engine.data import order
from stages.engine.training import checkpoint, loop, offload, optimizers
from stages.engine.training.method import Metrics, Totals
from tests.support.context import MemoryContext

ROWS = torch.randn(24, 5, generator=torch.Generator().manual_seed(1))


class Regression:
    """Least squares on ROWS with dropout: a small method whose result depends on order and randomness."""

    def __init__(self, micro: int = 4, poison: int | None = None, kill: int | None = None) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.2 if micro == 4 else 0.0), nn.Linear(8, 1))
        self.micro, self.poison, self.kill = micro, poison, kill
        self.ema = torch.zeros(1)
        self.training, self.total_steps = TRAINING, 0

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"model": list(self.model.parameters())}

    def rate_factors(self, step: int) -> dict[str, float]:
        return {"model": 1.0}

    def batches(self, start: int) -> Iterator[list[Tensor]]:
        for step in range(start, 1000):
            if step == self.kill:
                os.kill(os.getpid(), signal.SIGTERM)
            rows = ROWS[list(order.step_rows(len(ROWS), step, 8, seed=3))]
            yield list((rows * (math.nan if step == self.poison else 1.0)).split(self.micro))

    def prepare(self, micros: list[Tensor]) -> Totals:
        return {"rows": torch.tensor(float(sum(len(m) for m in micros)))}

    def loss(self, micro: Tensor, totals: Totals) -> tuple[Tensor, Metrics]:
        error = self.model(micro).squeeze(-1) - micro.sum(-1) + self.ema
        return error.square().sum() / totals["rows"], {"compute/rows": torch.tensor(float(len(micro)))}

    def after_step(self, metrics: dict[str, float]) -> dict[str, float]:
        self.ema = 0.9 * self.ema + 0.1 * metrics["train/loss"]
        return {"train/ema": self.ema.item()}

    def held_out_metrics(self) -> dict[str, float]:
        return {"eval/first_weight": float(next(self.model.parameters()).detach().flatten()[0])}

    def finish(self, folder: Path) -> dict[str, float]:
        folder.mkdir()
        return {**self.held_out_metrics(), "data/rows": 24.0}

    def state_dict(self) -> dict[str, Any]:
        return {"ema": self.ema}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ema = state["ema"]


TRAINING = Training(batch_size=8, learning_rate=1e-2, checkpoint_steps=2)


def memory(work: Path) -> MemoryContext:
    return MemoryContext(work, TRAINING, {}, stage="sft", seed=5)


def train(method: Regression, steps: int, context: MemoryContext) -> dict[str, float]:
    method.total_steps = steps
    return loop.train(method, context)


def weights(method: Regression) -> list[Tensor]:
    return [p.detach().clone() for p in method.model.parameters()]


def test_step_rows_walk_through_every_epoch_whole() -> None:
    line = [row for step in range(6) for row in order.step_rows(12, step, 8, seed=0)]
    for epoch in range(4):
        assert sorted(line[12 * epoch : 12 * epoch + 12]) == list(range(12))
    assert line[:12] != line[12:24]
    assert list(order.step_rows(3, 0, 8, seed=0)) == [r for e in range(3) for r in order.order(3, 0, e)][:8]


def test_learning_rate_schedules_by_hand() -> None:
    linear = Training(learning_rate=1.0, schedule="linear", warmup=0.2)
    # 10 steps, 2 of warm-up: 1/3, 2/3, then 1 - done/8.
    rates = [loop.learning_rate(linear, s, 10) for s in range(10)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    cosine = Training(learning_rate=1.0, schedule="cosine", warmup=0.0)
    assert loop.learning_rate(cosine, 5, 10) == pytest.approx(0.5)
    constant = Training(learning_rate=1.0, schedule="constant", warmup=0.0)
    assert loop.learning_rate(constant, 9, 10) == 1.0


def test_steps_for() -> None:
    assert steps_for(100, Training(epochs=1.5, batch_size=32)) == math.ceil(150 / 32)
    assert steps_for(100, Training(epochs=3, batch_size=32, max_steps=4)) == 4
    with pytest.raises(StageError, match="epochs"):
        steps_for(100, Training(epochs=None))


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    results = []
    for micro in (8, 2, 1):
        method = Regression(micro)
        train(method, 3, memory(tmp_path / str(micro)))
        results.append(weights(method))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_activations_that_were_elsewhere_meanwhile_give_the_same_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[tuple[int, ...]] = []
    to_host = loop.to_host

    def counted(model: nn.Module) -> torch.autograd.graph.saved_tensors_hooks:
        hooks = to_host(model)
        pack = hooks.pack_hook

        def noted(tensor: Tensor) -> Any:
            packed = pack(tensor)
            moved.extend([] if isinstance(packed, Tensor) else [tuple(tensor.shape)])
            return packed

        hooks.pack_hook = noted
        return hooks

    monkeypatch.setattr(loop, "to_host", counted)
    monkeypatch.setattr(offload, "HOST", "another")  # so that this device is taken for a GPU
    monkeypatch.setattr(offload, "LEAST", 4 * 4 * 5)
    results = []
    for on in (False, True):
        method = Regression()
        method.training = TRAINING.model_copy(update={"offload_activations": on})
        train(method, 3, memory(tmp_path / str(on)))
        results.append(weights(method))
        # The input, and what went into and came out of dropout; never the weights, of which the first are larger.
        assert set(moved) == ({(4, 5), (4, 8)} if on else set())
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_weights_are_never_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "HOST", "another")
    monkeypatch.setattr(offload, "LEAST", 1)
    model = nn.Linear(3, 2)
    pack = offload.to_host(model).pack_hook
    assert pack(model.weight) is model.weight
    assert isinstance(pack(model.weight.T), Tensor) and not isinstance(pack(torch.ones(2)), Tensor)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_sigterm_saves_and_the_next_run_goes_on_bit_for_bit(
    tmp_path: Path, optimizer: Literal["adamw", "adamw8bit"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "SMALL", 0)
    monkeypatch.setitem(globals(), "TRAINING", TRAINING.model_copy(update={"optimizer": optimizer}))
    whole, whole_run = Regression(), memory(tmp_path / "whole")
    cost = train(whole, 7, whole_run)

    run = memory(tmp_path / "cut")
    with pytest.raises(StageError) as stopped:
        train(Regression(kill=3), 7, run)
    assert stopped.value.status == "preempted"
    assert stopped.value.problem.message == "stopped after step 4 of 7, saved"  # the step in progress is done
    resumed = Regression()
    again = train(resumed, 7, run)

    for a, b in zip(weights(whole), weights(resumed), strict=True):
        assert torch.equal(a, b)
    assert run.logged == whole_run.logged
    assert again["compute/rows"] == cost["compute/rows"] == 7 * 8


def test_progress_says_how_a_method_does_by_its_own_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a rollout come once per rollout: until the next, the last ones are shown."""
    run, plain, said = memory(tmp_path / "own"), memory(tmp_path / "plain"), list[str]()
    for context in (run, plain):
        monkeypatch.setattr(context, "progress", lambda done, total, what: said.append(f"{done}/{total} {what}"))
    method, calls = Regression(), iter(range(9))
    monkeypatch.setattr(
        method, "after_step", lambda metrics: {"train/score": 1.234, "train/x": 9.0} if next(calls) == 1 else {}
    )
    train(method, 3, run)
    assert said[1:] == ["2/3 steps  reward 1.23", "3/3 steps  reward 1.23"]
    train(Regression(), 1, plain)
    loss = plain.logged["train/loss", 1]
    assert said[0].startswith("1/3 steps  loss ") and said[3] == f"1/1 steps  loss {loss:.4f}"


def test_a_run_that_had_ended_is_not_trained_again(tmp_path: Path) -> None:
    run = memory(tmp_path)
    first = train(Regression(), 2, run)
    run.logged.clear()
    assert train(Regression(), 2, run) == first
    assert not run.logged


def test_nan_stops_at_its_step_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    run = memory(tmp_path)
    with pytest.raises(StageError, match="train/loss is nan at step 4") as stopped:
        train(Regression(poison=3), 7, run)
    assert stopped.value.status == "diverged"
    assert math.isnan(run.logged["train/loss", 4])  # the fourth step, counted from 1
    assert [p.name for p in (tmp_path / "checkpoints").glob("step-*")] == ["step-2"]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write of step 2 lasts until step 4 is done; what it wrote is the state after step 2, bit for bit."""
    plain = Regression()
    train(plain, 2, memory(tmp_path / "plain"))
    run, inner, went_on = memory(tmp_path / "run"), checkpoint.seal, threading.Event()
    progress = run.progress

    def seal(draft: Path, target: Path, **named: Any) -> None:
        assert went_on.wait(60)
        inner(draft, target, **named)

    def note(done: int, total: int, what: str) -> None:
        progress(done, total, what)
        if done == 3:
            went_on.set()

    monkeypatch.setattr(checkpoint, "seal", seal)
    monkeypatch.setattr(run, "progress", note)
    train(Regression(), 4, run)
    state = checkpoint.read_state(tmp_path / "run" / "checkpoints" / "step-2", "model")
    assert [torch.equal(a, b) for a, b in zip(state["model"].values(), weights(plain), strict=True)] == [True] * 4
    assert checkpoint.newest(tmp_path / "run" / "checkpoints", run.key) == tmp_path / "run" / "checkpoints" / "step-4"


def test_a_checkpoint_that_cannot_be_written_stops_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seal(draft: Path, target: Path, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "seal", seal)
    run = memory(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        train(Regression(), 1000, run)
    assert ("train/loss", 1000) not in run.logged
    assert not list((tmp_path / "checkpoints").iterdir())


def test_where_tokens_end_the_training_the_first_step_is_not_lost() -> None:
    # 1000 tokens in steps of 100, 200 of warm-up: as 10 steps with 2 of warm-up, 1/3 and 2/3 of the rate, then all.
    linear = Training(learning_rate=1.0, schedule="linear", warmup=0.2, train_tokens=1000)
    rates = [loop.learning_rate(linear, at, 1000, 100) for at in range(0, 1000, 100)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert loop.learning_rate(linear, 150, 1000, 600) == pytest.approx(750 / 800)  # a step that leaves the warm-up


def test_measuring_on_the_way_draws_a_curve_and_changes_no_weight(tmp_path: Path) -> None:
    context, ends = memory(tmp_path / "measured"), {}
    for steps in (2, 4, 6):
        one = Regression()
        one.training = TRAINING.model_copy(update={"schedule": "constant"})  # whatever comes after a step
        train(one, steps, memory(tmp_path / str(steps)))
        ends[steps] = weights(one)
    measured = Regression()
    measured.training = TRAINING.model_copy(update={"schedule": "constant", "measure_every": 2})
    measured.total_steps = 6
    loop.train_and_publish(measured, context)  # type: ignore[arg-type]  # made here, not by a stage
    assert all(torch.equal(a, b) for a, b in zip(weights(measured), ends[6], strict=True))
    found = {step: value for (name, step), value in context.logged.items() if name == "eval/first_weight"}
    assert found == {step: float(ends[step][0].flatten()[0]) for step in (2, 4, 6)}
    assert ("data/rows", 6) not in context.logged  # no curve


class TwoParts(Regression):
    """The first layer learns at half the rate, and not at all in the first step."""

    def groups(self) -> dict[str, list[nn.Parameter]]:
        layers = list(self.model.children())
        return {"low": list(layers[0].parameters()), "high": list(layers[2].parameters())}

    def rate_factors(self, step: int) -> dict[str, float]:
        return {"low": 0.5 if step else 0.0, "high": 1.0}

    def loss(self, micro: Tensor, totals: Totals) -> tuple[Tensor, Metrics]:
        loss, metrics = super().loss(micro, totals)
        return loss, metrics | {"train/most_max": micro.max(), "train/most": micro.max()}


def test_one_step_of_adamw_by_hand(tmp_path: Path) -> None:
    """Clipping, bias correction, epsilon, decay of matrices alone, a rate per part: Loshchilov & Hutter, alg. 2."""
    changes = {"weight_decay": 0.5, "adam_eps": 0.01, "max_grad_norm": 0.3, "schedule": "constant", "warmup": 0.0}
    method, context = TwoParts(micro=8), memory(tmp_path)
    method.training = TRAINING.model_copy(update={**changes, "log_every": 1})
    before = weights(method)
    train(method, 1, context)
    half = weights(method)
    assert all(torch.equal(a, b) for a, b in zip(before[:2], half[:2], strict=True))  # factor 0: no decay either

    before = [p.requires_grad_() for p in before]
    grads = torch.autograd.grad(by_hand(before).square().mean(), before)
    norm = float(torch.cat([g.flatten() for g in grads]).norm())
    assert norm > 0.3  # so that clipping acts
    for p, g, after in zip(before[2:], grads[2:], half[2:], strict=True):
        clipped = g * 0.3 / (norm + 1e-6)
        # first step: m / (1 - b1) = g and sqrt(v / (1 - b2)) = |g|
        step = 1e-2 * clipped / (clipped.abs() + 0.01)
        decay = 1e-2 * 0.5 * p if p.ndim == 2 else 0.0
        torch.testing.assert_close(after, (p - decay - step).detach(), rtol=1e-5, atol=1e-7)
    low, high = (float(torch.cat([g.flatten() for g in part]).norm()) for part in (grads[:2], grads[2:]))
    for name, value in {"low_grad_norm": low, "high_grad_norm": high, "grad_norm": norm}.items():
        assert context.steps(f"train/{name}") == pytest.approx([value], rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])  # its moments are whole where there are few
def test_two_steps_of_adamw_by_hand(tmp_path: Path, optimizer: str) -> None:
    """The second step has each gradient with its own weight: m by beta 1 and v by beta 2, both bias-corrected."""
    b1, b2, eps = 0.7, 0.95, 0.01
    changes: dict[str, Any] = {
        "adam_beta1": b1,
        "adam_beta2": b2,
        "adam_eps": eps,
        "weight_decay": 0.0,
        "max_grad_norm": 1e9,
    }
    changes["optimizer"] = optimizer
    found = [weights(Regression(micro=8))]
    for steps in (1, 2):
        method = Regression(micro=8)
        method.training = TRAINING.model_copy(update={**changes, "schedule": "constant", "warmup": 0.0})
        train(method, steps, memory(tmp_path / str(steps)))
        found.append(weights(method))
    grads, ema = [], 0.0
    for step in (0, 1):
        at = [p.requires_grad_() for p in found[step]]
        loss = (by_hand(at, step) + ema).square().mean()
        grads.append(torch.autograd.grad(loss, at))
        ema = 0.1 * loss.item()
    for p, g, h, after in zip(found[1], *grads, found[2], strict=True):
        m = (1 - b1) * (b1 * g + h) / (1 - b1**2)
        v = (1 - b2) * (b2 * g**2 + h**2) / (1 - b2**2)
        torch.testing.assert_close(after, (p - 1e-2 * m / (v.sqrt() + eps)).detach(), rtol=1e-4, atol=1e-6)


def by_hand(weights: list[Tensor], step: int = 0) -> Tensor:
    """The errors of Regression's step, without dropout."""
    rows = ROWS[list(order.step_rows(len(ROWS), step, 8, seed=3))]
    hidden = rows @ weights[0].T + weights[1]
    return (hidden @ weights[2].T + weights[3]).squeeze(-1) - rows.sum(-1)


def test_metrics_add_up_over_micro_batches_and_maxima_are_maxima(tmp_path: Path) -> None:
    method, context = TwoParts(micro=2), memory(tmp_path)
    train(method, 1, context)
    tops = ROWS[list(order.step_rows(len(ROWS), 0, 8, seed=3))].split(2)
    assert context.steps("train/most_max") == [pytest.approx(max(float(t.max()) for t in tops))]
    assert context.steps("train/most") == [pytest.approx(sum(float(t.max()) for t in tops))]
