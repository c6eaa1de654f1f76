"""PPO: each formula against numbers worked here in float64, then the method on a tiny real model.

Shapes: B answers, T tokens of the longest, N answer tokens end to end.
"""

import contextlib
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from schemas.config import BaseParams, Scratch
from schemas.config.methods import PPO as Config
from schemas.config.training import LoRA
from schemas.errors import StageError
from stages.align.ppo import (
    PPO,
    Sampled,
    TokenStats,
    adapt_kl,
    explained_variance,
    gae,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)
from stages.base import build
from stages.engine import demo
from stages.engine.data.codec import Codec
from stages.engine.models.loading import load_judge, load_scorer
from stages.engine.models.saving import save_scorer
from stages.engine.scoring.judges import RewardJudge
from stages.engine.training.loop import train
from tests.support import models
from tests.support.context import MemoryContext
from tests.support.two_ranks import on_two_ranks

F64 = torch.float64


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=F64)


# --- formulas ---


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.97, 0.0)])
def test_gae_against_brute_force(gamma: float, lam: float) -> None:
    generator = torch.Generator().manual_seed(3)
    rewards_BT, values_BT = torch.randn(2, 4, 6, dtype=F64, generator=generator).unbind()
    lengths = [6, 1, 4, 2]
    mask_BT = torch.arange(6) < torch.tensor(lengths)[:, None]
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma, lam)  # what lies past the end is noise
    for b, length in enumerate(lengths):
        r, v = rewards_BT[b].tolist(), [*values_BT[b, :length].tolist(), 0.0]
        for t in range(6):
            deltas = [(gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k]) for k in range(t, length)]
            assert advantages_BT[b, t].item() == pytest.approx(sum(deltas), abs=1e-12)
            expected_return = sum(deltas) + v[t] if t < length else 0.0
            assert returns_BT[b, t].item() == pytest.approx(expected_return, abs=1e-12)


def test_gae_at_lambda_1_is_what_is_still_to_come() -> None:
    rewards_BT, values_BT = tensor([[1.0, -2.0, 5.0]]), tensor([[0.3, 0.1, -0.4]])
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, torch.ones(1, 3), 1.0, 1.0)
    torch.testing.assert_close(returns_BT, tensor([[4.0, 3.0, 5.0]]))
    torch.testing.assert_close(advantages_BT, tensor([[3.7, 2.9, 5.4]]))


def test_whitening_looks_at_real_tokens_only() -> None:
    values_BT = tensor([[1.0, 4.0, 99.0], [-2.0, 5.0, 6.0]])
    mask_BT = torch.tensor([[True, True, False], [True, True, True]])
    real = [1.0, 4.0, -2.0, 5.0, 6.0]
    mean = sum(real) / 5
    deviation = math.sqrt(sum((x - mean) ** 2 for x in real) / 5)
    white_BT = whiten(values_BT, mask_BT)
    assert white_BT[mask_BT].tolist() == pytest.approx([(x - mean) / deviation for x in real], abs=1e-7)
    assert white_BT[0, 2] == 0
    assert whiten(tensor([[3.0, 3.0]]), torch.ones(1, 2)).abs().max() < 1e-6, "equal advantages are no signal"


def test_policy_loss_clips_what_would_gain_and_not_what_would_lose() -> None:
    ratios, advantages = [1.5, 1.5, 0.5, 0.5, 1.1], [2.0, -2.0, 2.0, -2.0, 3.0]
    logps_N = tensor([math.log(r) - 1.0 for r in ratios]).requires_grad_()
    loss_N, ratio_N = policy_loss(logps_N, tensor([-1.0] * 5), tensor(advantages), 0.2)
    # -min(r A, clip(r, .8, 1.2) A)
    assert loss_N.tolist() == pytest.approx([-1.2 * 2, 1.5 * 2, -0.5 * 2, 0.8 * 2, -1.1 * 3], abs=1e-12)
    assert ratio_N.tolist() == pytest.approx(ratios, abs=1e-12)
    loss_N.sum().backward()
    assert logps_N.grad is not None
    assert logps_N.grad.tolist() == pytest.approx([0.0, 1.5 * 2, -0.5 * 2, 0.0, -1.1 * 3], abs=1e-12)


def test_policy_gradient_at_the_start_is_reinforce() -> None:
    logps_N = tensor([-0.5, -2.0]).requires_grad_()
    loss_N, _ = policy_loss(logps_N, logps_N.detach(), tensor([0.7, -1.3]), 0.2)
    (gradient_N,) = torch.autograd.grad(loss_N.sum(), logps_N)
    assert gradient_N.tolist() == [-0.7, 1.3]


def test_value_loss_takes_the_worse_of_clipped_and_unclipped() -> None:
    # value, value at rollout time, return -> 1/2 max((v - R)^2, (old + clip(v - old, -.2, .2) - R)^2)
    cases = [
        (1.0, 0.0, 1.0, 0.5 * 0.8**2),  # moved right onto the return, but further than it may
        (0.1, 0.0, 1.0, 0.5 * 0.9**2),  # within the clip range: both are equal
        (-1.0, 0.0, 1.0, 0.5 * 2.0**2),  # moved the wrong way: not clipped
    ]
    values_N, old_N, returns_N, expected_N = tensor(cases).unbind(1)
    torch.testing.assert_close(value_loss(values_N, old_N, returns_N, 0.2), expected_N)


