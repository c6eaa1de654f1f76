"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306).

Left out of the paper's method, or changed:
1. The mismatched answer of the KL estimate is drawn from another prompt explicitly, once per row, where the paper
   shifts the answers of a micro-batch by one: in data unpaired from pairs, a neighbour often shares the prompt.
2. z0 is taken over the whole optimizer step and all ranks, not over a micro-batch, so that neither changes the result.
"""

import logging
import random
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from schemas.config import methods
from schemas.errors import refuse
from stages.engine.data.examples import Row
from stages.engine.data.trees import Tree, tree_tokens
from stages.engine.models.sharding import missing
from stages.engine.scoring.batched import undisturbed
from stages.engine.training.method import Metrics, Totals
from stages.engine.training.offline import Micro, OfflineAlignment
from stages.runtime.context import StageContext

log = logging.getLogger("alignflow")


MOSTLY = 0.9
"""Share of steps with a clamped z0 from which on a person is told."""


def kto_loss(log_ratio: Tensor, desirable: Tensor, z0: Tensor, beta: float, weights: tuple[float, float]) -> Tensor:
    """Loss per answer, lambda_y - v(x, y): eq. 8 of the paper.

    log_ratio = log pi(y|x) / pi_ref(y|x) in nats; desirable: bool; weights: (lambda_D, lambda_U).
    """
    z0 = z0.detach()
    gain = torch.where(desirable, log_ratio - z0, z0 - log_ratio)
    up = desirable.to(log_ratio.dtype)
    weight = weights[0] * up + weights[1] * (1 - up)
    return weight * (1 - torch.sigmoid(beta * gain))


def reference_point(kl_sum: Tensor, count: Tensor) -> Tensor:
    """z0 = max(0, mean log pi/pi_ref over mismatched answers); the paper's section 4.1. No answers: 0."""
    return (kl_sum / count.clamp(min=1)).clamp(min=0).detach()


def class_weights(up: int, down: int, desirable: float | None, undesirable: float | None) -> tuple[float, float]:
    """(lambda_D, lambda_U). What is not given is chosen so that both classes weigh the same; with neither, mean 1."""
    if desirable is None and undesirable is None:
        both = up > 0 and down > 0
        return ((up + down) / (2 * up), (up + down) / (2 * down)) if both else (1.0, 1.0)
    ratio = down / up if up and down else 1.0
    if undesirable is not None:
        return (undesirable * ratio if desirable is None else desirable), undesirable
    assert desirable is not None
    return desirable, desirable / ratio


def partners(prompt_ids: Sequence[str], seed: int) -> list[int]:
    """For every row another row whose prompt differs: a function of (seed, row), the same in every epoch.

    Raises StageError when all rows share one prompt.
    """
    by_prompt = sorted(range(len(prompt_ids)), key=lambda row: prompt_ids[row])
    ordered = [prompt_ids[row] for row in by_prompt]
    others_of = []
    for row, prompt in enumerate(prompt_ids):
        first, end = bisect_left(ordered, prompt), bisect_right(ordered, prompt)
        others = len(ordered) - (end - first)
        if not others:
            message = "KTO needs answers to at least two different prompts: its KL estimate pairs one with another."
            fix = "give rows of more prompts, or use another method"
            raise refuse("data.feedback", f"{len(prompt_ids)} rows with one prompt", message, fix, kind="data")
        drawn = random.Random(f"mismatched/{seed}/{row}").randrange(others)
        others_of.append(by_prompt[drawn if drawn < first else drawn + end - first])
    return others_of


