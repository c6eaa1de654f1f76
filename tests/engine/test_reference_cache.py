from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from stages.engine.data.trees import Layout, Tree, collate
from stages.engine.models.loading import load_policy
from stages.engine.models.policy import Policy
from stages.engine.scoring.reference_cache import ReferenceCache, _read, _write
from tests.support.architectures import random_trees, save_tiny

PAD = 2
TREES = random_trees(12)


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    return load_policy(save_tiny(tmp_path / "model", "llama"))


class Counting(Policy):
    """Counts the sequences that it computes."""

    computed = 0

    def forward(self, batch, **how):  # type: ignore[no-untyped-def, override]
        self.computed += batch.answers
        return super().forward(batch, **how)


def plain_sums(policy: Policy, trees: list[Tree]) -> list[list[float]]:
    """Each sequence alone, through the model's own logits, in float64."""

    def one(prompt: tuple[int, ...], answer: tuple[int, ...]) -> float:
        log_probs_TV = policy.plain(torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1)
        return sum(float(log_probs_TV[len(prompt) - 1 + i, token].detach()) for i, token in enumerate(answer))

    return [[one(tree.prompt, answer) for answer in tree.answers] for tree in trees]


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("budget", [16, 100_000])
def test_the_numbers_are_those_of_each_sequence_alone(policy: Policy, layout: Layout, budget: int, home: Path) -> None:
    found = ReferenceCache("weights", "fp32").logps(policy, TREES, layout, budget, PAD)
    expected = plain_sums(policy, TREES)
    assert [len(row) for row in found] == [len(row) for row in expected]
    flat = [(a, b) for one, other in zip(found, expected, strict=True) for a, b in zip(one, other, strict=True)]
    assert all(a == pytest.approx(b, abs=1e-4) for a, b in flat)
    assert (home / "cache" / "reference.sqlite").exists()


def test_only_what_is_missing_is_computed(policy: Policy, tmp_path: Path) -> None:
    counting = Counting(policy.hf)
    path, total = tmp_path / "cache.sqlite", sum(len(tree.answers) for tree in TREES)
    progress: list[tuple[int, int]] = []
    first = ReferenceCache("w", "fp32", path).logps(counting, TREES, "shared", 64, PAD, lambda *p: progress.append(p))
    assert counting.computed == total
    assert progress[-1] == (total, total) and len(progress) > 1
    again = ReferenceCache("w", "fp32", path).logps(counting, TREES, "shared", 64, PAD)
    assert again == first and counting.computed == total
    grown = [Tree(TREES[0].prompt, (*TREES[0].answers, (7, 8, 9))), Tree((4, 4), TREES[1].answers), *TREES[:0:-1]]
    more = ReferenceCache("w", "fp32", path).logps(counting, grown, "shared", 64, PAD)
    assert counting.computed == total + 1 + len(TREES[1].answers)
    assert more[0][:-1] == first[0] and more[2:] == first[:0:-1]


@pytest.mark.parametrize("weights, dtype", [("other", "fp32"), ("w", "bf16")])
def test_other_weights_or_another_precision_share_nothing(
    policy: Policy, tmp_path: Path, weights: str, dtype: str
) -> None:
    counting, path = Counting(policy.hf), tmp_path / "cache.sqlite"
    ReferenceCache("w", "fp32", path).logps(counting, TREES, "shared", 64, PAD)
    before = counting.computed
    ReferenceCache(weights, dtype, path).logps(counting, TREES, "shared", 64, PAD)
    assert counting.computed == 2 * before


def test_the_border_between_prompt_and_answer_is_part_of_the_key(policy: Policy, tmp_path: Path) -> None:
    cache = ReferenceCache("w", "fp32", tmp_path / "cache.sqlite")
    trees = [Tree((5, 6), ((7, 8),)), Tree((5, 6, 7), ((8,),))]
    ((one,), (other,)) = cache.logps(policy, trees, "shared", 64, PAD)
    batch = collate(trees[:1], "padded", PAD)
    assert other == pytest.approx(policy(batch).logps_N[1].item(), abs=1e-5)
    assert one != pytest.approx(other, abs=1e-3)


def test_equal_sequences_are_computed_once(policy: Policy, tmp_path: Path) -> None:
    counting = Counting(policy.hf)
    tree = Tree((5, 6), ((7, 8), (7, 8), (9,)))
    found = ReferenceCache("w", "fp32", tmp_path / "c").logps(counting, [tree, tree], "shared", 64, PAD)
    assert counting.computed == 2
    assert found[0] == found[1] and found[0][0] == found[0][1]


def test_training_mode_is_given_back(policy: Policy, tmp_path: Path) -> None:
    policy.train()
    ReferenceCache("w", "fp32", tmp_path / "c").logps(policy, TREES[:1], "shared", 64, PAD)
    assert policy.training


def test_writers_at_once_wait_for_each_other(tmp_path: Path) -> None:
    """Connections of their own, as processes have them."""
    cache = ReferenceCache("w", "fp32", tmp_path / "new" / "cache.sqlite")

    def write(_: int) -> None:
        for number in range(20):
            with cache._open() as database:
                keys = [cache._key((number,), (i,)) for i in range(20)]
                assert len(_read(database, keys)) in (0, 20)
                _write(database, {key: float(i) for i, key in enumerate(keys)})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    with cache._open() as database:
        assert database.execute("SELECT count(*) FROM logps").fetchone() == (400,)