def test_the_score_lands_on_the_last_real_token_and_the_kl_penalty_on_each() -> None:
    logps_BT, reference_BT = (
        tensor([[-1.0, -2.0, -3.0], [-4.0, 7.0, 7.0]]),
        tensor([[-1.5, -1.0, -3.0], [-5.0, 9.0, 8.0]]),
    )
    mask_BT = torch.tensor([[True, True, True], [True, False, False]])
    rewards_BT = token_rewards(tensor([10.0, 20.0]), logps_BT, reference_BT, mask_BT, 0.1)
    expected_BT = [[-0.1 * 0.5, -0.1 * -1.0, 10.0], [20 - 0.1 * 1.0, 0.0, 0.0]]
    torch.testing.assert_close(rewards_BT, tensor(expected_BT))
    # Summed over an answer: score - kl_coef * (log pi(y|x) - log pi_ref(y|x)), the KL-regularised objective.
    totals_B = tensor([10.0 - 0.1 * (0.5 - 1.0 + 0.0), 20.0 - 0.1 * 1.0])
    torch.testing.assert_close(rewards_BT.sum(1), totals_B)


def test_adaptive_kl_is_zieglers_controller() -> None:
    assert adapt_kl(0.2, kl=6.6, target=6.0, answers=64, horizon=10_000) == pytest.approx(0.2 * (1 + 0.1 * 0.0064))
    assert adapt_kl(0.2, kl=60.0, target=6.0, answers=500, horizon=10_000) == pytest.approx(0.2 * (1 + 0.2 * 0.05))
    assert adapt_kl(0.2, kl=0.0, target=6.0, answers=500, horizon=10_000) == pytest.approx(0.2 * (1 - 0.2 * 0.05))
    assert adapt_kl(0.2, kl=6.0, target=6.0, answers=64, horizon=1) == 0.2


# --- the method on a tiny model ---


def memory(folder: Path, work: Path, seed: int = 0) -> MemoryContext:
    """A run whose inputs are the folders model, reward and data."""
    inputs = {name: folder / name for name in ("model", "reward", "data")}
    return MemoryContext(work, settings(), inputs, seed=seed)


