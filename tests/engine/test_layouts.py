"""The three layouts give the same values and gradients for every listed architecture, those of plain transformers."""

from pathlib import Path

import pytest
import torch

from stages.engine.data import segments as data_segments
from stages.engine.data.trees import Layout, Tree, collate
from stages.engine.models import layouts, tree_attention
from stages.engine.models.layouts import choose_layout
from stages.engine.models.loading import checkpoint_layers, load_policy, load_scorer
from stages.engine.models.policy import Policy, Scorer, sums
from stages.engine.models.tree_attention import TREE_TYPES
from tests.support.architectures import KINDS, SCORERS, random_trees, save_tiny, tiny_model

PAD = 2  # the end token too


def loss_and_gradient(model: Policy | Scorer, trees: list[Tree], layout: Layout) -> tuple[float, torch.Tensor]:
    """A smooth function of every output, and its gradient as one vector."""
    model.zero_grad()
    batch = collate(trees, layout, PAD)
    out = model(batch)
    values = out if isinstance(out, torch.Tensor) else sums(out.logps_N, batch.answer_N, batch.answers)
    weights = torch.linspace(-1.0, 2.0, batch.answers)
    loss = (weights * torch.nn.functional.logsigmoid(0.1 * values)).mean()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return loss.item(), gradient.clone()


