"""What the methods that learn from fixed rows share: their batches, a no-grad pass, and the cached reference.

Suffixes: N answer tokens, A answers of a batch, in the order of its rows and their answers.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from schemas.config.data import Kind
from schemas.config.methods import MethodConfig
from schemas.config.training import Training, steps_for
from stages.engine.data.codec import Codec
from stages.engine.data.examples import Example, Row, encode, fitting, longest, read, read_if_there
from stages.engine.data.order import step_rows
from stages.engine.data.trees import Batch, Layout, Tree, collate, cut, tree_tokens
from stages.engine.distributed import rank, share, world
from stages.engine.models.layouts import choose_and_shard
from stages.engine.models.loading import load_policy
from stages.engine.models.policy import Policy, Scorer, context_length, sums
from stages.engine.models.saving import save_policy
from stages.engine.scoring.batched import over_trees
from stages.engine.scoring.by_source import by_source
from stages.engine.scoring.reference_cache import ReferenceCache
from stages.engine.training.method import Metrics, Totals
from stages.runtime.context import StageContext

log = logging.getLogger("alignflow")

HELD_OUT = 256
"""Rows on which the fall of the liked answers' log-prob is measured."""
LARGE_FALL = 1.0
"""Nats per token: beyond it, liked tokens have become e times less likely on average, which is unusual."""


@dataclass(frozen=True)
class Micro:
    """Rows of one forward pass, by their numbers among the method's examples, and their tokens."""

    rows: list[int]
    batch: Batch


class OfflineMethod(ABC):
    """A method on fixed examples: a subclass adds `loss`, and `prepare` where rows are not its denominator.

    It has no state that training depends on: which rows a step sees is a function of (seed, step).
    """

    def __init__(
        self,
        model: Policy | Scorer,
        codec: Codec,
        examples: Sequence[Example],
        training: Training,
        context: StageContext,
    ) -> None:
        self.model: nn.Module = model
        self.codec, self.training, self.context, self.seed = codec, training, context, context.request.seed
        self.limit = min(training.max_length, context_length(model.plain) or training.max_length)
        self.examples = fitting(examples, training.max_length, context_length(model.plain))
        context.metrics({"data/rows": len(self.examples), "data/too_long": len(examples) - len(self.examples)})
        data = context.request.inputs["data"]
        context.dataset("data", data.uri, data.sha256, len(self.examples))
        self.trees = [example.tree for example in self.examples]
        self.layout: Layout = choose_and_shard(model, training, training.layout, self.trees[:8], codec.pad_id)
        context.tag("layout", self.layout)
        context.tag("held", model.held)
        self.total_steps = steps_for(len(self.trees), training)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def scalar(self, value: float) -> Tensor:
        """A number where the model is, for totals and metrics."""
        return torch.tensor(float(value), device=self.device)

    def size(self, row: int) -> int:
        """Tokens of one row in a forward pass, for the micro-batches' budget."""
        return tree_tokens(self.trees[row], self.layout)

    def collate(self, trees: Sequence[Tree]) -> Batch:
        """Token tensors of some trees, where the model is."""
        return collate(trees, self.layout, self.codec.pad_id).to(self.device)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"model": list(self.model.parameters())}

    def rate_factors(self, step: int) -> dict[str, float]:
        return {"model": 1.0}

    def batches(self, start: int) -> Iterator[list[Micro]]:
        """This rank's micro-batches of every step from `start` on; rows of similar length are together."""
        for step in range(start, self.total_steps):
            rows = share(step_rows(len(self.trees), step, self.training.batch_size, self.seed), rank(), world())
            rows.sort(key=self.size)
            groups = cut([self.size(row) for row in rows], self.training.tokens_per_micro_batch)
            yield [self.micro([rows[i] for i in group]) for group in groups]

    def micro(self, rows: list[int]) -> Micro:
        """The micro-batch of some rows."""
        return Micro(rows, self.collate([self.trees[row] for row in rows]))

    def prepare(self, micros: list[Micro]) -> Totals:
        """How many rows this rank has in the step."""
        return {"rows": self.scalar(sum(len(micro.rows) for micro in micros))}

    @abstractmethod
    def loss(self, micro: Micro, totals: Totals) -> tuple[Tensor, Metrics]: ...

    def after_step(self, metrics: dict[str, float]) -> dict[str, float]:
        return {}

    def held_out_metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"an offline method has no state, but was given {sorted(state)}")

    def per_answer(self, values: Callable[[Batch], Tensor], trees: Sequence[Tree]) -> list[list[float]]:
        """`values` (A numbers of a batch) over many trees: a list per tree, a number per answer."""
        budget, pad_id = self.training.tokens_per_micro_batch, self.codec.pad_id
        batches = over_trees(self.model, values, trees, self.layout, budget, pad_id, by_size=False)
        return [numbers for batch in batches for numbers in batch.values()]