SMALL = Scratch(hidden_size=16, layers=2, heads=2, intermediate_size=32, max_length=64)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders model, reward (with the policy's tokenizer, and scores scaled) and data (24 prompts)."""
    folder = tmp_path_factory.mktemp("ppo")
    build(BaseParams(scratch=SMALL), 0, folder / "model")
    codec = Codec.load(folder / "model")
    save_scorer(load_scorer(folder / "model", seed=4), codec, folder / "reward", mean=0.1, std=0.5)
    prompts = [row["prompt"] for row, _ in zip(demo.rows("prompt"), range(24), strict=False)]
    prompts[5] += " please."
    rows = [
        {"row": i, "prompt": [{"role": "user", "content": p}], "prompt_id": f"{i:016x}"} for i, p in enumerate(prompts)
    ]
    (folder / "data" / "train").mkdir(parents=True)
    pl.DataFrame(rows).write_parquet(folder / "data" / "train" / "prompt.parquet")
    return folder


@pytest.fixture(scope="session")
def adapted(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model and data, with a reward model whose adapter stands on that model."""
    folder = tmp_path_factory.mktemp("adapted")
    for name in ("model", "data"):
        (folder / name).symlink_to(inputs / name)
    scorer = load_scorer(folder / "model", Config(lora=LoRA(rank=3)), seed=4)
    models.perturb(scorer)
    codec, digest = Codec.load(inputs / "model"), memory(folder, folder / "work").request.inputs["model"].sha256
    save_scorer(scorer, codec, folder / "reward", mean=0.1, std=0.5, base=digest)
    return folder


def settings(**changes: Any) -> Config:
    small = {"iterations": 2, "rollout_size": 10, "batch_size": 4, "ppo_epochs": 2, "max_new_tokens": 6}
    return Config(**{**small, "learning_rate": 1e-3, "tokens_per_micro_batch": 64, **changes})


@pytest.fixture
def start(inputs: Path, tmp_path: Path) -> Callable[..., PPO]:
    """Builds a PPO from changes to `settings`."""

    def build_one(folder: Path = inputs, seed: int = 0, **changes: Any) -> PPO:
        return PPO(settings(**changes), memory(folder, tmp_path / "work", seed))

    return build_one


def run_loop(method: PPO, steps: int | None = None) -> dict[str, list[float]]:
    """Train; what was logged with a step, as lists over the steps."""
    method.total_steps = steps or method.total_steps
    train(method, method.context)
    run = method.context
    assert isinstance(run, MemoryContext)
    return {name: run.steps(name) for name, step in run.logged if step is not None}


WAYS = {
    "separate": {},
    "shared": {"value_trunk": "shared"},
    "lora": {"lora": LoRA(rank=4)},
    "lora, shared": {"lora": LoRA(rank=4), "value_trunk": "shared"},
    "lora with dropout": {"lora": LoRA(rank=4, dropout=0.3)},
    "padded": {"layout": "padded"},
    "temperature": {"temperature": 0.7},
    "gradient checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_at_step_0_the_ratio_is_1_and_kl_is_0(start: Callable[..., PPO], way: str) -> None:
    logged = run_loop(start(**WAYS[way]))
    assert logged["train/ratio_mean"][0] == 1.0
    assert logged["train/clip_fraction"][0] == 0.0
    assert logged["train/kl_to_reference"][0] == 0.0
    assert len(logged["train/loss"]) == 2 * 2 * 3  # iterations, epochs, batches of 4 in 10
    assert logged["train/kl_to_reference"][-1] != 0.0, "the policy has moved, the reference has not"
    assert logged["train/ratio_mean"][1] != 1.0
    assert logged["train/ratio_mean"][6] == pytest.approx(1.0, abs=1e-6), "a new rollout begins at 1 again"
    assert logged["train/clip_fraction"][6] == logged["train/value_clip_fraction"][6] == 0.0
    assert logged["train/approx_kl"][6] == pytest.approx(0.0, abs=1e-6) and max(logged["train/approx_kl"]) > 0
    assert all(math.isfinite(value) for values in logged.values() for value in values)


def test_minibatches_are_even(start: Callable[..., PPO]) -> None:
    """10 answers in steps of at most 4: 3, 3 and 4, and every answer once an epoch; not 4, 4 and a stump of 2."""
    ppo = start(batch_size=4)
    sampled = Sampled(0, list(range(10)), [[1, 2]] * 10)
    for epoch in range(2):
        steps = [[i for micro in ppo.minibatch(sampled, 3 * epoch + part) for i in micro] for part in range(3)]
        assert [len(step) for step in steps] == [3, 3, 4]
        assert sorted(i for step in steps for i in step) == list(range(10))
    # Each epoch of each iteration has an order of its own.
    firsts = [
        sorted(i for micro in ppo.minibatch(Sampled(iteration, list(range(10)), [[1, 2]] * 10), within) for i in micro)
        for iteration in (0, 1)
        for within in (0, 3)
    ]
    assert len(set(map(tuple, firsts))) == 4


def test_explained_variance_by_hand() -> None:
    """Returns 0, 2, 4 have variance 8/3; values 1, 2, 3 leave errors -1, 0, 1 of variance 2/3: 1 - 1/4."""
    returns_N = tensor([0.0, 2.0, 4.0])
    assert explained_variance(returns_N, tensor([1.0, 2.0, 3.0])) == pytest.approx(0.75)
    assert explained_variance(returns_N, returns_N + 5) == pytest.approx(1.0)  # a constant error explains all the same
    assert explained_variance(returns_N, tensor([7.0, 7.0, 7.0])) == pytest.approx(0.0)
    assert explained_variance(returns_N, tensor([4.0, 2.0, 0.0])) == pytest.approx(-3.0)  # errors -4, 0, 4: 1 - 4
    assert explained_variance(tensor([1.0, 1.0]), tensor([0.0, 1.0])) == 0.0


def test_an_updates_loss_is_that_of_the_formulas(start: Callable[..., PPO]) -> None:
    """Both losses and their diagnostics, worked here from log-probs and values, with bounds that differ."""
    clip, value_clip = 0.05, 0.2
    ppo = start(batch_size=10, layout="padded", temperature=0.7, clip=clip, value_clip=value_clip, value_coef=0.3)
    ppo.parts = lambda critic_alone=False: ("both",)
    rollout = ppo.rollout = ppo.collect(0)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in ppo.model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    loss, metrics = models.one_step(ppo)
    logps, values = [], []
    assert ppo.critic is not None
    for row, answer in zip(rollout.rows, rollout.answers, strict=True):
        ids, begin = torch.tensor([[*ppo.prompts[row], *answer]]), len(ppo.prompts[row]) - 1
        with torch.no_grad():
            logits_TV = ppo.policy.hf(input_ids=ids).logits[0, begin:-1].double() / 0.7
            values.append(ppo.critic(ppo.batch(rollout, [len(values)]), every=True).double())
        logps.append(logits_TV.log_softmax(-1)[range(len(answer)), answer])
    logps_N, values_N, old_N, old_values_N, advantages_N, returns_N = (
        torch.as_tensor(t, dtype=F64).tolist()
        for t in (
            torch.cat(logps),
            torch.cat(values),
            rollout.logps_N,
            rollout.values_N,
            rollout.advantages_N,
            rollout.returns_N,
        )
    )
    count, policy, value, clipped, value_clipped, kl = len(logps_N), 0.0, 0.0, 0, 0, 0.0
    for n in range(count):
        log_ratio, moved = logps_N[n] - old_N[n], values_N[n] - old_values_N[n]
        ratio = math.exp(log_ratio)
        policy -= min(ratio * advantages_N[n], min(max(ratio, 1 - clip), 1 + clip) * advantages_N[n])
        near = old_values_N[n] + min(max(moved, -value_clip), value_clip)
        value += max((values_N[n] - returns_N[n]) ** 2, (near - returns_N[n]) ** 2) / 2
        clipped, value_clipped = clipped + (abs(ratio - 1) > clip), value_clipped + (abs(moved) > value_clip)
        kl += ratio - 1 - log_ratio
    between = sum(clip < abs(math.exp(a - b) - 1) < value_clip for a, b in zip(logps_N, old_N, strict=True))
    moved_between = sum(clip < abs(a - b) < value_clip for a, b in zip(values_N, old_values_N, strict=True))
    assert min(between, moved_between, value_clipped) > 0, "the two bounds make a difference"
    assert loss == pytest.approx(policy / count + 0.3 * value / count, rel=1e-4)
    assert float(metrics["train/policy_loss"]) == pytest.approx(policy / count, rel=1e-4)
    assert float(metrics["train/value_loss"]) == pytest.approx(value / count, rel=1e-4)
    assert float(metrics["train/clip_fraction"]) == pytest.approx(clipped / count)
    assert float(metrics["train/value_clip_fraction"]) == pytest.approx(value_clipped / count)
    assert float(metrics["train/approx_kl"]) == pytest.approx(kl / count, rel=1e-3)


def test_a_rollouts_numbers_are_those_of_its_tokens(start: Callable[..., PPO]) -> None:
    """Spread and explained variance from the rollout's own tokens; the objective is score - penalty - kl_coef KL."""
    ppo = start(kl_coef=0.3, missing_end_penalty=2.0)
    rollout = ppo.collect(0)
    logged, returns_N, values_N = rollout.stats, rollout.returns_N.double(), rollout.values_N.double()
    assert logged["train/return_mean"] == pytest.approx(float(returns_N.mean()), abs=1e-5)
    assert logged["train/return_std"] == pytest.approx(float(returns_N.std(correction=0)), rel=1e-4)
    raw_N = returns_N - values_N  # advantages before they are whitened
    assert logged["train/advantage_mean"] == pytest.approx(float(raw_N.mean()), abs=1e-5)
    assert logged["train/advantage_std"] == pytest.approx(float(raw_N.std(correction=0)), rel=1e-4)
    expected = 1 - float(raw_N.var(correction=0) / returns_N.var(correction=0))
    assert logged["train/explained_variance"] == pytest.approx(expected, abs=1e-4)
    paid = logged["train/score"] - 2.0 * (1 - logged["train/ended"])
    assert logged["train/objective"] == pytest.approx(paid - 0.3 * logged["train/kl_to_reference"], abs=1e-6)
    scores = torch.tensor(ppo.score(rollout), dtype=F64)
    assert logged["train/score_std"] == pytest.approx(float(scores.std(correction=0)), rel=1e-6)


@pytest.mark.parametrize(("horizon", "size"), [(10, 64), (12, 60), (1, 5)])
def test_a_horizon_that_turns_the_penalty_is_refused(horizon: int, size: int) -> None:
    """At the largest error, -0.2, the coefficient is multiplied by 1 - 0.2 size / horizon: 0 or less for these."""
    assert adapt_kl(1.0, 0.0, 1.0, size, horizon) <= 0
    with pytest.raises(ValidationError, match=f"kl_horizon = {horizon} would turn the sign"):
        Config(kl_target=1.0, kl_horizon=horizon, rollout_size=size)
    least = size // 5 + 1
    assert adapt_kl(1.0, 0.0, 1.0, size, Config(kl_target=1.0, kl_horizon=least, rollout_size=size).kl_horizon) > 0
    Config(kl_horizon=horizon, rollout_size=size)  # not used without a target


def test_a_rollout_is_logged_as_it_is(start: Callable[..., PPO]) -> None:
    ppo = start()
    logged = run_loop(ppo)
    assert ppo.rollout is not None
    answers, stops = ppo.rollout.answers, ppo.codec.stop_ids
    assert len(answers) == 10 and {len(a) for a in answers} <= set(range(1, 7))
    assert logged["train/length"][-1] == pytest.approx(sum(len(a) - (a[-1] in stops) for a in answers) / 10)
    assert logged["train/ended"][-1] == pytest.approx(sum(a[-1] in stops for a in answers) / 10)
    vocabulary = len(ppo.codec.tokenizer)
    assert 0.8 * math.log(vocabulary) < logged["train/entropy"][0] <= math.log(vocabulary)
    assert logged["train/score"][-1] == pytest.approx(sum(ppo.score(ppo.rollout)) / 10)
    prompts = {tuple(ppo.prompts[i]) for i in ppo.rollout.rows}
    assert len(prompts) == 10, "the prompts of one pass over the data do not repeat"


@pytest.mark.parametrize("way", ["separate", "lora", "temperature"])
def test_the_exact_kl_is_that_of_the_whole_vocabulary(start: Callable[..., PPO], way: str) -> None:
    ppo = start(**WAYS[way])
    assert ppo.collect(0).stats["train/kl_exact"] == pytest.approx(0, abs=1e-6)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in ppo.groups()["policy"]:
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    rollout, found = ppo.collect(1), []
    for row, answer in zip(rollout.rows, rollout.answers, strict=True):
        ids, begin = [*ppo.prompts[row], *answer], len(ppo.prompts[row]) - 1
        with torch.no_grad():
            own_TV = ppo.policy.hf(input_ids=torch.tensor([ids])).logits[0, begin:-1].double()
            with ppo.policy.reference() if ppo.frozen is None else contextlib.nullcontext():
                base = ppo.policy if ppo.frozen is None else ppo.frozen
                base_TV = base.hf(input_ids=torch.tensor([ids])).logits[0, begin:-1].double()
        own_TV, base_TV = ((t / ppo.config.temperature).log_softmax(-1) for t in (own_TV, base_TV))
        found.append(float((own_TV.exp() * (own_TV - base_TV)).sum()))
    assert rollout.stats["train/kl_exact"] == pytest.approx(sum(found) / 10, rel=1e-3)
    assert rollout.stats["train/kl_exact"] > 0.01


def test_advantages_are_those_of_the_formulas(start: Callable[..., PPO]) -> None:
    """The score of an answer that did not end by a stop token loses the penalty; the pad token ends nothing."""
    ppo = start(kl_coef=9.0, missing_end_penalty=3.0, lam=1.0)
    ppo.kl_coef = 0.5  # where the controller has brought it
    end, pad = ppo.codec.end_id, ppo.codec.pad_id
    assert end != pad
    sampled = Sampled(0, [0, 1, 2], [[9, end], [9, 8, 7], [9, pad]])
    logps = [tensor([-1.0, -2.0]), tensor([-1.0, -1.0, -1.0]), tensor([-2.0, -2.0])]
    reference = [tensor([-1.0, -2.5]), tensor([-1.5, -1.0, -1.0]), tensor([-2.0, -2.0])]
    values = [tensor([0.5, 0.5]), tensor([0.0, 0.0, 0.0]), tensor([1.0, 2.0])]
    triples = zip(logps, values, reference, strict=True)
    stats = [TokenStats(a.float(), b.float(), c.float(), torch.zeros(len(a)), (a - c).float()) for a, b, c in triples]
    rollout = ppo.finish_rollout(sampled, tensor([10.0, 20.0, 30.0]), stats)
    to_come = [10 - 0.5 * 0.5, 10 - 0.5 * 0.5, 17 - 0.5 * 0.5, 17.0, 17.0, 27.0, 27.0]
    assert rollout.returns_N.tolist() == pytest.approx(to_come)
    raw = [a - b for a, b in zip(to_come, torch.cat(values).tolist(), strict=True)]
    mean = sum(raw) / 7
    deviation = math.sqrt(sum((x - mean) ** 2 for x in raw) / 7)
    assert rollout.advantages_N.tolist() == pytest.approx([(x - mean) / deviation for x in raw], abs=1e-5)
    assert rollout.stats["train/kl_to_reference"] == pytest.approx((0.5 + 0.5 + 0.0) / 3)
    assert rollout.stats["train/score"] == 20.0
    assert rollout.stats["train/ended"] == pytest.approx(1 / 3)
    assert rollout.stats["train/length"] == pytest.approx((1 + 3 + 2) / 3)
    # gamma discounts what is to come, values and errors alike; lam the errors alone. Of an answer of two tokens, with
    # rewards 0 and 10 and values .5: deltas .5 gamma - .5 and 9.5; the first advantage has gamma lam times the second.
    ppo = start(kl_coef=0.0, missing_end_penalty=0.0, gamma=0.9, lam=0.6)
    flat = [TokenStats(*(tensor([0.5, 0.5]).float() for _ in range(5)))]
    returns = ppo.finish_rollout(Sampled(0, [0], [[9, end]]), tensor([10.0]), flat).returns_N
    assert returns.tolist() == pytest.approx([0.5 + (0.9 * 0.5 - 0.5) + 0.9 * 0.6 * 9.5, 10.0])


def test_the_objective_does_not_depend_on_how_a_step_is_cut(start: Callable[..., PPO]) -> None:
    gradients = []
    for budget in (16, 40, 4096):
        ppo = start(tokens_per_micro_batch=budget, batch_size=10)
        micros = next(ppo.batches(0))
        totals = ppo.prepare(micros)
        for micro in micros:
            ppo.loss(micro, totals)[0].backward()
        gradients.append((len(micros), models.gradient(ppo.model)))
    assert gradients[0][0] == 20 and gradients[2][0] == 2  # policy and critic
    for _, gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0][1], rtol=1e-4, atol=1e-6)


