"""What the gate asks of answers: whether they depend on their prompts, and how sharp their model is."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from stages.engine.data.trees import Tree
from stages.engine.models.loading import load_policy
from stages.engine.scoring.gate_evidence import entropy, matched_temperature, other_prompts, relevance
from tests.support.models import model_folder

TREES = [Tree((1 + i, 2, 3), (tuple(range(3 + i, 7 + i)),)) for i in range(6)]


@pytest.mark.parametrize("divisor", [0.7, 0.3])
def test_logits_divided_by_s_match_the_reference_at_the_temperature_times_s(tmp_path: Path, divisor: float) -> None:
    folder = model_folder(tmp_path / "model")
    reference, sharper = load_policy(folder, trainable=False), load_policy(folder, trainable=False)
    for policy in (reference, sharper):
        head = policy.plain.get_output_embeddings()
        assert head is not None
        scale = 20.0 / (divisor if policy is sharper else 1.0)  # the tiny model alone is nearly uniform
        head.weight = nn.Parameter(head.weight.detach() * scale, requires_grad=False)
    found = matched_temperature(sharper, reference, TREES, 0.8, 4096, 0)
    assert found == pytest.approx(0.8 * divisor, rel=0.01)
    # a flatter model is held against the reference as it is
    assert matched_temperature(reference, sharper, TREES, 0.8, 4096, 0) == 0.8


def test_entropy_is_that_of_the_softmax_along_the_answers(tmp_path: Path) -> None:
    policy = load_policy(model_folder(tmp_path / "model"), trainable=False)
    tree = TREES[0]
    with torch.no_grad():
        ids = torch.tensor([[*tree.prompt, *tree.answers[0]]])
        log_probs = (policy.plain(input_ids=ids).logits[0, 2:6].double() / 0.5).log_softmax(-1)
    expected = float(-(log_probs.exp() * log_probs).sum(-1).mean())
    assert entropy(policy, [tree], 0.5, 4096, 0) == pytest.approx(expected, abs=1e-4)


def test_an_answer_is_held_against_prompts_of_other_clusters() -> None:
    clusters = ["a", "a", "b", "c", "d", "e", "f"]
    others = other_prompts(clusters)
    for own, places in zip(clusters, others, strict=True):
        assert len(places) == len({clusters[place] for place in places}) == 4
        assert own not in {clusters[place] for place in places}
    assert other_prompts(["a", "a"]) == [[], []]
    assert other_prompts(["a", "b"]) == [[1], [0]]


def test_relevance_is_the_log_prob_behind_the_own_prompt_less_the_mean_behind_others() -> None:
    prompts, clusters = [[1], [2], [3]], ["a", "b", "c"]

    def logps(trees: Sequence[Tree]) -> list[list[float]]:
        """An answer [t] is likely behind the prompt [t]; [9] is equally likely behind all."""
        return [
            [-1.0 if t.prompt == t.answers[0] else -5.0 - t.prompt[0]] if t.answers[0] != (9,) else [-2.0]
            for t in trees
        ]

    # behind 1: -1, behind 2 and 3: -7 and -8
    assert relevance(logps, prompts, [[1], [9], [9]], clusters) == [-1 + 7.5, 0.0, 0.0]
    alone = relevance(logps, [[1]], [[1]], ["a"])
    assert math.isnan(alone[0])
