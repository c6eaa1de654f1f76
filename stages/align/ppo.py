"""Proximal policy optimisation of a reward model's score (Schulman et al. 2017, https://arxiv.org/abs/1707.06347).

As used on language models by Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593), Stiennon et al. 2020 and Ouyang
et al. 2022, with the details that Huang et al. 2024 (https://arxiv.org/abs/2403.17031) collect.

Left out of the papers' method, or changed:
1. Early stopping of the epochs by KL (an option in later code, not in the paper): clipping and `kl_coef` bound it.
2. An entropy bonus (Schulman et al. eq. 9): the KL penalty holds entropy already; entropy is logged.
3. Ouyang's mix of pretraining gradients (PPO-ptx): it wants pretraining data, which is not available.
4. Whitening by minibatch (Ziegler's code): advantages are whitened over the whole rollout, all ranks together, so that
   neither the batch size nor the number of devices changes an advantage, and small minibatches add no noise to it.
   Rewards are not whitened: scores come normalised, by the reward model's own scale or else by the first rollout's.
5. A running scale of rewards, and annealing of the clip range: the score's scale is fixed.
6. Sampling until an answer ends (Ziegler's fixed length and truncation): an answer ends at a stop token or at
   `max_new_tokens`; one that did not end by itself loses `missing_end_penalty` instead of getting a fixed score.
7. Steps without clipping the gradient's norm, as the papers' code takes them: `max_grad_norm` applies here too, and
   with norms of 1 to 4 at the default of 1 it nearly always does.
8. Dropout: none, of LoRA neither. The ratio compares two readings of a token, which only the update may tell apart.

Shapes: B answers of a rollout, T tokens of its longest answer, N answer tokens end to end.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from schemas.config import methods
from schemas.config.training import NO_END
from schemas.errors import refuse
from schemas.model_folder import in_bf16
from stages.engine.data.codec import Codec
from stages.engine.data.examples import Row, read
from stages.engine.data.order import order, step_rows
from stages.engine.data.trees import Batch, Layout, Tree, collate, cut, tree_tokens
from stages.engine.distributed import gather_in_order, rank, share, world
from stages.engine.models.layouts import choose_and_shard
from stages.engine.models.loading import load_judge, load_policy, load_scorer
from stages.engine.models.logprobs import Rows, exact_kl
from stages.engine.models.lora import base_of, label
from stages.engine.models.policy import Policy, Scorer, context_length
from stages.engine.models.saving import save_policy
from stages.engine.models.sharding import is_sharded, missing, shard, wanted, whole
from stages.engine.sampling import sample, seed_of
from stages.engine.scoring.batched import over_trees
from stages.engine.training.method import Metrics, Totals
from stages.runtime.context import StageContext


def gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns [B, T] (Schulman et al. 2016, eq. 16; returns = advantages + values).

    delta_t = r_t + gamma V_{t+1} - V_t; A_t = sum_l (gamma lam)^l delta_{t+l}. After an answer's last token the value
    is 0: the score has been paid there. Zero where the mask is.
    """
    mask_BT = mask_BT.to(values_BT.dtype)
    values_BT, rewards_BT = values_BT * mask_BT, rewards_BT * mask_BT
    next_BT = torch.cat([values_BT[:, 1:], torch.zeros_like(values_BT[:, :1])], 1)
    delta_BT = rewards_BT + gamma * next_BT - values_BT
    advantages_BT = torch.zeros_like(values_BT)
    running_B = torch.zeros_like(values_BT[:, 0])
    for t in reversed(range(values_BT.shape[1])):
        running_B = delta_BT[:, t] + gamma * lam * running_B
        advantages_BT[:, t] = running_B
    return advantages_BT, advantages_BT + values_BT