class Wrapped(nn.Module):
    """Stands around a model as DDP does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def test_policy_and_critic_in_turn_equal_both_at_once(start: Callable[..., PPO]) -> None:
    turns, at_once = start(batch_size=10), start(batch_size=10)
    at_once.model = Wrapped(at_once.model)
    assert (turns.parts(), at_once.parts()) == (("policy", "value"), ("both",))
    found = [models.one_step(ppo) for ppo in (turns, at_once)]
    assert torch.equal(models.gradient(turns.model), models.gradient(at_once.model))
    (loss, metrics), (expected_loss, expected) = found
    assert loss == pytest.approx(expected_loss, rel=1e-6) and metrics.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value)


def parameters(ppo: PPO) -> dict[str, list[Tensor]]:
    return {part: [p.detach().clone() for p in every if p.requires_grad] for part, every in ppo.groups().items()}


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("way", ["separate", "shared", "lora", "at once"])
def test_the_critic_warms_up_while_the_policy_stays(start: Callable[..., PPO], way: str) -> None:
    # 20 iterations of 2 steps: 2 of warm-up, 4 steps. Decay would move weights of gradient 0 as well.
    changes = {"iterations": 20, "batch_size": 10, "value_warmup": 5, "weight_decay": 0.1, "max_grad_norm": 1e6}
    ppo = start(**changes, learning_rate=1e-4, adam_eps=1e-12, **WAYS.get(way, {}))
    if way == "at once":  # as under DDP, where one backward pass reaches all
        ppo.parts = lambda critic_alone=False: ("both",)
    if ppo.policy.value_head is not None:  # it begins with zeros, through which no gradient could get
        nn.init.normal_(ppo.policy.value_head.weight)
    micros, groups = next(ppo.batches(0)), ppo.groups()
    trained = 0.0
    for micro in micros:
        loss, metrics = ppo.loss(micro, ppo.prepare(micros))
        loss.backward()
        trained += float(metrics["compute/train_tokens"])
    assert ppo.rollout is not None
    assert trained == sum(len(ppo.prompts[row]) for row in ppo.rollout.rows) + sum(map(len, ppo.rollout.answers))
    # none gathers as momentum, to move the policy later
    assert not any(p.grad.any() for p in groups["policy"] if p.grad is not None)
    assert any(p.grad is not None and p.grad.any() for p in groups["value"])
    ppo.model.zero_grad()
    before = parameters(ppo)
    logged = run_loop(ppo, 4)
    warm = parameters(ppo)
    assert same(before["policy"], warm["policy"]) and not same(before["value"], warm["value"])
    assert logged["train/kl_to_reference"][-1] == pytest.approx(0, abs=1e-6)


def test_only_rollouts_in_a_row_that_are_too_far_end_the_training(start: Callable[..., PPO]) -> None:
    ppo = start(max_kl=5.0, max_kl_iterations=2)
    for step, kl in enumerate((6.0, 5.0, 6.0, 4.0, math.nan)):
        ppo.check_kl(kl, step)
    with pytest.raises(StageError, match=r"max_kl.*6 nats at step 5, for 2 iterations above the bound"):
        ppo.check_kl(6.0, 5)


def test_a_warm_up_is_at_most_a_tenth(start: Callable[..., PPO]) -> None:
    assert [settings(iterations=n).critic_alone for n in (9, 10, 19, 20, 500)] == [0, 1, 1, 2, 2]
    assert settings(iterations=500, value_warmup=0).critic_alone == 0
    assert settings(iterations=100, value_warmup=50, value_warmup_share=0.29).critic_alone == 29
    assert settings(iterations=12, value_warmup=4, value_warmup_share=0.5).critic_alone == 4
    ppo = start(iterations=20)  # 2 iterations of 2 epochs of 3 steps
    assert [ppo.is_critic_alone(step) for step in (0, 11, 12)] == [True, True, False]


def test_the_critic_has_a_rate_of_its_own(start: Callable[..., PPO]) -> None:
    for own, factor in ((None, 10), (5e-4, 0.5)):
        ppo = start(learning_rate=1e-3, value_learning_rate=own)
        assert ppo.rate_factors(0) == {"policy": 1.0, "value": pytest.approx(factor)}
    shared = start(value_trunk="shared")
    head = shared.policy.value_head
    assert head is not None and [id(p) for p in shared.groups()["value"]] == [id(p) for p in head.parameters()]
    trained = {id(p) for p in shared.model.parameters()}
    assert {id(p) for every in shared.groups().values() for p in every} == trained


def test_rollouts_are_functions_of_seed_and_iteration(start: Callable[..., PPO]) -> None:
    one, same, other = start().collect(0), start().collect(0), start(seed=1).collect(0)
    assert (one.rows, one.answers) == (same.rows, same.answers)
    assert torch.equal(one.advantages_N, same.advantages_N)
    assert one.answers != other.answers
    ppo = start()
    assert not set(ppo.collect(1).rows) & set(ppo.collect(0).rows), "24 prompts: none twice in two rollouts of 10"
    rows = list(range(10))
    assert ppo.answer(1, rows) != ppo.answer(0, rows)
    cold = start(temperature=1e-4)  # the likeliest token each time, whatever the seed
    assert cold.answer(1, rows) == cold.answer(0, rows)


@pytest.mark.parametrize(("cut_at", "lora"), [(3, None), (6, None), (8, None), (3, LoRA(rank=4)), (8, LoRA(rank=4))])
def test_resume_is_exact_also_within_an_iteration(adapted: Path, tmp_path: Path, cut_at: int, lora: Any) -> None:
    def ppo(work: str) -> PPO:
        return PPO(settings(kl_target=0.01, kl_horizon=20, lora=lora), memory(adapted, tmp_path / work))

    whole, before, after = ppo("whole"), ppo("cut"), ppo("cut")
    logged = run_loop(whole, 12)
    run_loop(before, cut_at)
    resumed = run_loop(after, 12)
    pairs = zip(whole.model.parameters(), after.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert after.kl_coef == whole.kl_coef != whole.config.kl_coef
    for name, values in logged.items():
        assert resumed[name] == values[cut_at:], name


def train_shared(inputs: Path, work: Path) -> dict[str, Tensor]:
    """Two iterations in full, and two with all models on one base; the weights, and what was logged."""
    found: dict[str, Tensor] = {}
    for name, lora in {"full": None, "lora": LoRA(rank=4)}.items():
        # A large eps keeps Adam's step in proportion to the gradient, where it would blow up the noise of small ones.
        config = settings(adam_eps=1.0, learning_rate=0.1, kl_target=0.01, lora=lora)
        ppo = PPO(config, memory(inputs, work / name))
        logged = run_loop(ppo)
        skip = {"compute/seconds", "train/tokens_per_second"}
        found |= {f"{name}/{key}": torch.tensor(values) for key, values in logged.items() if key not in skip}
        found |= {f"{name}/{key}": p.detach().clone() for key, p in ppo.model.named_parameters()}
    return found


def work_as_rank(rank: int, inputs: Path, folder: Path) -> None:
    save_file(train_shared(inputs, folder / "work"), folder / f"{rank}.safetensors")


@pytest.mark.slow
def test_two_ranks_sample_and_train_like_one(adapted: Path, tmp_path: Path) -> None:
    on_two_ranks(work_as_rank, adapted, tmp_path)
    alone = train_shared(adapted, tmp_path / "alone")
    for rank in (0, 1):
        shared = load_file(tmp_path / f"{rank}.safetensors")
        assert shared.keys() == alone.keys()
        for name, value in shared.items():
            torch.testing.assert_close(value, alone[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_the_loop_counts_sampled_tokens_once(start: Callable[..., PPO]) -> None:
    ppo = start()
    sampled = sum(map(len, start().collect(0).answers))
    ppo.total_steps = 6
    final = train(ppo, ppo.context)  # one iteration: two epochs of three batches
    assert final["compute/generated_tokens"] == sampled
    assert final["compute/train_tokens"] > 2 * sampled


# --- reward models ---


def test_scores_are_the_reward_models_at_the_answers_end(start: Callable[..., PPO], inputs: Path) -> None:
    ppo = start()
    rollout = ppo.collect(0)
    texts = [ppo.codec.text(answer) for answer in rollout.answers]
    expected = RewardJudge(inputs / "reward").score([ppo.rows[i]["prompt"] for i in rollout.rows], texts)
    # Words of this tokenizer come back as they were, but for the special ones that a random model writes.
    same = [
        ppo.codec.answer(t)[:-1] == [i for i in a if i not in ppo.codec.stop_ids]
        for t, a in zip(texts, rollout.answers, strict=True)
    ]
    assert sum(same) >= 5
    for score, wanted, comparable in zip(ppo.score(rollout), expected, same, strict=True):
        if comparable:
            assert score == pytest.approx(wanted, abs=1e-5)


def test_a_reward_model_with_another_tokenizer_and_template_reads_the_text(
    start: Callable[..., PPO], inputs: Path, tmp_path: Path, tinystories: Path
) -> None:
    for name in ("model", "data"):
        (tmp_path / name).symlink_to(inputs / name)
    save_scorer(load_scorer(tinystories, seed=2), Codec.load(tinystories), tmp_path / "reward", std=2.0)
    ppo = start(folder=tmp_path)
    assert not ppo.reward_model.same_tokens
    rollout = ppo.collect(0)
    texts = [ppo.codec.text(answer) for answer in rollout.answers]
    expected = RewardJudge(tmp_path / "reward").score([ppo.rows[i]["prompt"] for i in rollout.rows], texts)
    assert ppo.score(rollout) == pytest.approx(expected, abs=1e-4)
    assert rollout.values_N.abs().max() == 0, "the critic begins as the policy, with values of 0"
    run_loop(ppo, 2)
    adapted = start(folder=tmp_path, lora=LoRA(rank=4))
    assert adapted.critic is not None
    assert len(held(adapted.critic) - held(adapted.policy)) == 1, "it stands on the policy's weights"
    assert adapted.collect(0).values_N.abs().max() == 0


@pytest.mark.parametrize("one_base", [False, True])
def test_values_may_begin_at_0_on_the_reward_models_trunk(
    start: Callable[..., PPO], inputs: Path, adapted: Path, one_base: bool
) -> None:
    """The critic's own head is 0; the scores stay the reward model's, and its trunk is the critic's."""
    changes: dict[str, Any] = {"folder": adapted if one_base else inputs, "lora": LoRA(rank=4) if one_base else None}
    usual, zero = start(**changes), start(**changes, value_start="zero")
    expected, rollout = usual.collect(0), zero.collect(0)
    assert expected.values_N.abs().min() > 0 and rollout.values_N.abs().max() == 0
    assert rollout.answers == expected.answers and zero.score(rollout) == usual.score(expected)
    assert usual.critic is not None and zero.critic is not None
    unlike = [
        name
        for (name, one), other in zip(usual.critic.named_parameters(), zero.critic.parameters(), strict=True)
        if not torch.equal(one, other)
    ]
    assert len(unlike) == 1 and "score" in unlike[0]
    run_loop(zero, 3)
    assert zero.collect(1).values_N.abs().min() > 0


