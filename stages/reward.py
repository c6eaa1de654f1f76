"""The reward model: Bradley-Terry scores from pairs and rankings (Ouyang et al. 2022, https://arxiv.org/abs/2203.02155).

Left out of the paper's method, or changed:
1. Ties are left out, as in the paper's labelling.
2. Scores are shifted to mean 0 on answers of the reference policy, and scaled to standard deviation 1 too.

Suffixes: A answers of a batch, P comparisons of a batch.
"""

import logging
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import fmean, pstdev

import torch
import torch.nn.functional as F
from torch import Tensor

from schemas.config import RewardConfig
from schemas.errors import refuse
from stages.engine.data.codec import Codec
from stages.engine.data.examples import Example, Row, encode, longest, read, read_if_there
from stages.engine.data.order import order
from stages.engine.data.trees import Batch, Tree
from stages.engine.models.loading import load_policy, load_scorer
from stages.engine.models.saving import save_scorer
from stages.engine.models.sharding import shard, whole
from stages.engine.sampling import sample, seed_of
from stages.engine.scoring.by_source import by_source
from stages.engine.training.loop import train_and_publish
from stages.engine.training.method import Metrics, Totals
from stages.engine.training.offline import Micro, OfflineMethod
from stages.runtime.context import StageContext

log = logging.getLogger("alignflow")

SAMPLES = 256  # answers of the reference policy that set the scores' mean and standard deviation
SAMPLE_TOKENS = 128  # at most; else the longest answer of the data
BINS = 10
MARGIN_MAX = 3.0  # of "significantly better" in Llama 2, table 27


def reward_loss(difference: Tensor, margin: Tensor) -> Tensor:
    """-log sigmoid(r_winner - r_loser - margin) per comparison: eq. 1 of the paper; the margin is Llama 2's eq. 2."""
    return -F.logsigmoid(difference - margin)


def calibration_error(differences: Sequence[float]) -> float:
    """Expected calibration error (Guo et al. 2017, eq. 3) of sigmoid(|r_winner - r_loser|) as the chance to be right.

    `BINS` equal bins over [1/2, 1]; a tie is half right.
    """
    confidence = torch.tensor(differences, dtype=torch.float64).abs().sigmoid()
    right = torch.tensor([_right(d) for d in differences], dtype=torch.float64)
    bins = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, right - confidence)
    return float(gaps.abs().sum() / len(differences))


def margin_scale(rows: Iterable[Row]) -> float:
    """What margins are multiplied by: 1, or what makes the largest MARGIN_MAX."""
    largest = max((margin or 0.0 for row in rows for margin in row.get("margins") or []), default=0.0)
    if largest <= MARGIN_MAX:
        return 1.0
    log.info(
        "margins are multiplied by %.3g, so that the largest, %.3g, becomes %g",
        MARGIN_MAX / largest,
        largest,
        MARGIN_MAX,
    )
    return MARGIN_MAX / largest


def _right(difference: float) -> float:
    return 0.5 if difference == 0 else float(difference > 0)


def _answers(row: Row) -> list[str]:
    return row["responses"]


