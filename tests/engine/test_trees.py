import pytest
import torch

from stages.engine.data.trees import Batch, Layout, Tree, collate, cut, tree_tokens
from tests.support.architectures import random_trees

PAD = 2
LAYOUTS: list[Layout] = ["shared", "packed", "padded"]
TREES = [
    Tree((5, 6, 7), ((8, 9), (10,), (11, 12, PAD))),
    Tree((13,), ((PAD,),)),
    Tree((5, PAD), ((14, PAD, PAD, PAD), (15, 16))),
]


def flat(batch: Batch) -> torch.Tensor:
    return batch.input_ids_BT.flatten()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_indices_point_at_the_answers_tokens_in_order(layout: Layout) -> None:
    trees = TREES + random_trees(6)
    batch = collate(trees, layout, PAD)
    sequences = [(tree.prompt, answer) for tree in trees for answer in tree.answers]
    assert batch.labels_N.tolist() == [token for _, answer in sequences for token in answer]
    assert flat(batch)[batch.token_N].tolist() == batch.labels_N.tolist()
    assert flat(batch)[batch.last_A].tolist() == [answer[-1] for _, answer in sequences]
    assert batch.lengths_A.tolist() == [len(answer) for _, answer in sequences]
    assert batch.answer_N.tolist() == [a for a, (_, answer) in enumerate(sequences) for _ in answer]
    before = [token for prompt, answer in sequences for token in (prompt[-1], *answer[:-1])]
    assert flat(batch)[batch.predict_N].tolist() == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions_are_those_of_each_sequence_alone(layout: Layout) -> None:
    batch = collate(TREES, layout, PAD)
    positions = batch.position_ids_BT.flatten()
    expected = [len(tree.prompt) + i for tree in TREES for answer in tree.answers for i in range(len(answer))]
    assert positions[batch.token_N].tolist() == expected
    assert positions[batch.predict_N].tolist() == [position - 1 for position in expected]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_has_the_tokens_that_its_trees_announce(layout: Layout) -> None:
    tree = TREES[0]
    assert collate([tree], layout, PAD).input_ids_BT.numel() == tree_tokens(tree, layout)
    if layout != "padded":
        assert collate(TREES, layout, PAD).input_ids_BT.numel() == sum(tree_tokens(t, layout) for t in TREES)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_that_are_learnt_from_are_the_same_in_every_layout(layout: Layout) -> None:
    by_hand = sum(len(tree.prompt) + sum(map(len, tree.answers)) for tree in TREES)
    assert collate(TREES, layout, PAD).to("cpu").tokens == by_hand


def test_sizes_by_hand() -> None:
    tree = TREES[0]  # prompt of 3, answers of 2, 1 and 3
    assert [tree_tokens(tree, layout) for layout in LAYOUTS] == [3 + 6, 3 * 3 + 6, 3 * (3 + 3)]


def test_padding_is_masked_by_length_when_the_end_token_pads() -> None:
    batch = collate(TREES, "padded", PAD)
    assert batch.attention_mask_BT is not None
    lengths = [len(tree.prompt) + len(answer) for tree in TREES for answer in tree.answers]
    assert batch.attention_mask_BT.sum(-1).tolist() == lengths
    assert (batch.input_ids_BT[batch.attention_mask_BT == 0] == PAD).all()


def test_rows_are_cut_by_budget_in_order() -> None:
    assert cut([3, 4, 2, 9, 1, 1], 7) == [[0, 1], [2], [3], [4, 5]]
    assert cut([], 7) == []
    assert cut([8], 7) == [[0]]


@pytest.mark.parametrize("tree", [((), ((1,),)), ((1,), ()), ((1,), ((2,), ()))])
def test_a_tree_without_prompt_or_answer_is_refused(tree: tuple) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        Tree(*tree)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_moves(layout: Layout) -> None:
    moved = collate(TREES, layout, PAD).to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert {t.device.type for t in tensors} == {"meta"}
    if moved.segments is not None:
        assert moved.segments.back_T is not None and moved.segments.back_T.is_meta
        assert all(group.query_SQ.is_meta and group.key_SK.is_meta for group in moved.segments.groups)
