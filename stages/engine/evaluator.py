"""A model under evaluation beside the SFT model: its answers, their distances and log-probs."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from schemas.config import EvaluateParams
from schemas.errors import refuse
from stages.engine.data.codec import Codec
from stages.engine.data.examples import Row, encode, fitting, has, read
from stages.engine.data.trees import Batch, Tree
from stages.engine.models.layouts import choose_layout
from stages.engine.models.loading import load_policy
from stages.engine.models.logprobs import exact_kl
from stages.engine.models.policy import Policy, context_length, sums
from stages.engine.sampling import sample, seed_of
from stages.engine.scoring import gate_evidence, metrics
from stages.engine.scoring.batched import over_trees, undisturbed
from stages.engine.scoring.evaluation_record import cluster_of
from stages.engine.scoring.reference_cache import ReferenceCache
from stages.runtime.context import StageContext

log = logging.getLogger("alignflow")

TOKENS_PER_BATCH = 8192  # of one forward pass that computes log-probs
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Answers:
    """Sampled answers: token ids with the stop token where one was reached, and their text."""

    ids: list[list[int]]
    texts: list[str]
    ended: list[bool]

    @property
    def lengths(self) -> list[int]:
        """Tokens without the end token."""
        return [len(ids) - ended for ids, ended in zip(self.ids, self.ended, strict=True)]


class Evaluator:
    """The model under evaluation beside the reference, with what both need to be asked.

    Raises StageError where the two cannot be read by the same tokens.
    """

    def __init__(self, context: StageContext, config: EvaluateParams) -> None:
        self.context, self.config = context, config
        self.codec = Codec.load(context.input("model"))
        self.policy = load_policy(context.input("model"), trainable=False, frozen=config.frozen)
        self.itself = context.request.inputs["model"].sha256 == context.request.inputs["reference"].sha256
        self.reference = (
            self.policy
            if self.itself
            else load_policy(context.input("reference"), trainable=False, frozen=config.frozen)
        )
        self.generated_tokens = 0
        self.asked: list[Row] = []
        """The rows of `prompts`, once they are read; those of a mixture have a source."""
        own, other = (p.plain.config.get_text_config().vocab_size for p in (self.policy, self.reference))
        if own != other:
            message = f"it knows {own} tokens, and the SFT model {other}: it was trained from another base model."
            fix = "compare models of one base; for a new base retrain under another name (promote.model)"
            raise refuse("inputs.model", context.request.name or "model", message, fix, kind="not_comparable")

    def release(self) -> None:
        """Free the models: nothing more is asked of them."""
        del self.policy, self.reference

    def prompts(self) -> list[Messages]:
        """The held-out prompts, each once, that leave room for an answer. Raises StageError when they are too few."""
        rows = read(self.context.input("data"), self.config.part, "prompt")
        first: dict[str, Row] = {}
        for row in rows:
            first.setdefault(row["prompt_id"], row)
        distinct = list(first.values())
        room = (context_length(self.policy.hf) or math.inf) - self.config.max_new_tokens
        kept = [row for row in distinct if len(self.codec.prompt(row["prompt"])) <= room]
        if len(kept) < len(distinct):
            log.warning(
                "%d of %d prompts leave no room for an answer: left out", len(distinct) - len(kept), len(distinct)
            )
        kept = kept[: self.config.limit]
        if len(kept) < self.config.min_prompts:
            message = f"only {len(kept)} held-out prompts to evaluate on."
            fix = f"hold out more (data.*.{self.config.part}_fraction, data.evaluation), or lower evaluate.min_prompts"
            if len(kept) == self.config.limit:
                fix = f"raise evaluate.limit, which is {self.config.limit}, or lower evaluate.min_prompts"
            if self.config.few_prompts == "refuse" or not kept:
                raise refuse("evaluate.min_prompts", self.config.min_prompts, message, fix, kind="too_few_prompts")
            if len(distinct) >= self.config.min_prompts:  # else `validate` has said it, once for all models
                log.warning("%s Differences will be hard to tell. Fix: %s", message, fix)
        self.asked = kept
        return [row["prompt"] for row in kept]

    def answer(
        self, prompts: Sequence[Messages], temperature: float, draws: int | None = None, policy: Policy | None = None
    ) -> Answers:
        """`draws` answers to each prompt (default: `samples_per_prompt`), one after the other; of the model, or of
        another `policy`.

        A seed is a function of the request's seed, the prompt's place and the draw, the same at each temperature.
        """
        draws = draws or self.config.samples_per_prompt
        ids = sample(
            policy or self.policy,
            [self.codec.prompt(prompt) for prompt in prompts for _ in range(draws)],
            max_new_tokens=self.config.max_new_tokens,
            temperature=temperature,
            seeds=[
                seed_of("evaluate", self.context.request.seed, i, k) for i in range(len(prompts)) for k in range(draws)
            ],
            stop_ids=self.codec.stop_ids,
            pad_id=self.codec.pad_id,
            progress=lambda done, total: self.context.progress(done, total, "answers"),
        )
        self.generated_tokens += sum(map(len, ids))
        return Answers(ids, [self.codec.text(i) for i in ids], [i[-1] in self.codec.stop_ids for i in ids])

    def _logps(self, policy: Policy, name: str, trees: Sequence[Tree]) -> list[list[float]]:
        """Log-probs of every answer under the model of an input, at temperature 1: a list per tree."""
        cache = ReferenceCache(self.context.request.inputs[name].sha256, policy.numbers)
        layout = choose_layout(policy, "shared", trees, self.codec.pad_id)
        return cache.logps(policy, trees, layout, TOKENS_PER_BATCH, self.codec.pad_id)

    def distances(
        self, prompts: Sequence[Messages], answers: Answers, temperature: float = 1.0
    ) -> tuple[list[float], list[float]]:
        """KL along each answer, and its log pi_sft: one answer to each of `prompts`, in nats.

        The KL is the sum over the answer's tokens of KL(pi_T(. | prefix) || pi_sft(. | prefix)), exact over the
        vocabulary, with pi at `temperature` and pi_sft at 1. Over answers drawn from pi_T its mean is the KL of whole
        answers (chain rule), with a fraction of the noise of sampled log-ratios. Both models read a batch together, so
        it costs no forward pass beyond those of the log-probs.
        """
        trees = self.trees(prompts, answers)

        def values(batch: Batch) -> Tensor:
            own = self.policy(batch, temperature=temperature, log_probs=True)
            same = self.itself and temperature == 1
            other = own if same else self.reference(batch, log_probs=True)
            kl_N = exact_kl(own.log_probs, other.log_probs, len(own.logps_N))
            return torch.stack([sums(of, batch.answer_N, batch.answers) for of in (kl_N, other.logps_N)], 1)

        layout = choose_layout(self.policy, "shared", trees, self.codec.pad_id)
        self.reference.flex = self.policy.flex  # else the KL would have the difference of two kernels in it
        pairs: dict[int, list[float]] = {}
        with undisturbed(self.reference):
            for batch in over_trees(self.policy, values, trees, layout, TOKENS_PER_BATCH, self.codec.pad_id):
                pairs |= {i: pair for i, (pair,) in batch.items()}
        return [pairs[i][0] for i in range(len(trees))], [pairs[i][1] for i in range(len(trees))]

    def trees(self, prompts: Sequence[Messages], answers: Answers) -> list[Tree]:
        """One answer behind each of `prompts`."""
        pairs = zip(prompts, answers.ids, strict=True)
        return [Tree(tuple(self.codec.prompt(prompt)), (tuple(ids),)) for prompt, ids in pairs]

    def relevance(self, prompts: Sequence[Messages], answers: Answers) -> list[float]:
        """How much likelier the SFT model finds each answer behind its own prompt than behind others, in nats."""
        return gate_evidence.relevance(
            lambda trees: self._logps(self.reference, "reference", trees),
            [self.codec.prompt(prompt) for prompt in prompts],
            answers.ids,
            [cluster_of(prompt) for prompt in prompts],
        )

    def matched(self, prompts: Sequence[Messages], answers: Answers, temperature: float) -> float:
        """The temperature at which the SFT model is as sharp as this one at `temperature`."""
        trees = self.trees(prompts, answers)
        return gate_evidence.matched_temperature(
            self.policy, self.reference, trees, temperature, TOKENS_PER_BATCH, self.codec.pad_id
        )

    def pairs_right(self, folder: Path) -> list[tuple[Row, float]]:
        """Each held-out pair of a data folder, and 1 where the chosen answer has gained more probability over the SFT
        model than the other one, 1/2 for a tie, else 0.
        """
        if not has(folder, "eval", "preference"):
            log.warning("no pairs are held out (eval_fraction), so there is no eval/preference_accuracy")
            return []
        examples = encode(read(folder, "eval", "preference"), lambda row: [row["chosen"], row["rejected"]], self.codec)
        limit = context_length(self.policy.hf)
        examples = examples if limit is None else fitting(examples, limit, limit)
        trees = [example.tree for example in examples]
        # Both from the same cache, keyed by the weights: equal weights give equal numbers, to the last bit.
        policy, reference = self._logps(self.policy, "model", trees), self._logps(self.reference, "reference", trees)
        ratios = [[p - r for p, r in zip(*pair, strict=True)] for pair in zip(policy, reference, strict=True)]
        right = metrics.wins([chosen for chosen, _ in ratios], [rejected for _, rejected in ratios])
        return list(zip([example.row for example in examples], right, strict=True))
