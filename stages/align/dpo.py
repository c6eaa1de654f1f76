"""Direct preference optimisation (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290) and its variants.

Left out of the paper's method, or changed:
1. RMSprop: the loop's AdamW and schedule train every method alike.
2. A reference model kept in memory: its log-probs never change, so they are computed once and cached.

Suffixes: P pairs, 2 the chosen and the rejected answer.
"""

import torch.nn.functional as F
from torch import Tensor

from schemas.config import methods
from stages.engine.data.examples import Row
from stages.engine.training.method import Metrics, Totals
from stages.engine.training.offline import Micro, OfflineAlignment
from stages.runtime.context import StageContext


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
