"""On a space of answers small enough to write down, PPO and DPO come near the optimum, and nothing exceeds it.

Maximising J(pi) = E r(x, y) - beta KL(pi || pi_ref) has the solution pi*(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x)
with J* = beta E log Z(x), and any policy has J(pi) = J* - beta KL(pi || pi*) (Rafailov et al. 2023, appendix A.1).

Answers have at most two tokens: the end alone, a word and the end, or two words, which break off.

Shapes: X prompts, Y answers; everything in float64 but the models.
"""

import math
import random
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Literal

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from schemas.config import methods
from stages.align.dpo import DPO
from stages.align.ppo import PPO
from stages.engine.data.codec import Codec
from stages.engine.data.trees import Tree, collate
from stages.engine.models.loading import load_policy, load_scorer
from stages.engine.models.policy import Policy, sums
from stages.engine.models.saving import save_scorer
from stages.engine.training.loop import train
from tests.support import models as support_models
from tests.support.context import MemoryContext

END, WORDS = 0, "abcd"
ANSWERS = [(END,), *((i, END) for i in range(1, 5)), *product(range(1, 5), repeat=2)]
PROMPTS = ["a", "b c", "d d a"]
BETA, PENALTY = 0.5, 0.3


@dataclass(frozen=True)
class World:
    """Folders of the model and its reward model, and what follows from them."""

    folder: Path
    reference_XY: Tensor
    """log pi_ref(y|x)"""
    reward_XY: Tensor
    """The reward model's score, less the penalty where the answer broke off."""

    @property
    def log_z_X1(self) -> Tensor:
        return (self.reference_XY + self.reward_XY / BETA).logsumexp(1, keepdim=True)

    @property
    def optimum_XY(self) -> Tensor:
        """log pi*(y|x)"""
        return self.reference_XY + self.reward_XY / BETA - self.log_z_X1

    @property
    def best(self) -> float:
        """J*"""
        return float(BETA * self.log_z_X1.mean())

    def objective(self, logps_XY: Tensor) -> float:
        """J(pi)"""
        return float((logps_XY.exp() * (self.reward_XY - BETA * (logps_XY - self.reference_XY))).sum(1).mean())

    def share_of_gap(self, logps_XY: Tensor) -> float:
        """How far from the reference's J (0) to J* (1)."""
        start = self.objective(self.reference_XY)
        return (self.objective(logps_XY) - start) / (self.best - start)