def test_a_reward_model_without_a_scale_gets_that_of_the_first_rollout(
    start: Callable[..., PPO], inputs: Path, tmp_path: Path
) -> None:
    for name in ("model", "data"):
        (tmp_path / name).symlink_to(inputs / name)
    load_scorer(inputs / "model", seed=4).plain.save_pretrained(tmp_path / "reward")
    Codec.load(inputs / "model").save(tmp_path / "reward")
    ppo = start(folder=tmp_path)
    first = ppo.score(ppo.collect(0))  # read again, with the scale of the rollout
    raw = RewardJudge(tmp_path / "reward")
    assert ppo.scale is not None
    assert sum(first) / 10 == pytest.approx(0.0, abs=1e-5)
    assert math.sqrt(sum(x * x for x in first) / 10) == pytest.approx(1.0, abs=1e-4)
    assert raw.scorer.std == 1.0
    again = start(folder=tmp_path)
    again.load_state_dict(ppo.state_dict())
    assert again.critic is not None
    assert again.reward_model.scorer.std == again.critic.std == ppo.scale[1]
    zero = start(folder=tmp_path, value_start="zero")
    zero.collect(0)
    assert zero.scale == ppo.scale and zero.collect(1).values_N.abs().max() == 0, "a scale is the scores' alone"