def whiten(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean 0 and variance 1 (the biased one) over the tokens where the mask is; 0 elsewhere."""
    mask_BT = mask_BT.to(values_BT.dtype)
    count = mask_BT.sum().clamp(min=1)
    centred_BT = (values_BT - (values_BT * mask_BT).sum() / count) * mask_BT
    return centred_BT * torch.rsqrt(centred_BT.square().sum() / count + 1e-8)


def policy_loss(logps_N: Tensor, old_logps_N: Tensor, advantages_N: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Loss and probability ratio of every token: the negative of Schulman et al. 2017, eq. 7."""
    ratio_N = torch.exp(logps_N - old_logps_N)
    clipped_N = ratio_N.clamp(1 - clip, 1 + clip)
    return torch.maximum(-advantages_N * ratio_N, -advantages_N * clipped_N), ratio_N


def value_loss(values_N: Tensor, old_values_N: Tensor, returns_N: Tensor, clip: float) -> Tensor:
    """Half the squared error of every token, values kept within `clip` of the rollout's (Huang et al. 2024, sec. 4)."""
    clipped_N = old_values_N + (values_N - old_values_N).clamp(-clip, clip)
    return 0.5 * torch.maximum((values_N - returns_N).square(), (clipped_N - returns_N).square())


def token_rewards(scores_B: Tensor, logps_BT: Tensor, reference_BT: Tensor, mask_BT: Tensor, kl_coef: float) -> Tensor:
    """[B, T]: -kl_coef (log pi - log pi_ref) on every token, and the score on the last real one (Ziegler, eq. 2)."""
    mask_BT = mask_BT.to(logps_BT.dtype)
    rewards_BT = -kl_coef * (logps_BT - reference_BT) * mask_BT
    last_B1 = mask_BT.sum(1, keepdim=True).long() - 1
    return rewards_BT.scatter_add(1, last_B1, scores_B[:, None].to(rewards_BT.dtype))


def adapt_kl(kl_coef: float, kl: float, target: float, answers: int, horizon: int) -> float:
    """The coefficient after `answers` more answers (Ziegler et al. 2019, sec. 2.2): at most 20 % error counts."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * answers / horizon)


def explained_variance(returns_N: Tensor, values_N: Tensor) -> float:
    """Share of the returns' variance that the critic foretold: 1 - var(return - value) / var(return). 0 is what a
    constant gets, 1 the most. Of returns that are all equal, 0.
    """
    variance = returns_N.var(correction=0)
    return float(1 - (returns_N - values_N).var(correction=0) / variance) if variance > 0 else 0.0


def spread(name: str, values_N: Tensor) -> dict[str, float]:
    """Mean and standard deviation, under names that begin with this one."""
    return {f"{name}_mean": float(values_N.mean()), f"{name}_std": float(values_N.std(correction=0))}


Part = Literal["both", "policy", "value"]
"""What a micro-batch trains."""


class ActorCritic(nn.Module):
    """All that PPO trains, in one module with one forward: the policy, and the critic unless it shares the trunk."""

    def __init__(self, policy: Policy, critic: Scorer | None) -> None:
        super().__init__()
        self.policy, self.critic = policy, critic

    def forward(
        self,
        batch: Batch,
        part: Part = "both",
        *,
        entropy: bool = False,
        temperature: float = 1.0,
        critic_alone: bool = False,
        log_probs: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Rows | None]:
        """log pi, value and entropy of every answer token, N each: the value is that of the state before the token;
        and the log-probs of the whole vocabulary.

        None where `part` leaves it out. `critic_alone`: values send the policy's trunk no gradient.
        """
        if part == "value":
            assert self.critic is not None, "a shared trunk is computed whole"
            return None, self.critic(batch, every=True), None, None
        out = self.policy(
            batch,
            value=self.critic is None,
            entropy=entropy,
            temperature=temperature,
            head_alone=critic_alone,
            log_probs=log_probs,
        )
        values_N = self.critic(batch, every=True) if self.critic and part == "both" else out.values_N
        return out.logps_N, values_N, out.entropy_N, out.log_probs


@dataclass(frozen=True)
class Sampled:
    """The answers of one iteration, whole on every rank."""

    iteration: int
    rows: list[int]
    """Number of each answer's prompt."""
    answers: list[list[int]]


@dataclass(frozen=True)
class Rollout(Sampled):
    """Answers with what an update needs of them. Token tensors hold the answers end to end, on the CPU."""

    logps_N: Tensor
    values_N: Tensor
    advantages_N: Tensor
    returns_N: Tensor
    stats: dict[str, float]
    """What is logged of the iteration."""

    def of(self, tensor_N: Tensor, positions: Sequence[int]) -> Tensor:
        """A token tensor's parts that belong to some answers, end to end."""
        pieces = tensor_N.split([len(a) for a in self.answers])
        return torch.cat([pieces[i] for i in positions])


@dataclass(frozen=True)
class Micro:
    """Some answers of a rollout: tokens, and what the update compares with."""

    batch: Batch
    old_logps_N: Tensor
    old_values_N: Tensor
    advantages_N: Tensor
    returns_N: Tensor
    part: Part = "both"
    critic_alone: bool = False
    """Whether the policy is to stay as it is."""


@dataclass(frozen=True)
class TokenStats:
    """What policy, critic and reference give for one answer's tokens at rollout time."""

    logps_T: Tensor
    values_T: Tensor
    reference_T: Tensor
    entropy_T: Tensor
    kl_T: Tensor
    """Exact, from policy to reference, over the vocabulary."""


class RewardModel:
    """The reward model. It may have a tokenizer and a chat template of its own: then it reads the answers' text."""

    def __init__(self, folder: Path, policy_folder: Path, config: methods.PPO, on: Policy | None) -> None:
        self.scorer = load_judge(folder, config, on=on)
        self.codec, self.policy_codec, self.config = Codec.load(folder), Codec.load(policy_folder), config
        self.same_tokens = same_tokens(folder, policy_folder)
        self.scaled = getattr(self.scorer.plain.config, "alignflow_score", None) is not None
        self.layout: Layout | None = None

    def tree(self, row: Row, prompt: Sequence[int], answer: Sequence[int]) -> Tree:
        """What the reward model reads; the answer always ended, as in its training."""
        if not self.same_tokens:
            text = self.policy_codec.text(answer)
            return self.scorer.read(*self.codec.ended(row["prompt"], text))
        body = answer[:-1] if answer[-1] in self.codec.stop_ids else answer
        return self.scorer.read(prompt, (*body, self.codec.end_id))

    def get_ready(self, trees: Sequence[Tree]) -> None:
        """Choose the layout by some trees, and shard where that is wanted."""
        wanted, pad_id = self.config.layout, self.codec.pad_id
        self.layout = choose_and_shard(self.scorer, self.config, wanted, trees, pad_id)

    def __call__(self, trees: Sequence[Tree]) -> list[float]:
        """One score per tree, at the last real token. On sharded weights all ranks call it."""
        if not trees and not is_sharded(self.scorer):
            return []
        if self.layout is None:
            self.get_ready(trees[:8])
        assert self.layout is not None
        budget, pad_id = self.config.tokens_per_micro_batch, self.codec.pad_id
        scores: dict[int, list[float]] = {}
        for batch in over_trees(self.scorer, self.scorer, trees, self.layout, budget, pad_id):
            scores |= batch
        return [scores[i][0] for i in range(len(trees))]


def same_tokens(one: Path, other: Path) -> bool:
    """Whether two model folders turn the same messages into the same ids: same tokenizer file, template and end."""
    if (one / "tokenizer.json").read_bytes() != (other / "tokenizer.json").read_bytes():
        return False
    a, b = Codec.load(one), Codec.load(other)
    return (a.tokenizer.chat_template, a.end_id) == (b.tokenizer.chat_template, b.end_id)


class PPO:
    """Iterations of: sample answers from the policy, score them, then ppo_epochs of updates on them.

    The trained module is `model`; the policy in it is `policy`.
    """

    def __init__(self, config: methods.PPO, context: StageContext) -> None:
        folder, reward = context.input("model"), context.input("reward")
        if config.lora is not None:  # without its dropout
            config = config.model_copy(update={"lora": config.lora.model_copy(update={"dropout": 0.0})})
        self.config = self.training = config
        self.context, self.seed = context, context.request.seed
        self.codec = Codec.load(folder)
        shared = config.value_trunk == "shared"
        policy = load_policy(folder, config, value_head=shared, seed=self.seed)
        started_from = label(context.request.inputs["model"].sha256, policy.held, policy.rounded)
        one_base = config.lora is not None and base_of(reward) == started_from
        self.reward_model = RewardModel(reward, folder, config, on=policy if one_base else None)
        self.critic = None if shared else self.new_critic(folder, reward, policy, one_base)
        self.model: nn.Module = ActorCritic(policy, self.critic)
        self.frozen = None if config.lora else load_policy(folder, config, trainable=False)
        if self.frozen is not None and self.frozen.held == "bf16" and not in_bf16(folder):
            message = "the reference would be rounded and the policy not, so that their KL would not begin at 0."
            fix = "leave it out, or start from a model that is published in bf16 (sft.publish)"
            raise refuse("frozen", "bf16", message, fix, kind="model")
        self.rows, self.prompts = self.fitting(read(context.input("data"), "train", "prompt"))
        if not self.reward_model.same_tokens:
            asked = [row["prompt"] for row in self.rows]
            self.reward_model.codec.check_prompts(asked, config.max_new_tokens, "reward_model", "the reward model")
        # One in which policy and critic are exact; judged on prompts, each taken as its own answer.
        trees = [Tree(tuple(p), (tuple(p[: config.max_new_tokens]),)) for p in self.prompts[:8]]
        self.layout: Layout = choose_and_shard(policy, config, config.layout, trees, self.codec.pad_id)
        if self.frozen is not None:
            self.frozen.flex = policy.flex  # else the KL would have the difference of two kernels in it
        if self.critic is not None:
            self.layout = choose_and_shard(self.critic, config, self.layout, trees, self.codec.pad_id)
        if wanted(config):  # together: later ranks may have different numbers of answers
            tried = zip(self.rows[:8], trees, strict=False)
            self.reward_model.get_ready([self.reward_model.tree(row, t.prompt, t.answers[0]) for row, t in tried])
            self.frozen = None if self.frozen is None else shard(self.frozen, config)
        context.tag("layout", self.layout)
        context.tag("held", (self.frozen or policy).held)
        self.steps_per_epoch = -(-config.rollout_size // config.batch_size)
        self.steps_per_iteration = config.ppo_epochs * self.steps_per_epoch
        own_steps = min(config.iterations * self.steps_per_iteration, config.max_steps or NO_END)
        self.total_steps = own_steps if config.train_tokens is None else NO_END
        self.kl_coef = config.kl_coef
        self.scale: list[float] | None = None
        self.rollout: Rollout | None = None
        self.far = 0
        """Iterations in a row that were farther from the reference than `max_kl`."""
        self.new_tokens = 0

    # --- setting up ---

    def new_critic(self, folder: Path, reward: Path, policy: Policy, one_base: bool) -> Scorer:
        """From the reward model where it reads the same tokens, else from the policy's start.

        Values begin at 0 there, and with `value_start: zero`. Under LoRA it brings no weights of its own but adapters
        and head. With `one_base` policy, reference, reward model and critic all share the SFT model's.
        """
        lora = self.config.lora is not None
        if self.reward_model.same_tokens:
            on = policy if one_base else self.reward_model.scorer if lora else None
            critic = load_scorer(reward, self.config, seed=self.seed, on=on, adapter=one_base)
        else:
            critic = load_scorer(folder, self.config, seed=self.seed, on=policy if lora else None)
        if not self.critic_is_the_reward_model:
            nn.init.zeros_(critic.plain.get_parameter("score.weight"))
            critic.mean, critic.std = 0.0, 1.0
        return critic

    @property
    def critic_is_the_reward_model(self) -> bool:
        """Whether the critic's values begin as the reward model's scores."""
        return self.reward_model.same_tokens and self.config.value_start == "reward"

    @property
    def actor_critic(self) -> ActorCritic:
        """The module itself. Passes without gradient take it: ranks may make different numbers of them."""
        inner = getattr(self.model, "module", self.model)
        assert isinstance(inner, ActorCritic)
        return inner

    @property
    def policy(self) -> Policy:
        return self.actor_critic.policy

    def fitting(self, rows: list[Row]) -> tuple[list[Row], list[list[int]]]:
        """The rows whose prompt leaves room for an answer, and their tokens. Raises StageError when none does."""
        config = self.config
        models = [self.policy, self.reward_model.scorer, *([self.critic] if self.critic else [])]
        limits = [config.max_length, *(context_length(m.plain) or config.max_length for m in models)]
        room = min(limits) - config.max_new_tokens - 1
        prompts = [self.codec.prompt(row["prompt"]) for row in rows]
        kept = [i for i, prompt in enumerate(prompts) if len(prompt) <= room]
        self.context.metrics({"data/rows": len(kept), "data/too_long": len(rows) - len(kept)})
        if not kept:
            message = f"no prompt is left: none of {len(rows)} has at most {room} tokens"
            fix = "lower it, raise max_length, or give shorter prompts"
            raise refuse("max_new_tokens", config.max_new_tokens, message, fix, kind="data")
        return [rows[i] for i in kept], [prompts[i] for i in kept]

    # --- what the loop calls ---

    def batches(self, start: int) -> Iterator[list[Micro]]:
        """A new rollout whenever an iteration begins; after a resume in mid-iteration, the one of the checkpoint."""
        for step in range(start, self.total_steps):
            iteration, within = divmod(step, self.steps_per_iteration)
            if self.rollout is None or self.rollout.iteration != iteration:
                self.rollout = self.collect(iteration)
                self.check_kl(self.rollout.stats["train/kl_to_reference"], step + 1)  # as the loop counts
            micros = [self.micro(self.rollout, positions) for positions in self.minibatch(self.rollout, within)]
            alone = self.is_critic_alone(step)
            yield [replace(micro, part=part, critic_alone=alone) for part in self.parts(alone) for micro in micros]

    def is_critic_alone(self, step: int) -> bool:
        """Whether the critic warms up in this step, while the policy stays as it is."""
        return step < self.config.critic_alone * self.steps_per_iteration

    def parts(self, critic_alone: bool = False) -> tuple[Part, ...]:
        """In turn, policy and critic hold the activations of one of them only. Under DDP a backward pass that
        synchronises has to reach all parameters.
        """
        apart = self.critic is not None and self.model is self.actor_critic
        if not apart:
            return ("both",)
        return ("value",) if critic_alone else ("policy", "value")

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """The critic is what only the values need: its own trunk, or the head on the policy's."""
        own = self.critic or self.policy.value_head
        assert own is not None
        critic = [p for p in own.parameters() if p.requires_grad]
        ids = set(map(id, critic))
        return {"policy": [p for p in self.model.parameters() if id(p) not in ids], "value": critic}

    def rate_factors(self, step: int) -> dict[str, float]:
        own = self.config.value_learning_rate
        critic = 10.0 if own is None else own / self.config.learning_rate  # over the policy's
        return {"policy": 0.0 if self.is_critic_alone(step) else 1.0, "value": critic}

    def check_kl(self, kl: float, step: int) -> None:
        """Count rollouts too far from the reference; too many in a row end the training before it learns from them."""
        bound, patience = self.config.max_kl, self.config.max_kl_iterations
        self.far = self.far + 1 if bound is not None and not kl <= bound else 0
        if self.far >= patience:
            self.context.metrics({"train/kl_to_reference": kl}, step=step)
            message = (
                f"train/kl_to_reference is {kl:.4g} nats at step {step}, for {self.far} iterations above the bound"
            )
            fix = (
                "lower the learning rate or raise kl_coef; if so far is meant, raise max_kl. The last checkpoint "
                "is kept"
            )
            raise refuse("max_kl", bound, message, fix, kind="diverged", status="diverged")

    def prepare(self, micros: list[Micro]) -> Totals:
        """Answer tokens of the step: every mean is over them."""
        own = sum(len(micro.old_logps_N) for micro in micros if micro.part == micros[0].part)
        return {"tokens": torch.tensor(float(own))}

    def loss(self, micro: Micro, totals: Totals) -> tuple[Tensor, Metrics]:
        """Clipped policy loss plus value_coef times clipped value loss, means over the step's tokens."""
        config, metrics = self.config, Metrics()
        alone = micro.critic_alone
        logps_N, values_N, _, _ = self.model(
            micro.batch, micro.part, temperature=config.temperature, critic_alone=alone
        )
        tokens = totals["tokens"].to(micro.old_logps_N.device)
        loss = torch.zeros((), device=tokens.device)
        if logps_N is not None:
            policy_N, ratio_N = policy_loss(logps_N, micro.old_logps_N, micro.advantages_N, config.clip)
            policy = policy_N.sum() / tokens
            loss = loss + (0 * policy if alone else policy)  # under DDP the gradient of all has to be there
            ratio_N = ratio_N.detach()
            metrics |= {
                "train/policy_loss": policy.detach(),
                "train/ratio_mean": ratio_N.sum() / tokens,
                "train/ratio_max": ratio_N.max(),
                "train/clip_fraction": ((ratio_N - 1).abs() > config.clip).sum() / tokens,
                # Of the updated policy to the one that sampled, nats per token: E[r - 1 - log r], always >= 0.
                "train/approx_kl": (ratio_N - 1 - (logps_N - micro.old_logps_N).detach()).sum() / tokens,
            }
        if logps_N is not None or alone:
            metrics["compute/train_tokens"] = torch.tensor(float(micro.batch.tokens))
        if values_N is not None:
            value_N = value_loss(values_N, micro.old_values_N, micro.returns_N, config.value_clip)
            value = value_N.sum() / tokens
            loss = loss + config.value_coef * value
            moved_N = (values_N - micro.old_values_N).detach().abs()
            metrics["train/value_loss"] = value.detach()
            metrics["train/value_clip_fraction"] = (moved_N > config.value_clip).sum() / tokens
        return loss, metrics

    def after_step(self, metrics: dict[str, float]) -> dict[str, float]:
        """The iteration's own metrics, with every step of it; its sampled tokens once."""
        assert self.rollout is not None
        generated, self.new_tokens = self.new_tokens, 0
        return {**self.rollout.stats, "compute/generated_tokens": float(generated)}

    def state_dict(self) -> dict[str, Any]:
        rollout = None if self.rollout is None else asdict(self.rollout)
        return {"kl_coef": self.kl_coef, "far": self.far, "scale": self.scale, "rollout": rollout}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kl_coef, self.far = state["kl_coef"], state["far"]
        if state["scale"] is not None:
            self.set_scale(*state["scale"])
        self.rollout = None if state["rollout"] is None else Rollout(**state["rollout"])

    def held_out_metrics(self) -> dict[str, float]:
        return {}

    def finish(self, folder: Path) -> dict[str, float]:
        save_policy(self.policy, self.codec, folder, base=self.context.request.inputs["model"].sha256)
        return {}

    # --- updates ---

    def tree(self, rollout_row: int, answer: Sequence[int]) -> Tree:
        return Tree(tuple(self.prompts[rollout_row]), (tuple(answer),))

    def minibatch(self, rollout: Sampled, within: int) -> list[list[int]]:
        """This rank's answers of one optimizer step of the iteration, cut into micro-batches of like length.

        The rollout is dealt out evenly: where `batch_size` does not divide it, no step is left with a stump of it,
        which would move the weights as far as a whole one.
        """
        epoch, part = divmod(within, self.steps_per_epoch)
        number = rollout.iteration * self.config.ppo_epochs + epoch
        line = order(len(rollout.answers), seed_of(self.seed, "minibatch"), number)
        begin, end = (len(line) * edge // self.steps_per_epoch for edge in (part, part + 1))
        mine = share(line[begin:end], rank(), world())
        sizes = {i: tree_tokens(self.tree(rollout.rows[i], rollout.answers[i]), self.layout) for i in mine}
        mine.sort(key=lambda i: sizes[i])
        groups = cut([sizes[i] for i in mine], self.config.tokens_per_micro_batch)
        return [[mine[i] for i in group] for group in groups]

    def batch(self, rollout: Sampled, positions: Sequence[int]) -> Batch:
        trees = [self.tree(rollout.rows[i], rollout.answers[i]) for i in positions]
        return collate(trees, self.layout, self.codec.pad_id).to(self.policy.device)

    def micro(self, rollout: Rollout, positions: list[int]) -> Micro:
        every = (rollout.logps_N, rollout.values_N, rollout.advantages_N, rollout.returns_N)
        old_N, values_N, advantages_N, returns_N = (rollout.of(t, positions).to(self.policy.device) for t in every)
        return Micro(self.batch(rollout, positions), old_N, values_N, advantages_N, returns_N)

    # --- rollouts ---

    def collect(self, iteration: int) -> Rollout:
        """Sample, score, and work out advantages. Every rank does its share; all get the whole."""
        rows = step_rows(len(self.rows), iteration, self.config.rollout_size, seed_of(self.seed, "prompts"))
        sampled = Sampled(iteration, rows, self.answer(iteration, rows))
        self.new_tokens = sum(map(len, sampled.answers))
        scores_B = torch.tensor(self.score(sampled), dtype=torch.float64)
        rollout = self.finish_rollout(sampled, scores_B, self.measure(sampled))
        if self.config.kl_target is not None:
            kl, answers = rollout.stats["train/kl_to_reference"], len(rows)
            self.kl_coef = adapt_kl(self.kl_coef, kl, self.config.kl_target, answers, self.config.kl_horizon)
        return rollout

    def answer(self, iteration: int, rows: list[int]) -> list[list[int]]:
        """One answer per row; the seed is a function of (seed, iteration, position in the rollout)."""
        mine = share(range(len(rows)), rank(), world())
        with whole(self.policy) as policy:  # ranks draw different numbers of tokens
            answers = sample(
                policy,
                [self.prompts[rows[i]] for i in mine],
                max_new_tokens=self.config.max_new_tokens,
                temperature=self.config.temperature,
                seeds=[seed_of(self.seed, "rollout", iteration, i) for i in mine],
                stop_ids=self.codec.stop_ids,
                pad_id=self.codec.pad_id,
            )
        return gather_in_order(dict(zip(mine, answers, strict=True)))

    def score(self, sampled: Sampled) -> list[float]:
        """The reward model's normalised scores. One without a scale gets that of the first rollout: the reference's."""
        mine = share(range(len(sampled.rows)), rank(), world())
        rows = [(sampled.rows[i], sampled.answers[i]) for i in mine]
        trees = [self.reward_model.tree(self.rows[row], self.prompts[row], answer) for row, answer in rows]
        scores = gather_in_order(dict(zip(mine, self.reward_model(trees), strict=True)))
        if self.reward_model.scaled or self.scale is not None:
            return scores
        raw_B = torch.tensor(scores, dtype=torch.float64)
        self.set_scale(float(raw_B.mean()), float(raw_B.std(correction=0).clamp(min=1e-6)))
        return ((raw_B - raw_B.mean()) / raw_B.std(correction=0).clamp(min=1e-6)).tolist()

    def set_scale(self, mean: float, std: float) -> None:
        """Normalise the scores of a reward model that brings no scale, and the values that began as it."""
        self.scale = [mean, std]
        self.reward_model.scorer.mean, self.reward_model.scorer.std = mean, std
        if self.critic is not None and self.critic_is_the_reward_model:
            self.critic.mean, self.critic.std = mean, std

    @torch.no_grad()
    def measure(self, sampled: Sampled) -> list[TokenStats]:
        """Log-probs, values and reference log-probs, in the very micro-batches of the first epoch.

        Equal inputs through the equal forward: the ratio starts at exactly 1 and, on the untrained policy, KL at 0.
        """
        stats: dict[int, TokenStats] = {}
        for within in range(self.steps_per_epoch):
            groups = self.minibatch(sampled, within)
            added = missing(self.actor_critic, len(groups))
            for number, positions in enumerate([*groups, *[[0]] * added]):
                batch = self.batch(sampled, positions)
                temperature = self.config.temperature
                own = self.actor_critic(batch, entropy=True, temperature=temperature, log_probs=True)
                logps_N, values_N, entropy_N, rows = own
                # The reference is the SFT model: the adapters switched off, or a frozen copy.
                sft = self.policy if self.frozen is None else self.frozen
                with self.policy.reference() if self.frozen is None else nullcontext():
                    reference = sft(batch, temperature=temperature, log_probs=True)
                assert logps_N is not None and rows is not None and reference.log_probs is not None
                if number >= len(groups):
                    continue
                kl_N = exact_kl(rows, reference.log_probs, len(logps_N))
                lengths = [len(sampled.answers[i]) for i in positions]
                tensors = (logps_N, values_N, reference.logps_N, entropy_N, kl_N)
                parts = [tensor.float().cpu().split(lengths) for tensor in tensors]
                stats |= {i: TokenStats(*pieces) for i, *pieces in zip(positions, *parts, strict=True)}
        return gather_in_order(stats)

    def finish_rollout(self, sampled: Sampled, scores_B: Tensor, stats: list[TokenStats]) -> Rollout:
        """Rewards, advantages and returns of the whole rollout, in float64; and what is logged of it."""
        config = self.config
        ended_B = torch.tensor([answer[-1] in self.codec.stop_ids for answer in sampled.answers])
        lengths_B = torch.tensor([len(answer) for answer in sampled.answers])
        mask_BT = torch.arange(int(lengths_B.max())) < lengths_B[:, None]
        logps_BT, values_BT, reference_BT = (
            pad_sequence([tensor_T.double() for tensor_T in tensors], batch_first=True)
            for tensors in zip(*((s.logps_T, s.values_T, s.reference_T) for s in stats), strict=True)
        )
        paid_B = scores_B - config.missing_end_penalty * (~ended_B)
        rewards_BT = token_rewards(paid_B, logps_BT, reference_BT, mask_BT, self.kl_coef)
        advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, config.gamma, config.lam)
        logged = {
            "train/score": float(scores_B.mean()),
            "train/kl_to_reference": float((logps_BT - reference_BT).sum(1).mean()),
            "train/kl_exact": float(torch.cat([s.kl_T for s in stats]).double().sum()) / len(stats),
            "train/kl_coef": self.kl_coef,
            "train/entropy": float(torch.cat([s.entropy_T for s in stats]).double().mean()),
            **spread("train/return", returns_BT[mask_BT]),
            **spread("train/advantage", advantages_BT[mask_BT]),
            "train/explained_variance": explained_variance(returns_BT[mask_BT], values_BT[mask_BT]),
            "train/score_std": float(scores_B.std(correction=0)),
            "train/objective": float(rewards_BT.sum(1).mean()),
            "train/length": float((lengths_B - ended_B.long()).double().mean()),
            "train/ended": float(ended_B.double().mean()),
        }
        return Rollout(
            **vars(sampled),
            logps_N=torch.cat([s.logps_T for s in stats]),
            values_N=torch.cat([s.values_T for s in stats]),
            advantages_N=whiten(advantages_BT, mask_BT)[mask_BT].float(),
            returns_N=returns_BT[mask_BT].float(),
            stats=logged,
        )
