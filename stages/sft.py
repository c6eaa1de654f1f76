"""Supervised fine-tuning: maximum likelihood of the answer and the token that ends it, given the prompt.

The prompt is read and not learned. A step's loss is the mean over all its answer tokens, however it is cut.
"""

import math
from pathlib import Path

from torch import Tensor

from schemas.config import SFTConfig
from stages.engine.data.examples import Row
from stages.engine.scoring.by_source import by_source
from stages.engine.training.loop import train_and_publish
from stages.engine.training.method import Metrics, Totals
from stages.engine.training.offline import Micro, PolicyMethod
from stages.runtime.context import StageContext


def sft_loss(logps_N: Tensor, tokens: Tensor) -> Tensor:
    """Summand of the step's mean negative log-prob per answer token, in nats; `tokens` counts the whole step's."""
    return -logps_N.sum() / tokens


class SFT(PolicyMethod):
    """Learns from single answers."""

    kind = "sft"

    @staticmethod
    def answers(row: Row) -> list[str]:
        return [row["response"]]

    def prepare(self, micros: list[Micro]) -> Totals:
        """This rank's answer tokens of the step."""
        return {"tokens": self.scalar(sum(len(micro.batch.labels_N) for micro in micros))}

    def loss(self, micro: Micro, totals: Totals) -> tuple[Tensor, Metrics]:
        logps_N = self.model(micro.batch).logps_N
        return sft_loss(logps_N, totals["tokens"]), {"compute/train_tokens": self.scalar(micro.batch.tokens)}

    def finish(self, folder: Path) -> dict[str, float]:
        """Adds the mean negative log-prob per answer token of the held-out rows, in nats, and its perplexity.

        Of a mixture for each source too.
        """
        saved, examples = super().finish(folder), self.held_out_examples()
        if not examples:
            return saved
        values = self.per_answer(self.logps, [example.tree for example in examples])
        logps = [(logp, len(example.tree.answers[0])) for (logp,), example in zip(values, examples, strict=True)]
        for source, some in by_source([example.row for example in examples], logps).items():
            saved |= {f"eval/{source}/{name}": value for name, value in _mean_loss(some).items()}
            saved[f"eval/{source}/rows"] = float(len(some))
        return saved | {f"eval/{name}": value for name, value in _mean_loss(logps).items()}


def _mean_loss(logps: list[tuple[float, int]]) -> dict[str, float]:
    """Mean over all tokens, in nats, of answers' log-probs and their numbers of tokens; and its perplexity."""
    loss = -sum(logp for logp, _ in logps) / sum(tokens for _, tokens in logps)
    return {"loss": loss, "perplexity": math.exp(loss)}


def run(context: StageContext) -> dict[str, float]:
    """Train on the data's `sft` rows, measure on its held-out ones, publish the merged model."""
    config = SFTConfig.model_validate(context.request.params)
    return train_and_publish(SFT(config, context), context)