def build_model(folder: Path) -> Codec:
    """A Llama over five tokens with distributions far from flat."""
    vocabulary = Tokenizer(
        models.WordLevel({"<end>": END, **{w: i for i, w in enumerate(WORDS, 1)}}, unk_token="<end>")
    )
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="<end>", pad_token="<end>")
    end = "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}" + end + " {% endfor %}"
    config = LlamaConfig(
        vocab_size=5,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=END,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    codec = Codec(tokenizer)
    codec.save(folder)
    return codec


def trees(codec: Codec, answers: list[tuple[int, ...]]) -> list[Tree]:
    return [Tree(tuple(codec.prompt([{"role": "user", "content": p}])), tuple(answers)) for p in PROMPTS]


@torch.no_grad()
def logps(policy: Policy, codec: Codec) -> Tensor:
    """log pi(y|x) of every answer to every prompt [X, Y]; they have to sum to 1."""
    batch = collate(trees(codec, ANSWERS), "shared", codec.pad_id)
    logps_XY = sums(policy(batch).logps_N.double(), batch.answer_N, batch.answers).view(len(PROMPTS), -1)
    assert logps_XY.exp().sum(1).tolist() == pytest.approx([1.0] * len(PROMPTS), abs=1e-5)
    return logps_XY


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("optimum")
    codec = build_model(folder / "model")
    scorer = load_scorer(folder / "model", seed=1)
    ended = [answer if answer[-1] == END else (*answer, END) for answer in ANSWERS]  # how the reward model reads them
    with torch.no_grad():
        raw_XY = scorer(collate(trees(codec, ended), "shared", codec.pad_id)).double().view(len(PROMPTS), -1)
    mean, std = float(raw_XY.mean()), float(raw_XY.std())
    save_scorer(scorer, codec, folder / "reward", mean=mean, std=std)
    broken_Y = torch.tensor([answer[-1] != END for answer in ANSWERS])
    reward_XY = (raw_XY - mean) / std - PENALTY * broken_Y
    return World(folder, logps(load_policy(folder / "model"), codec), reward_XY)


def test_the_identity_and_the_bound_hold(world: World) -> None:
    generator = torch.Generator().manual_seed(0)
    noise_XY = torch.randn(world.reward_XY.shape, generator=generator, dtype=torch.float64)
    assert world.objective(world.optimum_XY) == pytest.approx(world.best, abs=1e-12)
    assert world.best - world.objective(world.reference_XY) > 0.1, "the test wants a gap to close"
    for policy_XY in (world.reference_XY, world.reward_XY / BETA, 5 * world.reward_XY, noise_XY):
        logps_XY = policy_XY.log_softmax(1)
        kl = float((logps_XY.exp() * (logps_XY - world.optimum_XY)).sum(1).mean())
        assert world.objective(logps_XY) == pytest.approx(world.best - BETA * kl, abs=1e-12)
        assert world.objective(logps_XY) <= world.best + 1e-12


def check(world: World, name: str, policy: Policy, codec: Codec) -> None:
    """Near the optimum, not above it, and the identity holds for the trained model."""
    logps_XY = logps(policy, codec)
    kl = float((logps_XY.exp() * (logps_XY - world.optimum_XY)).sum(1).mean())
    print(f"{name}: {world.share_of_gap(logps_XY):.4f} of the gap, KL to the optimum {kl:.5f}, J* {world.best:.4f}")
    assert world.share_of_gap(logps_XY) > 0.965
    assert world.objective(logps_XY) <= world.best + 1e-6
    assert world.objective(logps_XY) == pytest.approx(world.best - BETA * kl, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("value_trunk", ["separate", "shared"])
def test_ppo_comes_near_the_optimum(world: World, tmp_path: Path, value_trunk: Literal["separate", "shared"]) -> None:
    rows = [support_models.row(i, prompt) for i, prompt in enumerate(PROMPTS)]
    config = methods.PPO(
        iterations=40,
        rollout_size=192,
        batch_size=96,
        ppo_epochs=3,
        max_new_tokens=2,
        kl_coef=BETA,
        missing_end_penalty=PENALTY,
        learning_rate=3e-3,
        schedule="linear",
        value_trunk=value_trunk,
    )
    inputs = {
        **{n: world.folder / n for n in ("model", "reward")},
        "data": support_models.data_folder(tmp_path / "data", prompt=rows),
    }
    method = PPO(config, MemoryContext(tmp_path / "work", config, inputs))
    start_XY = logps(method.policy, method.codec)
    torch.testing.assert_close(start_XY, world.reference_XY)
    train(method, method.context)
    check(world, f"ppo, {value_trunk} trunk", method.policy, method.codec)


class TokenDPO(DPO):
    """DPO on given token ids: that an answer broke off cannot be said in text. All else is the real thing."""

    def __init__(self, config: methods.DPO, context: MemoryContext, pairs: list[Tree]) -> None:
        super().__init__(config, context)
        assert len(pairs) == len(self.trees)
        self.trees = pairs
        self.reference = self.reference_logps(pairs)


def labelled_pairs(world: World, codec: Codec, times: int) -> list[Tree]:
    """Every pair of answers `times` times as (prompt, chosen, rejected): chosen as often as Bradley and Terry say.

    Wins are counted, not drawn one by one: only the rounding of times * probability is left to chance.
    """
    draw = random.Random(0)
    pairs = []
    for x, prompt in enumerate(tree.prompt for tree in trees(codec, ANSWERS)):
        for i, j in combinations(range(len(ANSWERS)), 2):
            probability = torch.sigmoid(world.reward_XY[x, i] - world.reward_XY[x, j]).item()
            wins = math.floor(times * probability + draw.random())
            pairs += [Tree(prompt, (ANSWERS[i], ANSWERS[j]))] * wins
            pairs += [Tree(prompt, (ANSWERS[j], ANSWERS[i]))] * (times - wins)
    return pairs


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_dpo_comes_near_the_optimum(world: World, tmp_path: Path) -> None:
    pairs = labelled_pairs(world, Codec.load(world.folder / "model"), 32)
    columns = {"chosen": "a", "rejected": "b", "margin": None}
    rows = [support_models.row(i, "a", **columns) for i in range(len(pairs))]
    config = methods.DPO(beta=BETA, batch_size=256, epochs=3, learning_rate=2e-3, schedule="linear")
    inputs = {"model": world.folder / "model", "data": support_models.data_folder(tmp_path / "data", preference=rows)}
    method = TokenDPO(config, MemoryContext(tmp_path / "work", config, inputs), pairs)
    train(method, method.context)
    check(world, "dpo", method.policy, method.codec)