def assert_layouts_agree(model: Policy | Scorer, trees: list[Tree]) -> None:
    expected_loss, expected = loss_and_gradient(model, trees, "padded")
    for layout in ("packed", "shared"):
        loss, gradient = loss_and_gradient(model, trees, layout)
        assert loss == pytest.approx(expected_loss, abs=1e-5)
        assert (gradient - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_policies(kind: str, tmp_path: Path) -> None:
    assert_layouts_agree(load_policy(save_tiny(tmp_path, kind)), random_trees(7))


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_by_itself_is_not_moved(kind: str, tmp_path: Path) -> None:
    tree = Tree(tuple(range(3, 15)), (tuple(range(20, 27)),))
    segments = collate([tree], "packed", PAD).segments
    assert segments is not None and segments.back_T is None
    assert_layouts_agree(load_policy(save_tiny(tmp_path, kind)), [tree])


@pytest.mark.parametrize("kind", SCORERS)
def test_scorers(kind: str, tmp_path: Path) -> None:
    assert_layouts_agree(load_scorer(save_tiny(tmp_path, kind)), random_trees(7))


@pytest.mark.parametrize("window", [1, 2, 5, 40])
def test_windows_of_any_length_count_positions(window: int, tmp_path: Path) -> None:
    assert_layouts_agree(
        load_policy(save_tiny(tmp_path, "mistral", sliding_window=window)), random_trees(5, seed=window)
    )


def test_many_alike_and_few_long_trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_policy(save_tiny(tmp_path, "llama"))
    trees = random_trees(9, seed=3, prompt=(1, 60), answer=(1, 30), k=4)
    assert_layouts_agree(model, trees)
    monkeypatch.setattr(data_segments, "_SLACK", 0)  # hardly anything is grouped
    assert_layouts_agree(model, trees)


def test_every_listed_type_is_tested() -> None:
    assert set(KINDS) == TREE_TYPES


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_log_probs_are_those_of_plain_transformers(kind: str, layout: Layout, tmp_path: Path) -> None:
    plain, policy = tiny_model(kind), load_policy(save_tiny(tmp_path, kind))
    trees = random_trees(4, seed=1)
    expected = []
    for tree in trees:
        for answer in tree.answers:
            row = torch.tensor([[*tree.prompt, *answer]])
            log_probs_TV = plain(row).logits[0].double().log_softmax(-1)
            expected += [log_probs_TV[len(tree.prompt) - 1 + i, token] for i, token in enumerate(answer)]
    logps_N = policy(collate(trees, layout, PAD)).logps_N.double()
    torch.testing.assert_close(logps_N, torch.stack(expected), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_with_a_cache_and_padding_on_the_left_is_that_of_plain_transformers(kind: str, tmp_path: Path) -> None:
    plain, hf = tiny_model(kind), load_policy(save_tiny(tmp_path, kind), trainable=False).plain
    ids_BT = torch.tensor([[PAD] * 9 + [5, 6, 7], list(range(20, 32))])
    mask_BT = (torch.arange(12) >= torch.tensor([[9], [0]])).long()
    how = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    how |= {"eos_token_id": None, "attention_mask": mask_BT}
    expected, out = (model.generate(ids_BT, **how) for model in (plain, hf))  # type: ignore[operator]
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("kind", "window"), [("llama", None), ("gpt2", None), ("mistral", 5), ("mistral", 40)])
def test_one_kernel_sees_what_the_groups_see(kind: str, window: int | None, tmp_path: Path) -> None:
    """Llama's and Mistral's keys have fewer heads than their queries."""
    policy = load_policy(save_tiny(tmp_path, kind, **({} if window is None else {"sliding_window": window})))
    batch = collate(random_trees(12, seed=1, prompt=(1, 60), k=3), "shared", PAD)
    assert batch.tokens > 2 * tree_attention.BLOCK
    with torch.no_grad():
        expected = policy(batch).logps_N
        policy.flex = True
        assert (policy(batch).logps_N - expected).abs().max() < 1e-5


def test_blocks_are_computed_where_something_is_seen_and_nowhere_else() -> None:
    segments = collate(random_trees(20, seed=2, prompt=(1, 200), answer=(1, 150), k=3), "shared", PAD).segments
    assert segments is not None
    tokens = len(segments.positions_T)
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for group in segments.groups:
        for queries, keys, at, of in zip(
            group.query_SQ, group.key_SK, group.query_position_SQ, group.key_position_SK, strict=True
        ):
            seen[queries[:, None], keys[None]] |= at[:, None] >= of[None]
    needed = tree_attention.blocks(segments.spans, tokens)
    by_blocks = torch.nn.functional.pad(seen, (0, -tokens % tree_attention.BLOCK, 0, -tokens % tree_attention.BLOCK))
    by_blocks = (
        by_blocks.unflatten(0, (-1, tree_attention.BLOCK)).unflatten(2, (-1, tree_attention.BLOCK)).any(1).any(-1)
    )
    assert torch.equal(needed, by_blocks)
    assert needed.float().mean() < 0.5


def test_one_kernel_is_left_alone_where_it_cannot_learn(tmp_path: Path) -> None:
    policy = load_policy(save_tiny(tmp_path, "llama"))
    assert choose_layout(policy, "shared", random_trees(2), PAD) == "shared"
    assert not policy.flex  # this is no GPU
    with pytest.warns(UserWarning, match="attention goes by groups: FlexAttention fails here: .*backward on CPU"):
        assert not layouts._flex_works(policy, "shared", random_trees(2), PAD)


def test_a_real_model(tinystories: Path) -> None:
    policy = load_policy(tinystories)
    trees = random_trees(6, prompt=(20, 60), answer=(10, 40))
    assert choose_layout(policy, "shared", trees, PAD) == "shared"
    assert_layouts_agree(policy, trees)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_bf16_stays_near_fp32_and_keeps_gradients_in_fp32(layout: Layout, tmp_path: Path) -> None:
    policy = load_policy(save_tiny(tmp_path, "llama"))
    trees = random_trees(5)
    expected_loss, expected = loss_and_gradient(policy, trees, layout)
    policy.precision = "bf16"
    loss, gradient = loss_and_gradient(policy, trees, layout)
    assert policy(collate(trees, layout, PAD)).logps_N.dtype == gradient.dtype == torch.float32
    assert loss == pytest.approx(expected_loss, rel=0.03)
    assert (gradient - expected).norm() <= 0.1 * expected.norm()


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_gradient_checkpointing_changes_nothing(kind: str, layout: Layout, tmp_path: Path) -> None:
    policy = load_policy(save_tiny(tmp_path, kind)).train()
    expected_loss, expected = loss_and_gradient(policy, random_trees(4), layout)
    checkpoint_layers(policy.plain)
    loss, gradient = loss_and_gradient(policy, random_trees(4), layout)
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    torch.testing.assert_close(gradient, expected)


# --- falling back ---


@pytest.mark.parametrize(
    "kind, sizes",
    [
        ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, "rotary_dim": 8}),
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
        (
            "gemma2",
            {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "intermediate_size": 48,
                "final_logit_softcapping": 3.0,
            },
        ),
    ],
)
def test_an_unlisted_type_is_padded_with_a_warning(kind: str, sizes: dict, tmp_path: Path) -> None:
    plain, policy = tiny_model(kind, **sizes), load_policy(save_tiny(tmp_path, kind, **sizes))
    trees = random_trees(3)
    with pytest.warns(UserWarning, match=f"'shared' becomes 'padded'.*{kind}"):
        assert choose_layout(policy, "shared", trees, PAD) == "padded"
    batch = collate(trees, "padded", PAD)
    out = plain(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT)
    expected_NV = out.logits.flatten(0, 1)[batch.predict_N].log_softmax(-1)
    expected_N = expected_NV.gather(-1, batch.labels_N[:, None]).squeeze(-1)
    torch.testing.assert_close(policy(batch).logps_N, expected_N, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=kind):
        policy(collate(trees, "shared", PAD))


def test_a_rope_that_looks_at_the_whole_batch_is_padded(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    policy = load_policy(save_tiny(tmp_path, "llama", rope_parameters=rope))
    with pytest.warns(UserWarning, match="dynamic"):
        assert choose_layout(policy, "packed", random_trees(2), PAD) == "padded"


def test_a_layout_that_gives_other_numbers_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(save_tiny(tmp_path, "mistral"))
    trees = random_trees(4)
    assert choose_layout(policy, "shared", trees, PAD) == "shared"
    masks_for = data_segments.Segments.masks_for
    monkeypatch.setattr(data_segments.Segments, "masks_for", lambda self, window, dtype: masks_for(self, None, dtype))
    with pytest.warns(UserWarning, match="results differ"):
        assert choose_layout(policy, "shared", trees, PAD) == "padded"
    assert choose_layout(policy, "padded", trees, PAD) == "padded"