class KTO(OfflineAlignment):
    """Learns from single answers with a thumb up or down."""

    kind = "feedback"

    def __init__(self, config: methods.KTO, context: StageContext) -> None:
        super().__init__(config, context)
        self.config = config
        self.up = [bool(example.row["label"]) for example in self.examples]
        ups = sum(self.up)
        if ups in (0, len(self.up)):
            log.warning(
                "all %d rows have a thumb %s: KTO learns from both kinds", len(self.up), "up" if ups else "down"
            )
        given = (config.desirable_weight, config.undesirable_weight)
        self.weights = class_weights(ups, len(self.up) - ups, *given)
        context.metrics(dict(zip(("data/desirable_weight", "data/undesirable_weight"), self.weights, strict=True)))
        self.steps = self.clamped = 0
        """Optimizer steps so far, and those in which the KL estimate was below 0."""
        others = partners([example.row["prompt_id"] for example in self.examples], self.seed)
        room = [self.limit - len(tree.prompt) for tree in self.trees]
        self.mismatched = [
            Tree(tree.prompt, (self.trees[other].answers[0][:tokens],))
            for tree, other, tokens in zip(self.trees, others, room, strict=True)
        ]
        """Each row's prompt with the answer of another prompt, cut where it would be too long."""
        self.mismatched_reference = self.reference_logps(self.mismatched)

    @staticmethod
    def answers(row: Row) -> list[str]:
        return [row["completion"]]

    @staticmethod
    def is_liked(row: Row) -> bool:
        return bool(row["label"])

    def size(self, row: int) -> int:
        return max(super().size(row), tree_tokens(self.mismatched[row], self.layout))

    @torch.no_grad()
    def prepare(self, micros: list[Micro]) -> Totals:
        """Counts, and the sum of log pi/pi_ref over the step's mismatched answers."""
        rows = [row for micro in micros for row in micro.rows]
        ups, kl = sum(self.up[row] for row in rows), self.scalar(0)
        added = missing(self.model, len(micros))
        for i, micro in enumerate([*micros, *micros[-1:] * added]):
            with undisturbed(self.model):
                logps = self.logps(self.collate([self.mismatched[row] for row in micro.rows]))
            if i >= len(micros):
                continue
            kl += (logps - logps.new_tensor([self.mismatched_reference[row][0] for row in micro.rows])).sum()
        counts = {"rows": len(rows), "up": ups, "down": len(rows) - ups}
        return {"kl": kl, **{name: self.scalar(count) for name, count in counts.items()}}

    def loss(self, micro: Micro, totals: Totals) -> tuple[Tensor, Metrics]:
        logps = self.logps(micro.batch)
        ratio = logps - logps.new_tensor([self.reference[row][0] for row in micro.rows])
        up = torch.tensor([self.up[row] for row in micro.rows], device=self.device)
        z0, raw = reference_point(totals["kl"], totals["rows"]), totals["kl"] / totals["rows"]
        weight = len(micro.rows) / totals["rows"]
        reward, ups, downs = self.config.beta * ratio.detach(), totals["up"].clamp(min=1), totals["down"].clamp(min=1)
        metrics = {
            "train/z0": z0 * weight,
            "train/z0_raw": raw * weight,
            "train/z0_clamped": (raw < 0) * weight,
            "train/reward_desirable": reward[up].sum() / ups,
            "train/reward_undesirable": reward[~up].sum() / downs,
            "train/margin": reward[up].sum() / ups - reward[~up].sum() / downs,
            "compute/train_tokens": self.scalar(micro.batch.tokens),
        }
        losses = kto_loss(ratio, up, z0, self.config.beta, self.weights)
        return losses.sum() / totals["rows"], metrics

    def after_step(self, metrics: dict[str, float]) -> dict[str, float]:
        self.steps, self.clamped = self.steps + 1, self.clamped + round(metrics["train/z0_clamped"])
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "clamped": self.clamped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.clamped = state["steps"], state["clamped"]

    def finish(self, folder: Path) -> dict[str, float]:
        """Says so where the KL estimate did nothing."""
        if self.steps and self.clamped >= MOSTLY * self.steps:
            log.warning(
                "KTO's estimate of the KL was below 0, and z0 therefore 0, in %d of %d steps: the policy makes answers "
                "to other prompts less likely, and the loss has lost its reference point (KTO without z0). Watch "
                "train/z0_raw, and raise beta or lower the learning rate",
                self.clamped,
                self.steps,
            )
        return super().finish(folder)