def test_the_critic_begins_as_the_reward_model(start: Callable[..., PPO], inputs: Path) -> None:
    ppo = start()
    assert ppo.critic is not None
    theirs = dict(load_scorer(inputs / "reward").named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in ppo.critic.named_parameters())
    assert all(p.requires_grad for p in ppo.critic.parameters())
    assert not any(p.requires_grad for p in ppo.reward_model.scorer.parameters())


def held(*models: nn.Module) -> set[int]:
    """Where the models' numbers lie, adapters left out."""
    return {p.data_ptr() for model in models for name, p in model.named_parameters() if ".lora_" not in name}


def test_under_lora_one_base_serves_policy_reference_reward_and_critic(
    start: Callable[..., PPO], adapted: Path, tmp_path: Path
) -> None:
    ppo = start(folder=adapted, lora=LoRA(rank=4))
    assert ppo.critic is not None and ppo.frozen is None
    assert len(held(ppo.critic, ppo.reward_model.scorer) - held(ppo.policy)) == 2, "the heads"

    # Without its adapter the same reward model is a model of its own: the same scores and values.
    for name in ("model", "data"):
        (tmp_path / name).symlink_to(adapted / name)
    shutil.copytree(adapted / "reward", tmp_path / "reward", ignore=shutil.ignore_patterns("adapter"))
    apart = start(folder=tmp_path, lora=LoRA(rank=4))
    assert apart.critic is not None
    assert len(held(apart.critic) - held(apart.reward_model.scorer)) == 1, "a frozen reward model lends its weights too"
    assert not held(apart.critic) & held(apart.policy)
    one, other = ppo.collect(0), apart.collect(0)
    assert one.answers == other.answers
    assert ppo.score(one) == pytest.approx(apart.score(other), abs=1e-5)
    torch.testing.assert_close(one.values_N, other.values_N, atol=1e-5, rtol=1e-5)

    scores = ppo.score(one)
    logged = run_loop(ppo)
    assert (logged["train/ratio_mean"][0], logged["train/kl_to_reference"][0]) == (1.0, 0.0)
    assert logged["train/kl_to_reference"][-1] != 0.0
    assert ppo.score(one) == scores, "neither the policy's nor the critic's adapter moves the judge"


