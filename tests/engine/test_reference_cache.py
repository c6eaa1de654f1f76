import contextlib
import sqlite3
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


def test_an_altered_number_is_computed_again(policy: Policy, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    counting, path = Counting(policy.hf), tmp_path / "cache.sqlite"
    first = ReferenceCache("w", "fp32", path).logps(counting, TREES, "shared", 64, PAD)
    before = counting.computed
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        one, other, third = (key for (key,) in database.execute("SELECT key FROM logps LIMIT 3"))
        database.execute("UPDATE logps SET value = value * (1 + 1e-15) WHERE key = ?", (one,))  # the last bits
        database.execute("UPDATE logps SET value = 'text' WHERE key = ?", (other,))
        database.execute("DELETE FROM digests WHERE key = ?", (third,))  # of a version that wrote none
    again = ReferenceCache("w", "fp32", path).logps(counting, TREES, "shared", 64, PAD)
    assert counting.computed == before + 3 and "2 cached log-probabilities" in caplog.text
    assert [value for row in again for value in row] == pytest.approx([value for row in first for value in row])
    ReferenceCache("w", "fp32", path).logps(counting, TREES, "shared", 64, PAD)
    assert counting.computed == before + 3


def harm(path: Path, how: str) -> None:
    content = path.read_bytes()
    match how:
        case "garbage":
            path.write_bytes(b"no database" * 1000)
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "pages":  # the schema is whole, the rows are not
            path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
        case "tables":
            path.unlink()
            with contextlib.closing(sqlite3.connect(path)) as database, database:
                database.execute("CREATE TABLE logps (other TEXT)")
        case "folder":
            path.unlink()
            path.mkdir()


@pytest.mark.parametrize("how", ["garbage", "cut", "pages", "tables", "folder"])
def test_a_broken_cache_is_moved_aside(
    policy: Policy, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    counting, path = Counting(policy.hf), tmp_path / "cache.sqlite"
    first = ReferenceCache("w", "fp32", path).logps(counting, TREES, "shared", 64, PAD)
    before = counting.computed
    harm(path, how)
    assert ReferenceCache("w", "fp32", path).logps(counting, TREES, "shared", 64, PAD) == first
    assert counting.computed == 2 * before
    assert (tmp_path / "cache.sqlite.bad").exists() and "moved to cache.sqlite.bad" in caplog.text
    ReferenceCache("w", "fp32", path).logps(counting, TREES, "shared", 64, PAD)
    assert counting.computed == 2 * before


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


def test_the_engine_s_version_is_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A corrected forward must not find the numbers of the one before."""
    path = tmp_path / "reference.sqlite"
    now = ReferenceCache("weights", "fp32", path)._key((1,), (2,))
    monkeypatch.setattr("stages.engine.scoring.reference_cache.ENGINE_VERSION", 99)
    assert ReferenceCache("weights", "fp32", path)._key((1,), (2,)) != now
