"""One-line mistakes, each with the tests that are to notice it. Golden numbers are not among them: they notice any
change, and are recorded anew where one is meant. Those in what is concluded from numbers are in `conclusions`, those
about conversations in `conversations`, those in sharded training in `shards`.
"""

from dataclasses import dataclass

from tests.mutants import conclusions, conversations, fewer_bits, shards, surfaces


@dataclass(frozen=True)
class Mutant:
    """A line of a file, what it becomes by mistake, and the test files of which one has to fail."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied(self, text: str) -> str:
        """The file's text with the mistake.

        Raises:
            ValueError: the line is not there exactly once.
        """
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} has {text.count(self.old)} places that read {self.old!r}")
        return text.replace(self.old, self.new)

    def __str__(self) -> str:
        return f"{self.file}: {self.old!r} -> {self.new!r}"


BY_FILE: dict[tuple[str, tuple[str, ...]], list[tuple[str, str]]] = {
    ("stages/align/dpo.py", ("tests/stages/align/test_dpo.py",)): [
        (
            "return (1 - label_smoothing) * right + label_smoothing * flipped",
            "return label_smoothing * right + (1 - label_smoothing) * flipped",
        ),
        (
            "right, flipped = -F.logsigmoid(beta * h), -F.logsigmoid(-beta * h)",
            "right, flipped = -F.logsigmoid(h), -F.logsigmoid(-h)",
        ),
        ("/ (1 - 2 * label_smoothing)", "/ (1 - label_smoothing)"),
        ("return F.relu(1 - beta * h)", "return F.relu(-beta * h)"),
        ("return (h - 1 / (2 * beta)) ** 2", "return (h - 1 / beta) ** 2"),
        (
            "ratio_P2 = logps_P2 - logps_P2.new_tensor(reference)",
            "ratio_P2 = logps_P2 + 0 * logps_P2.new_tensor(reference)",
        ),
        ('if self.config.loss == "ipo_mean":', 'if self.config.loss == "ipo_sum":'),
        ("h = ratio_P2[:, 0] - ratio_P2[:, 1]", "h = ratio_P2[:, 1] - ratio_P2[:, 0]"),
        ('"train/margin": self.config.beta * h', '"train/margin": -self.config.beta * h'),
        ('"train/chosen_logp": logps_P2[:, 0]', '"train/chosen_logp": logps_P2[:, 1]'),
        ('"train/accuracy": (h > 0) + 0.5 * (h == 0)', '"train/accuracy": (h < 0) + 0.5 * (h == 0)'),
    ],
    ("stages/align/kto.py", ("tests/stages/align/test_kto.py",)): [
        (
            "gain = torch.where(desirable, log_ratio - z0, z0 - log_ratio)",
            "gain = torch.where(desirable, log_ratio - z0, log_ratio - z0)",
        ),
        ("weight = weights[0] * up + weights[1] * (1 - up)", "weight = weights[1] * up + weights[0] * (1 - up)"),
        ("return weight * (1 - torch.sigmoid(beta * gain))", "return weight * (1 - torch.sigmoid(gain))"),
        ("return (kl_sum / count.clamp(min=1)).clamp(min=0).detach()", "return (kl_sum / count.clamp(min=1)).detach()"),
        (
            "return ((up + down) / (2 * up), (up + down) / (2 * down)) if both else (1.0, 1.0)",
            "return ((up + down) / (2 * down), (up + down) / (2 * up)) if both else (1.0, 1.0)",
        ),
        ("drawn if drawn < first else drawn + end - first", "drawn"),
        ("with undisturbed(self.model):\n                logps", "with torch.no_grad():\n                logps"),
        ('"train/z0_raw": raw * weight', '"train/z0_raw": z0 * weight'),
        ('"train/z0_clamped": (raw < 0) * weight', '"train/z0_clamped": (raw > 0) * weight'),
        (
            '"train/margin": reward[up].sum() / ups - reward[~up].sum() / downs',
            '"train/margin": reward[~up].sum() / downs - reward[up].sum() / ups',
        ),
        ('"train/reward_desirable": reward[up].sum() / ups', '"train/reward_desirable": reward[~up].sum() / ups'),
    ],
    ("stages/align/ppo.py", ("tests/stages/align/test_ppo.py",)): [
        ("delta_BT = rewards_BT + gamma * next_BT - values_BT", "delta_BT = rewards_BT + next_BT - values_BT"),
        ("running_B = delta_BT[:, t] + gamma * lam * running_B", "running_B = delta_BT[:, t] + lam * running_B"),
        (
            "gae(rewards_BT, values_BT, mask_BT, config.gamma, config.lam)",
            "gae(rewards_BT, values_BT, mask_BT, config.lam, config.gamma)",
        ),
        ("return advantages_BT, advantages_BT + values_BT", "return advantages_BT, advantages_BT"),
        ("clipped_N = ratio_N.clamp(1 - clip, 1 + clip)", "clipped_N = ratio_N.clamp(max=1 + clip)"),
        (
            "return torch.maximum(-advantages_N * ratio_N, -advantages_N * clipped_N), ratio_N",
            "return torch.minimum(-advantages_N * ratio_N, -advantages_N * clipped_N), ratio_N",
        ),
        ("clipped_N = old_values_N + (values_N - old_values_N).clamp(-clip, clip)", "clipped_N = values_N"),
        (
            "rewards_BT = -kl_coef * (logps_BT - reference_BT) * mask_BT",
            "rewards_BT = kl_coef * (logps_BT - reference_BT) * mask_BT",
        ),
        ("last_B1 = mask_BT.sum(1, keepdim=True).long() - 1", "last_B1 = mask_BT.sum(1, keepdim=True).long() - 2"),
        ("error = min(max(kl / target - 1, -0.2), 0.2)", "error = kl / target - 1"),
        ("return kl_coef * (1 + error * answers / horizon)", "return kl_coef * (1 - error * answers / horizon)"),
        (
            "centred_BT = (values_BT - (values_BT * mask_BT).sum() / count) * mask_BT",
            "centred_BT = values_BT - (values_BT * mask_BT).sum() / count",
        ),
        (
            "policy_loss(logps_N, micro.old_logps_N, micro.advantages_N, config.clip)",
            "policy_loss(logps_N, micro.old_logps_N, micro.advantages_N, config.value_clip)",
        ),
        (
            "value_loss(values_N, micro.old_values_N, micro.returns_N, config.value_clip)",
            "value_loss(values_N, micro.old_values_N, micro.returns_N, config.clip)",
        ),
        ("loss = loss + config.value_coef * value", "loss = loss + value"),
        (
            '"train/clip_fraction": ((ratio_N - 1).abs() > config.clip).sum() / tokens',
            '"train/clip_fraction": ((ratio_N - 1).abs() > config.value_clip).sum() / tokens',
        ),
        (
            '"train/value_clip_fraction"] = (moved_N > config.value_clip)',
            '"train/value_clip_fraction"] = (moved_N > config.clip)',
        ),
        ('"train/approx_kl": (ratio_N - 1 - (logps_N', '"train/approx_kl": (1 - ratio_N - (logps_N'),
        ('"train/ratio_max": ratio_N.max()', '"train/ratio_max": ratio_N.min()'),
        ("reference_BT, mask_BT, self.kl_coef)", "reference_BT, mask_BT, config.kl_coef)"),
        (
            "paid_B = scores_B - config.missing_end_penalty * (~ended_B)",
            "paid_B = scores_B - config.missing_end_penalty * ended_B",
        ),
        (
            'seeds=[seed_of(self.seed, "rollout", iteration, i) for i in mine]',
            'seeds=[seed_of(self.seed, "rollout", 0, i) for i in mine]',
        ),
        (
            "temperature=self.config.temperature,\n                seeds=",
            "temperature=1.0,\n                seeds=",
        ),
        ("                temperature = self.config.temperature\n", "                temperature = 1.0\n"),
        (
            "reference = sft(batch, temperature=temperature, log_probs=True)",
            "reference = sft(batch, temperature=1.0, log_probs=True)",
        ),
        ("number = rollout.iteration * self.config.ppo_epochs + epoch", "number = rollout.iteration"),
        ("rows = step_rows(len(self.rows), iteration, self", "rows = step_rows(len(self.rows), 0, self"),
        ('{"policy": 0.0 if self.is_critic_alone(step) else 1.0', '{"policy": 1.0'),
        ("return step < self.config.critic_alone * self.steps_per_iteration", "return step < self.config.critic_alone"),
        ("loss = loss + (0 * policy if alone else policy)", "loss = loss + policy"),
        ("advantages_N=whiten(advantages_BT, mask_BT)[mask_BT].float()", "advantages_N=advantages_BT[mask_BT].float()"),
        (
            "self.far = self.far + 1 if bound is not None and not kl <= bound else 0",
            "self.far = self.far + 1 if bound is not None and not kl <= bound else self.far",
        ),
        (
            "return float(1 - (returns_N - values_N).var(correction=0) / variance)",
            "return float(1 - (returns_N - values_N).square().mean() / variance)",
        ),
    ],
    ("stages/reward.py", ("tests/stages/test_reward.py",)): [
        ("return -F.logsigmoid(difference - margin)", "return -F.logsigmoid(difference + margin)"),
        ("return scores_A[winners] - scores_A[losers]", "return scores_A[losers] - scores_A[winners]"),
        ('weight = difference.new_tensor([1 / len(row["winners"]) for', "weight = difference.new_tensor([1.0 for"),
        (
            "right = (difference > 0) + 0.5 * (difference == 0)\n        metrics",
            "right = (difference < 0) + 0.5 * (difference == 0)\n        metrics",
        ),
        (
            '"train/margin": (weight * difference.detach()).sum()',
            '"train/margin": (-weight * difference.detach()).sum()',
        ),
        ("mean, std = fmean(scores), pstdev(scores)", "mean, std = 0.0, pstdev(scores)"),
        (
            'read_if_there(self.context.input("data"), "eval", "ranking")',
            'read_if_there(self.context.input("data"), "train", "ranking")',
        ),
        ("return 0.5 if difference == 0 else float(difference > 0)", "return float(difference > 0)"),
        ("trees.append(Tree(prompt, ((*body, codec.end_id),)))", "trees.append(Tree(prompt, (tuple(answer),)))"),
        (
            "    return [score for scores in method.per_answer(method.scores, trees) for score in scores]",
            "    return [score for scores in method.per_answer(method.scores, method.trees) for score in scores]",
        ),
    ],
    ("stages/engine/training/optimizers.py", ("tests/engine/test_loop.py",)): [
        ('"weight_decay": training.weight_decay})', '"weight_decay": 0.0})'),
        ('"params": rest, "weight_decay": 0.0', '"params": rest, "weight_decay": training.weight_decay'),
        ("eps=training.adam_eps, fused", "eps=1e-8, fused"),
        ("betas = (training.adam_beta1, training.adam_beta2)", "betas = (training.adam_beta2, training.adam_beta1)"),
        ("addcmul_(gradient, gradient, value=1 - beta2)", "addcmul_(gradient, gradient, value=beta2)"),
        ("weight.ndim < 2 or weight.numel() < SMALL", "weight.ndim < 2 and weight.numel() < SMALL"),
    ],
    ("stages/engine/training/loop.py", ("tests/engine/test_loop.py",)): [
        ("min(1.0, (at + size) / (warmup + size))", "at / warmup"),
        ("done = (at - warmup) / max(1, end - warmup)", "done = at / end"),
        ('"linear": 1.0 - done', '"linear": done'),
        ("0.5 * (1.0 + math.cos(math.pi * done))", "1.0 + math.cos(math.pi * done)"),
        ('group["lr"] = rate * factors[group["part"]]', 'group["lr"] = rate'),
        (
            "norm = torch.nn.utils.clip_grad_norm_(self.method.model.parameters(), self.training.max_grad_norm)",
            "norm = torch.nn.utils.clip_grad_norm_(self.method.model.parameters(), 1e9)",
        ),
        ('return values.max() if name.endswith("_max") else values.sum()', "return values.sum()"),
        (
            'self.step, self.compute, self.last = state["step"], state["compute"], state["last"]',
            'self.step, self.compute, self.last = state["step"] - 1, state["compute"], state["last"]',
        ),
        ('self.method.load_state_dict(own["method"])', "None"),
    ],
    ("stages/engine/models/logprobs.py", ("tests/engine/test_models.py",)): [
        (
            "logps_N[rows] = logits_RV.gather(-1, labels_N[rows, None]).squeeze(-1) - normaliser_N[rows]",
            "logps_N[rows] = logits_RV.gather(-1, labels_N[rows, None]).squeeze(-1)",
        ),
        ("entropy_N[rows] = normaliser_N[rows] - mean_R", "entropy_N[rows] = mean_R - normaliser_N[rows]"),
        (
            "parts.append((own_RV.exp() * (own_RV - reference(part))).sum(-1))",
            "parts.append((own_RV - reference(part)).sum(-1))",
        ),
        ("bias_V) / temperature).log_softmax(-1)", "bias_V)).log_softmax(-1)"),
        ("grad_RV *= grad_N[rows, None]", "pass"),
    ],
    ("stages/engine/sampling.py", ("tests/engine/test_sampling.py",)): [
        ("torch.softmax(logits_BV.float() / temperature, -1)", "torch.softmax(logits_BV.float(), -1)"),
        ("right=True", "right=False"),
        (
            "numbers = [uniforms(seeds[i], max_new_tokens) for i in rows]",
            "numbers = [uniforms(seeds[0], max_new_tokens) for i in rows]",
        ),
        ("masks = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]", "masks = [[1] * width for p in prompts]"),
        ("go_on_B = ~torch.isin(token_B, stop_ids)", "go_on_B = torch.ones_like(token_B).bool()"),
    ],
    ("stages/engine/training/offline.py", ("tests/stages/align/test_dpo.py", "tests/stages/align/test_kto.py")): [
        ("gains = [[now - before for", "gains = [[before - now for"),
        ("(chosen > rejected) + 0.5", "(chosen < rejected) + 0.5"),
        (
            'rows = read_if_there(self.context.input("data"), "eval", self.kind)',
            'rows = read_if_there(self.context.input("data"), "train", self.kind)',
        ),
    ],
    ("stages/engine/scoring/metrics.py", ("tests/stages/test_evaluate.py",)): [
        ("return [float(s > b) + 0.5 * float(s == b) for", "return [float(s >= b) for"),
    ],
}
"""File and tests -> lines with their mistakes."""

MUTANTS = [
    Mutant(file, old, new, tests)
    for listed in (
        conclusions.BY_FILE,
        conversations.BY_FILE,
        fewer_bits.BY_FILE,
        shards.BY_FILE,
        surfaces.BY_FILE,
        BY_FILE,
    )
    for (file, tests), pairs in listed.items()
    for old, new in pairs
]