class Reward(OfflineMethod):
    """Learns from all comparisons of a prompt together, one forward per answer."""

    def __init__(self, config: RewardConfig, context: StageContext) -> None:
        rows = read(context.input("data"), config.rows, "ranking")
        codec = Codec.load(context.input("model"))
        self.scorer = load_scorer(context.input("model"), config, seed=context.request.seed)
        super().__init__(self.scorer, codec, _examples(rows, config, codec), config, context)
        self.margin_scale = margin_scale(example.row for example in self.examples) if config.margin else 0.0

    def differences(self, scores_A: Tensor, rows: Sequence[Row]) -> Tensor:
        """r_winner - r_loser of every comparison of the rows, in order, P."""
        starts = [0, *accumulate(len(row["responses"]) for row in rows)]
        winners = [start + i for start, row in zip(starts, rows, strict=False) for i in row["winners"]]
        losers = [start + i for start, row in zip(starts, rows, strict=False) for i in row["losers"]]
        return scores_A[winners] - scores_A[losers]

    def loss(self, micro: Micro, totals: Totals) -> tuple[Tensor, Metrics]:
        rows = [self.examples[row].row for row in micro.rows]
        difference = self.differences(self.model(micro.batch), rows)
        # What each comparison's difference must exceed; 0 where margins are not asked for or not given.
        margins = [m or 0.0 for row in rows for m in row.get("margins") or [0.0] * len(row["winners"])]
        margin = difference.new_tensor([self.margin_scale * m for m in margins])
        weight = difference.new_tensor([1 / len(row["winners"]) for row in rows for _ in row["winners"]])
        right = (difference > 0) + 0.5 * (difference == 0)
        metrics = {
            "train/accuracy": (weight * right).sum() / totals["rows"],
            "train/margin": (weight * difference.detach()).sum() / totals["rows"],
            "compute/train_tokens": self.scalar(micro.batch.tokens),
        }
        return (weight * reward_loss(difference, margin)).sum() / totals["rows"], metrics

    def scores(self, batch: Batch) -> Tensor:
        return self.model(batch)

    def finish(self, folder: Path) -> dict[str, float]:
        """Save with scores of mean 0 and standard deviation 1; returns what they were, and the held-out accuracy."""
        measured, scores = self.held_out_metrics(), reference_scores(self)
        mean, std = fmean(scores), pstdev(scores)
        if std < 1e-6:
            log.warning("the reward model gives all %d sampled answers the same score: it is not scaled", len(scores))
            std = 1.0
        base = self.context.request.inputs["model"].sha256
        save_scorer(self.scorer, self.codec, folder, mean, std, base=base)
        return measured | {"data/score_mean": mean, "data/score_std": std}

    def held_out_metrics(self) -> dict[str, float]:
        """Accuracy and calibration on the held-out comparisons; of a mixture for each source too."""
        rows = [row for row in read_if_there(self.context.input("data"), "eval", "ranking") if row["winners"]]
        examples = [e for e in encode(rows, _answers, self.codec) if longest(e.tree) <= self.limit]
        scores = self.per_answer(self.scores, [example.tree for example in examples])
        pairs = [  # equal answers are a tie: their scores may differ by rounding, which depends on the batch's layout
            (example, 0.0 if example.tree.answers[win] == example.tree.answers[lose] else score[win] - score[lose])
            for score, example in zip(scores, examples, strict=True)
            for win, lose in zip(example.row["winners"], example.row["losers"], strict=True)
        ]
        if not pairs:
            return {}
        differences = [difference for _, difference in pairs]
        measured = {f"eval/{name}": value for name, value in _measures(differences).items()}
        for source, some in by_source([example.row for example, _ in pairs], differences).items():
            measured |= {f"eval/{source}/{name}": value for name, value in _measures(some).items()}
        return measured


def _measures(differences: Sequence[float]) -> dict[str, float]:
    """Of r_winner - r_loser per comparison: the share that is right, the calibration error, and how many there are."""
    error = calibration_error(differences)
    return {"accuracy": fmean(map(_right, differences)), "calibration": error, "pairs": len(differences)}


def _examples(rows: Sequence[Row], config: RewardConfig, codec: Codec) -> list[Example]:
    """Examples of the rows. Raises StageError when they have no margins where asked for."""
    if config.margin and not any(m is not None for row in rows for m in row.get("margins") or []):
        fix = "set it to false, or name the column of the margins in data.preference.columns"
        raise refuse("reward.margin", True, "no row has a margin.", fix, kind="data")
    return encode(rows, _answers, codec)


def reference_scores(method: Reward) -> list[float]:
    """Scores of answers that the reference policy (the stage's `model`) gives to training prompts."""
    policy = shard(load_policy(method.context.input("model"), method.training, trainable=False), method.training)
    codec, longest_answer = method.codec, max(len(answer) for tree in method.trees for answer in tree.answers)
    new = min(SAMPLE_TOKENS, max(1, longest_answer - 1))  # the last one is the end
    prompts = list(dict.fromkeys(tree.prompt for tree in method.trees if len(tree.prompt) + new < method.limit))
    chosen = [prompts[i] for i in order(len(prompts), method.seed, epoch=0)[:SAMPLES]]
    with whole(policy) as one:
        answers = sample(
            one,
            chosen,
            max_new_tokens=new,
            temperature=1.0,
            seeds=[seed_of("reward", method.seed, i) for i in range(len(chosen))],
            stop_ids=codec.stop_ids,
            pad_id=codec.pad_id,
            progress=lambda done, total: method.context.progress(done, total, "answers to calibrate the reward scale"),
        )
    del policy, one
    trees: list[Tree] = []
    for prompt, answer in zip(chosen, answers, strict=True):
        body = answer[:-1] if answer[-1] in codec.stop_ids else answer
        # Cut or not, with the one end that all answers of the training had.
        trees.append(Tree(prompt, ((*body, codec.end_id),)))
    return [score for scores in method.per_answer(method.scores, trees) for score in scores]


def run(context: StageContext) -> dict[str, float]:
    """Train on rankings (pairs are rankings of two), measure on held-out ones, publish with scaled scores."""
    config = RewardConfig.model_validate(context.request.params)
    return train_and_publish(Reward(config, context), context)
