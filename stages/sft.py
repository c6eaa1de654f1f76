"""Supervised fine-tuning: maximum likelihood of the answer and the token that ends it, given the prompt.

The prompt is read and not learned; with `learn: all` the assistant's turns in it are learned too. A step's loss is the
mean over all its learned tokens, however it is cut: a long answer, or a row of many turns, weighs as much as it has.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from schemas.config import SFTConfig
from schemas.config.data import Learn
from stages.engine.data.codec import Codec
from stages.engine.data.examples import Example, Row, encode_sft
from stages.engine.scoring.by_source import by_source
from stages.engine.training.loop import train_and_publish
from stages.engine.training.method import Metrics, Totals
from stages.engine.training.offline import Micro, PolicyMethod
from stages.runtime.context import StageContext


def sft_loss(logps_N: Tensor, tokens: Tensor) -> Tensor:
    """Summand of the step's mean negative log-prob per learned token, in nats; `tokens` counts the whole step's."""
    return -logps_N.sum() / tokens


class SFT(PolicyMethod):
    """Learns from single answers, or from all of a conversation's."""

    kind = "sft"

    def __init__(self, config: SFTConfig, context: StageContext) -> None:
        self.learn: Learn = config.learn
        super().__init__(config, context)
        if config.learn == "all":
            rows = len({id(example.row) for example in self.examples})
            context.metrics({"data/turns_apart": len(self.examples) - rows})

    def encoded(self, rows: Sequence[Row], codec: Codec) -> list[Example]:
        return encode_sft(rows, self.learn, codec)

    @staticmethod
    def answers(row: Row) -> list[str]:
        return [row["response"]]

    def prepare(self, micros: list[Micro]) -> Totals:
        """This rank's learned tokens of the step."""
        return {"tokens": self.scalar(sum(len(micro.batch.labels_N) for micro in micros))}

    def loss(self, micro: Micro, totals: Totals) -> tuple[Tensor, Metrics]:
        logps_N = self.model(micro.batch).logps_N
        return sft_loss(logps_N, totals["tokens"]), {"compute/train_tokens": self.scalar(micro.batch.tokens)}

    def held_out_metrics(self) -> dict[str, float]:
        """The mean negative log-prob per learned token of the held-out rows, in nats, and its perplexity.

        Of a mixture for each source too.
        """
        examples, measured_all = self.held_out_examples(), dict[str, float]()
        if not examples:
            return {}
        values = self.per_answer(self.logps, [example.tree for example in examples])
        logps = [(sum(logps), example.tree.learned) for logps, example in zip(values, examples, strict=True)]
        rows = [example.row for example in examples]
        for source, some in by_source(rows, zip(rows, logps, strict=True)).items():
            measured = _mean_loss([logp for _, logp in some])
            measured["rows"] = float(len({id(row) for row, _ in some}))  # of one row come several turns, learned apart
            measured_all |= {f"eval/{source}/{name}": value for name, value in measured.items()}
        return measured_all | {f"eval/{name}": value for name, value in _mean_loss(logps).items()}


def _mean_loss(logps: list[tuple[float, int]]) -> dict[str, float]:
    """Mean over all tokens, in nats, of rows' log-probs and their numbers of learned tokens; and its perplexity."""
    loss = -sum(logp for logp, _ in logps) / sum(tokens for _, tokens in logps)
    return {"loss": loss, "perplexity": math.exp(loss)}


def run(context: StageContext) -> dict[str, float]:
    """Train on the data's `sft` rows, measure on its held-out ones, publish the merged model."""
    config = SFTConfig.model_validate(context.request.params)
    return train_and_publish(SFT(config, context), context)