class PolicyMethod(OfflineMethod):
    """An offline method that trains a policy on the log-probs of given answers."""

    kind: ClassVar[Kind]
    """Which rows of the data it learns from."""

    def __init__(self, config: Training, context: StageContext) -> None:
        rows = read(context.input("data"), "train", self.kind)
        codec = Codec.load(context.input("model"))
        self.policy = load_policy(context.input("model"), config, seed=context.request.seed)
        super().__init__(self.policy, codec, self.encoded(rows, codec), config, context)

    def encoded(self, rows: Sequence[Row], codec: Codec) -> list[Example]:
        """The rows' tokens. Called before the method is whole."""
        return encode(rows, self.answers, codec)

    @staticmethod
    @abstractmethod
    def answers(row: Row) -> list[str]:
        """The answers of a row that the method learns from."""

    @staticmethod
    def is_liked(row: Row) -> bool:
        """Whether the first of a row's answers is one to make likelier."""
        return True

    def logps(self, batch: Batch) -> Tensor:
        """log pi(y|x) of the batch's answers, A."""
        return sums(self.model(batch).logps_N, batch.answer_N, batch.answers)

    def held_out_examples(self) -> list[Example]:
        """The held-out rows that are short enough and whose first answer is liked; none where the data holds none."""
        rows = read_if_there(self.context.input("data"), "eval", self.kind)
        examples = self.encoded([row for row in rows if self.is_liked(row)], self.codec)
        return [example for example in examples if longest(example.tree) <= self.limit]

    def held_out(self) -> list[Tree]:
        """The trees of `held_out_examples`."""
        return [example.tree for example in self.held_out_examples()]

    def finish(self, folder: Path) -> dict[str, float]:
        save_policy(self.policy, self.codec, folder, base=self.context.request.inputs["model"].sha256)
        return self.held_out_metrics()


class OfflineAlignment(PolicyMethod):
    """A policy that learns from fixed answers and is held to its own start: the reference."""

    def __init__(self, config: MethodConfig, context: StageContext) -> None:
        super().__init__(config, context)
        self.reference = self.reference_logps(self.trees)
        held_out = self.held_out_examples()[:HELD_OUT]
        self.test, self.test_rows = [example.tree for example in held_out], [example.row for example in held_out]
        self.test_reference = self.reference_logps(self.test)

    def reference_logps(self, trees: Sequence[Tree]) -> list[list[float]]:
        """log pi_ref(y|x), a list per tree, a number per answer; cached.

        Called before training only: without adapters to switch off, the policy itself is the reference then.
        """

        def progress(done: int, total: int) -> None:
            self.context.progress(done, total, "answers scored by the reference")

        cache = ReferenceCache(self.context.request.inputs["model"].sha256, self.policy.numbers)
        budget, pad_id = self.training.tokens_per_micro_batch, self.codec.pad_id
        with self.policy.reference() if self.training.lora else nullcontext():
            return cache.logps(self.policy, trees, self.layout, budget, pad_id, progress)

    def held_out_metrics(self) -> dict[str, float]:
        """How much likelier the held-out liked answers are now, in nats, of a mixture for each source too; and of pairs
        the share whose chosen answer has gained more log-prob than the rejected one.
        """
        if not self.test:
            return {}
        after = self.per_answer(self.logps, self.test)
        both = zip(after, self.test_reference, strict=True)
        gains = [[now - before for now, before in zip(*answers, strict=True)] for answers in both]
        changes = [gain[0] for gain in gains]
        measured = {"eval/chosen_logp_change": fmean(changes)}
        pairs = [
            (chosen > rejected) + 0.5 * (chosen == rejected) for chosen, *others in gains for rejected in others[:1]
        ]
        measured |= {"eval/accuracy": fmean(pairs)} if pairs else {}
        for source, some in by_source(self.test_rows, changes).items():
            measured |= {f"eval/{source}/chosen_logp_change": fmean(some), f"eval/{source}/rows": float(len(some))}
        return measured

    def finish(self, folder: Path) -> dict[str, float]:
        """Says so where the held-out liked answers are less likely now, as such methods often make them."""
        measured = super().finish(folder)
        change = measured.get("eval/chosen_logp_change", 0.0)
        if change < 0:
            per_token = -change / fmean(len(tree.answers[0]) for tree in self.test)
            log.log(
                logging.WARNING if per_token > LARGE_FALL else logging.INFO,
                "the log-prob of held-out chosen answers fell by %.2f nats on average (%.2f per token), as it often "
                "does with offline methods, where liked answers lose and disliked ones more: watch eval/reference_nll "
                "and the answers, and if they degrade raise beta or lower the learning rate",
                -change,
                per_token,
            )
        return measured
