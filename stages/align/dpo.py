"""Direct preference optimisation (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290) and its variants.

Left out of the paper's method, or changed:
1. RMSprop: the loop's AdamW and schedule train every method alike.
2. A reference model kept in memory: its log-probs never change, so they are computed once and cached.

Suffixes: P pairs, 2 the chosen and the rejected answer.
"""

import logging
from pathlib import Path
from statistics import fmean

import torch.nn.functional as F
from torch import Tensor

from schemas import methods
from stages.engine.data.examples import Row
from stages.engine.training.method import Metrics, Totals
from stages.engine.training.offline import Micro, OfflineAlignment
from stages.runtime.context import StageContext

log = logging.getLogger("alignflow")

HELD_OUT = 256  # pairs on which the fall of the chosen log-prob is measured
LARGE_FALL = (
    1.0  # nats per token: beyond it, chosen tokens have become e times less likely on average, which is unusual
)


def dpo_loss(h: Tensor, beta: float, kind: str = "sigmoid", label_smoothing: float = 0.0) -> Tensor:
    """Loss per pair, of the difference of log-ratios that the paper's implicit rewards are beta times of.

    h = log pi(chosen)/pi_ref(chosen) - log pi(rejected)/pi_ref(rejected), in nats (for `ipo_mean`: nats per token).

    - sigmoid: eq. 7; with label smoothing cDPO (Mitchell 2023).
    - robust: the unbiased estimate under flipped labels (Chowdhury et al. 2024).
    - hinge: SLiC's loss (Zhao et al. 2023) on DPO's rewards, as Liu et al. 2023 (RSO) write it.
    - ipo_sum, ipo_mean: squared distance to 1 / (2 beta) (Azar et al. 2023, eq. 17), of summed or averaged log-probs.
    """
    right, flipped = -F.logsigmoid(beta * h), -F.logsigmoid(-beta * h)
    if kind == "sigmoid":
        return (1 - label_smoothing) * right + label_smoothing * flipped
    if kind == "robust":
        return ((1 - label_smoothing) * right - label_smoothing * flipped) / (1 - 2 * label_smoothing)
    if kind == "hinge":
        return F.relu(1 - beta * h)
    if kind in ("ipo_sum", "ipo_mean"):
        return (h - 1 / (2 * beta)) ** 2
    raise ValueError(f"no DPO loss is called {kind!r}")


class DPO(OfflineAlignment):
    """Learns from pairs."""

    kind = "preference"

    def __init__(self, config: methods.DPO, context: StageContext) -> None:
        super().__init__(config, context)
        self.config = config
        self.test = self.held_out()[:HELD_OUT]
        self.test_reference = self.reference_logps(self.test)

    @staticmethod
    def answers(row: Row) -> list[str]:
        return [row["chosen"], row["rejected"]]

    def loss(self, micro: Micro, totals: Totals) -> tuple[Tensor, Metrics]:
        reference = [self.reference[row] for row in micro.rows]
        logps_P2 = self.logps(micro.batch).view(-1, 2)
        ratio_P2 = logps_P2 - logps_P2.new_tensor(reference)
        if self.config.loss == "ipo_mean":
            ratio_P2 = ratio_P2 / micro.batch.lengths_A.view(-1, 2)
        h = ratio_P2[:, 0] - ratio_P2[:, 1]
        losses = dpo_loss(h, self.config.beta, self.config.loss, self.config.label_smoothing)
        summands = {
            "train/accuracy": (h > 0) + 0.5 * (h == 0),
            "train/margin": self.config.beta * h,
            "train/chosen_logp": logps_P2[:, 0],
            "train/rejected_logp": logps_P2[:, 1],
        }
        metrics = {name: value.sum() / totals["rows"] for name, value in summands.items()}
        return losses.sum() / totals["rows"], {**metrics, "compute/train_tokens": self.scalar(micro.batch.tokens)}

    def finish(self, folder: Path) -> dict[str, float]:
        """Adds how much likelier the held-out chosen answers are now, in nats: DPO often makes them less likely."""
        saved = super().finish(folder)
        if not self.test:
            return saved
        after = self.per_answer(self.logps, self.test)
        change = fmean(a[0] - b[0] for a, b in zip(after, self.test_reference, strict=True))
        if change < 0:
            per_token = -change / fmean(len(tree.answers[0]) for tree in self.test)
            log.log(
                logging.WARNING if per_token > LARGE_FALL else logging.INFO,
                "the log-prob of held-out chosen answers fell by %.2f nats on average (%.2f per token), as it often "
                "does with DPO, where both answers lose and the rejected more: watch eval/reference_nll and the "
                "answers, and if they degrade raise beta or lower the learning rate",
                -change,
                per_token,
            )
        return saved | {"eval/chosen_logp_change": change}
