"""What only the gate asks of a model's answers: whether they depend on their prompts, and how sharp the model is."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from stages.engine.data.trees import Batch, Tree
from stages.engine.models.layouts import choose_layout
from stages.engine.models.policy import Policy, sums
from stages.engine.scoring.batched import over_trees

OTHER_PROMPTS = 4
"""Prompts of others that an answer is held against."""
SHARPEST = 0.05
"""Lowest temperature that a model's sharpness is looked for, as a share of the one it is sampled at."""
HALVINGS = 9
"""Of log temperature: from a range of log 20 to steps of 0.6 %."""
ANSWERS = 256
"""Answers that the entropy is measured along."""


def other_prompts(clusters: Sequence[str]) -> list[list[int]]:
    """For each answer, the places of OTHER_PROMPTS answers of other clusters: cyclic shifts among the clusters.

    Fewer where there are fewer clusters; none where there is a single one.
    """
    first: dict[str, int] = {}
    for place, cluster in enumerate(clusters):
        first.setdefault(cluster, place)
    places, number = list(first.values()), {cluster: i for i, cluster in enumerate(first)}
    others = min(OTHER_PROMPTS, len(places) - 1)
    shifts = [k * len(places) // (others + 1) for k in range(1, others + 1)]
    return [[places[(number[cluster] + shift) % len(places)] for shift in shifts] for cluster in clusters]


def relevance(
    logps: Callable[[Sequence[Tree]], list[list[float]]],
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    clusters: Sequence[str],
) -> list[float]:
    """log pi_sft(y | x) - mean over other prompts x' of log pi_sft(y | x'), in nats, a number per answer y.

    An estimate of what the answer tells of its prompt: its mean over answers that do not depend on x is at most 0 (by
    Gibbs' inequality where they are the SFT model's own). nan for all where there is no other prompt.
    """
    others = other_prompts(clusters)
    trees = [
        Tree(tuple(prompts[place]), (tuple(answer),)) for i, answer in enumerate(answers) for place in (i, *others[i])
    ]
    numbers = iter(value for (value,) in logps(trees))
    found = []
    for places in others:
        own, rest = next(numbers), [next(numbers) for _ in places]
        found.append(own - sum(rest) / len(rest) if rest else math.nan)
    return found


def entropy(policy: Policy, trees: Sequence[Tree], temperature: float, budget: int, pad_id: int) -> float:
    """Mean entropy of the next token along the answers, in nats, of the distribution at `temperature`."""

    def totals(batch: Batch) -> Tensor:
        out = policy(batch, entropy=True, temperature=temperature)
        assert out.entropy_N is not None
        return sums(out.entropy_N, batch.answer_N, len(batch.lengths_A))

    layout = choose_layout(policy, "shared", trees, pad_id)
    batches = over_trees(policy, totals, trees, layout, budget, pad_id)
    total = sum(value for batch in batches for values in batch.values() for value in values)
    return total / sum(len(answer) for tree in trees for answer in tree.answers)


def matched_temperature(
    policy: Policy, reference: Policy, trees: Sequence[Tree], temperature: float, budget: int, pad_id: int
) -> float:
    """The temperature at which the reference is as sharp as the policy is at `temperature`; never above that one.

    Sharpness is the mean entropy along the first of the policy's answers, `trees`. A policy whose logits are the
    reference's, divided by s, gives temperature x s: at every token both distributions are then the same.
    """
    trees = trees[:ANSWERS]
    target = entropy(policy, trees, temperature, budget, pad_id)
    if target >= entropy(reference, trees, temperature, budget, pad_id):
        return temperature
    low, high = math.log(SHARPEST * temperature), math.log(temperature)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if entropy(reference, trees, math.exp(middle), budget, pad_id) < target:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)