def test_a_reference_that_would_be_rounded_alone_is_refused(start: Callable[..., PPO]) -> None:
    with pytest.raises(StageError, match="the reference would be rounded and the policy not") as error:
        start(frozen="bf16")
    assert error.value.problem.field == "frozen"


@pytest.mark.parametrize("base", ["bf16", "nf4"])
def test_on_a_base_in_fewer_bits_all_begin_as_one(
    start: Callable[..., PPO], adapted: Path, base: Literal["bf16", "nf4"], tmp_path: Path
) -> None:
    ppo = start(folder=adapted, lora=LoRA(rank=4, base=base), frozen="bf16")
    assert ppo.critic is not None
    # The adapter learned on whole weights, and lends those of its merged model.
    assert not held(ppo.reward_model.scorer) & held(ppo.policy)
    assert len(held(ppo.critic) - held(ppo.reward_model.scorer)) == 1 and ppo.critic.held == "bf16"
    for name in ("model", "data"):
        (tmp_path / name).symlink_to(adapted / name)
    scorer = load_scorer(adapted / "model", Config(lora=LoRA(rank=3, base=base)), seed=4)
    models.perturb(scorer)
    digest = memory(tmp_path, tmp_path / "work").request.inputs["model"].sha256
    save_scorer(scorer, Codec.load(adapted / "model"), tmp_path / "reward", mean=0.1, std=0.5, base=digest)
    ppo = start(folder=tmp_path, lora=LoRA(rank=4, base=base))
    own, rollout = ppo.reward_model.scorer, ppo.collect(0)
    scores = ppo.score(rollout)
    ppo.reward_model.scorer = load_judge(tmp_path / "reward")  # the merged model
    assert ppo.score(rollout) == pytest.approx(scores, abs=1e-4)
    ppo.reward_model.scorer = own
    assert ppo.critic is not None and ppo.critic.held == ppo.policy.held == base
    assert len(held(ppo.critic, ppo.reward_model.scorer) - held(ppo.policy)) == 2, "the heads"
    logged = run_loop(ppo)
    assert (logged["train/ratio_mean"][0], logged["train/kl_to_reference"][0]) == (1.0, 0.0)


def test_an_adapter_of_another_base_is_not_used(start: Callable[..., PPO], adapted: Path, tmp_path: Path) -> None:
    for name in ("data", "reward"):
        (tmp_path / name).symlink_to(adapted / name)
    shutil.copytree(adapted / "model", tmp_path / "model")  # another digest
    ppo = start(folder=tmp_path, lora=LoRA(rank=4))
    assert not held(ppo.reward_model.scorer) & held(ppo.policy)


def test_prompts_without_room_for_an_answer_are_left_out_or_refused(start: Callable[..., PPO]) -> None:
    longest = max(map(len, start().prompts))
    ppo = start(max_length=longest + 6)  # no room for the longest, six new tokens, and the reward model's end
    assert isinstance(ppo.context, MemoryContext)
    assert (ppo.context.logged["data/rows", None], ppo.context.logged["data/too_long", None]) == (23, 1)
    assert max(map(len, ppo.prompts)) < longest
    with pytest.raises(StageError, match="no prompt is left"):
        start(max_length=10)
