import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from schemas.config.training import LoRA, Training
from schemas.errors import StageError
from stages.engine.data.trees import Batch, collate
from stages.engine.models import logprobs
from stages.engine.models.cpu import threads_for
from stages.engine.models.loading import load_policy, load_scorer
from stages.engine.models.logprobs import linear_logps
from stages.engine.models.policy import sums
from stages.engine.models.saving import save_policy, save_scorer
from tests.support.architectures import KINDS, SCORERS, VOCABULARY, NoTokenizer, random_trees, save_tiny

PAD = 2
LORA = Training(lora=LoRA(rank=4, alpha=8))


def stir(model: nn.Module, seed: int = 5) -> None:
    """Move every trainable weight, as training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


# --- the chunked head ---


def head_inputs(n: int = 37, hidden: int = 8, vocabulary: int = 29) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden_ND, weight_VD, bias_V = torch.randn(n, hidden), torch.randn(vocabulary, hidden), torch.randn(vocabulary)
    return hidden_ND, weight_VD, bias_V, torch.randint(vocabulary, (n,))


@pytest.mark.parametrize("chunk", [29, 29 * 5, 2**23])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_chunked_head_is_the_full_head(
    chunk: int, biased: bool, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "CHUNK", chunk)
    *given, labels_N = head_inputs()
    hidden_ND, weight_VD, bias_V = (t.requires_grad_() for t in given)
    bias = bias_V if biased else None
    logps_N, entropy_N = linear_logps(hidden_ND, weight_VD, bias, labels_N, entropy=True, temperature=temperature)
    wide = [t.detach().double().requires_grad_() for t in (hidden_ND, weight_VD, bias_V)]
    logits_NV = (wide[0] @ wide[1].T + (wide[2] if biased else 0)) / temperature
    expected_NV = logits_NV.log_softmax(-1)
    expected_N = expected_NV[torch.arange(len(labels_N)), labels_N]
    torch.testing.assert_close(logps_N.double(), expected_N, atol=1e-5, rtol=1e-5)
    assert entropy_N is not None
    torch.testing.assert_close(entropy_N.double(), -(expected_NV.exp() * expected_NV).sum(-1), atol=1e-5, rtol=1e-5)
    assert not entropy_N.requires_grad
    weights = torch.linspace(-1, 1, len(labels_N))
    (weights * logps_N).sum().backward()
    (weights.double() * expected_N).sum().backward()
    for one, other in zip((hidden_ND, weight_VD, bias_V)[: 3 if biased else 2], wide, strict=False):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad.double(), other.grad, atol=1e-5, rtol=1e-4)


def test_the_exact_kl_in_chunks_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CHUNK", 3 * 29)  # 37 tokens in 13 chunks
    hidden_ND, weight_VD, bias_V, _ = head_inputs()
    moved_ND, moved_VD = hidden_ND + 0.5 * hidden_ND.flip(0), weight_VD.flip(1)
    own = logprobs.linear_log_probs(moved_ND, moved_VD, None, 0.7)
    reference = logprobs.linear_log_probs(hidden_ND, weight_VD, bias_V, 0.7)
    p_NV = ((moved_ND.double() @ moved_VD.double().T) / 0.7).log_softmax(-1)
    q_NV = ((hidden_ND.double() @ weight_VD.double().T + bias_V) / 0.7).log_softmax(-1)
    expected_N = (p_NV.exp() * (p_NV - q_NV)).sum(-1)
    assert expected_N.min() > 0.1
    torch.testing.assert_close(logprobs.exact_kl(own, reference, 37).double(), expected_N, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 1, 2)])
def test_the_chunked_head_leaves_out_gradients_that_nobody_wants(frozen: tuple[int, ...]) -> None:
    *given, labels_N = head_inputs()
    inputs = hidden_ND, weight_VD, bias_V = [t.requires_grad_(i not in frozen) for i, t in enumerate(given)]
    logps_N, _ = linear_logps(hidden_ND, weight_VD, bias_V, labels_N)
    assert logps_N.requires_grad is (len(frozen) < 3)
    if logps_N.requires_grad:
        logps_N.sum().backward()
    assert [t.grad is None for t in inputs] == [i in frozen for i in range(3)]


def test_the_chunked_head_adds_its_bf16_gradient_up_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CHUNK", 29)  # a chunk per token: sums in bf16 would lose the small ones
    hidden_ND, weight_VD, _, labels_N = head_inputs(n=2000)
    weight_VD.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logps_N, _ = linear_logps(hidden_ND, weight_VD, None, labels_N)
    assert logps_N.dtype == torch.float32
    logps_N.sum().backward()
    wide_VD = weight_VD.detach().double().requires_grad_()
    (hidden_ND.double() @ wide_VD.T).log_softmax(-1)[torch.arange(2000), labels_N].sum().backward()
    assert weight_VD.grad is not None and wide_VD.grad is not None
    assert weight_VD.grad.dtype == torch.float32
    assert (weight_VD.grad - wide_VD.grad).norm() < 0.01 * wide_VD.grad.norm()


# --- policies ---


def test_values_and_entropy_stand_where_tokens_are_predicted(llama: Path, batch: Batch) -> None:
    policy = load_policy(llama, value_head=True)
    assert policy.value_head is not None
    out = policy(batch, value=True, entropy=True)
    assert torch.equal(out.values_N, torch.zeros(len(batch.labels_N)))  # a fresh head knows nothing
    stir(policy.value_head)
    out = policy(batch, value=True, entropy=True)
    hidden_ND = policy.hidden(batch)[batch.predict_N]
    torch.testing.assert_close(out.values_N, policy.value_head(hidden_ND).squeeze(-1))
    log_probs_NV = policy.plain.lm_head(hidden_ND).log_softmax(-1)
    torch.testing.assert_close(out.entropy_N, -(log_probs_NV.exp() * log_probs_NV).sum(-1), atol=1e-5, rtol=1e-5)


def test_a_value_without_a_head_is_refused(llama: Path, batch: Batch) -> None:
    with pytest.raises(ValueError, match="value_head"):
        load_policy(llama)(batch, value=True)


def test_an_unlisted_type_has_values_too(tmp_path: Path) -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, "rotary_dim": 8}
    policy = load_policy(save_tiny(tmp_path, "gptj", **sizes), value_head=True)
    stir(policy)
    padded = collate(random_trees(3), "padded", PAD)
    out = policy(padded, value=True, entropy=True)
    hidden_ND = policy.hidden(padded)[padded.predict_N]
    torch.testing.assert_close(out.values_N, policy.value_head(hidden_ND).squeeze(-1))  # type: ignore[misc]
    assert (out.entropy_N > 0).all()


def test_temperature_divides_the_logits(llama: Path, batch: Batch) -> None:
    policy = load_policy(llama)
    logits_NV = policy.plain.lm_head(policy.hidden(batch)[batch.predict_N]) / 0.5
    expected_N = logits_NV.log_softmax(-1).gather(-1, batch.labels_N[:, None]).squeeze(-1)
    torch.testing.assert_close(policy(batch, temperature=0.5).logps_N, expected_N, atol=1e-5, rtol=1e-5)


def test_sums_are_per_answer(batch: Batch) -> None:
    values_N = torch.arange(len(batch.labels_N), dtype=torch.float32)
    expected = [float(values_N[batch.answer_N == a].sum()) for a in range(batch.answers)]
    assert sums(values_N, batch.answer_N, batch.answers).tolist() == expected


def test_small_models_get_one_thread(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(llama)
    monkeypatch.setattr("stages.engine.models.cpu._DEFAULT_THREADS", 8)
    assert torch.get_num_threads() == threads_for(policy) == 1
    monkeypatch.setattr("stages.engine.models.cpu.SMALL", 10)
    assert threads_for(policy) == 8


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("training", [Training(), LORA])
def test_everything_is_computed_inside_forward_as_ddp_asks(
    training: Training, llama: Path, batch: Batch, one_rank: None
) -> None:
    gradients = []
    for wrap in (lambda policy: policy, DistributedDataParallel):
        policy = load_policy(llama, training, value_head=True)
        stir(policy)
        out = wrap(policy)(batch, value=True)
        (out.logps_N.sum() + out.values_N.sum()).backward()
        gradients.append([p.grad for p in policy.parameters() if p.requires_grad])
        assert all(gradient is not None for gradient in gradients[-1])
    torch.testing.assert_close(*gradients)


# --- saving and loading ---


def test_weights_may_be_read_by_whom_the_umask_lets(llama: Path, tmp_path: Path) -> None:
    save_policy(load_policy(llama), NoTokenizer(), tmp_path / "saved")
    (tmp_path / "ordinary").touch()
    modes = {file.stat().st_mode for file in [*(tmp_path / "saved").iterdir(), tmp_path / "ordinary"]}
    assert len(modes) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_fully_trained_policy_comes_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    policy = load_policy(save_tiny(tmp_path / "start", kind), value_head=True)
    stir(policy)
    save_policy(policy, NoTokenizer(), tmp_path / "saved")
    again = load_policy(tmp_path / "saved")
    expected, state = policy.plain.state_dict(), again.plain.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert not (again.plain.config.tie_word_embeddings ^ policy.plain.config.tie_word_embeddings)


def test_dropout_is_off_here_and_stands_in_the_saved_config(tmp_path: Path) -> None:
    policy = load_policy(save_tiny(tmp_path / "start", "gpt2", resid_pdrop=0.3)).train()
    batch = collate(random_trees(3), "shared", PAD)
    assert torch.equal(policy(batch).logps_N, policy(batch).logps_N)
    save_policy(policy, NoTokenizer(), tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["resid_pdrop"] == 0.3
    assert policy.plain.config.resid_pdrop == 0.0


def test_a_model_for_evaluation_is_frozen(llama: Path) -> None:
    for model in (load_policy(llama, LORA, trainable=False), load_scorer(llama, LORA, trainable=False)):
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", SCORERS)
def test_a_score_is_the_head_at_the_last_real_token(kind: str, tmp_path: Path) -> None:
    scorer = load_scorer(save_tiny(tmp_path / "start", kind), seed=3)
    trees = random_trees(4)
    scores_A = scorer(collate(trees, "padded", PAD))  # the end token pads too
    save_scorer(scorer, NoTokenizer(), tmp_path / "saved")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    plain.config.pad_token_id = None  # transformers then takes the last token of a row without padding
    expected = [plain(torch.tensor([[*t.prompt, *a]])).logits.item() for t in trees for a in t.answers]
    torch.testing.assert_close(scores_A, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_saving_draws_no_progress_bar(llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its carriage returns would be lines of the run's log."""
    transformers_logging.enable_progress_bar()
    save_policy(load_policy(llama), NoTokenizer(), tmp_path / "saved")
    assert "Writing" not in capfd.readouterr().err


def test_a_saved_scorer_gives_the_same_in_plain_transformers_batched(llama: Path, tmp_path: Path) -> None:
    scorer = load_scorer(llama)
    save_scorer(scorer, NoTokenizer(), tmp_path / "saved")
    trees = [t for t in random_trees(9) if all(PAD not in a for a in t.answers)]
    batch = collate(trees, "padded", PAD)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    logits = plain(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
    torch.testing.assert_close(logits.squeeze(-1), scorer(batch), atol=1e-5, rtol=1e-5)


def test_a_loaded_scorer_is_normalised(llama: Path, tmp_path: Path, batch: Batch) -> None:
    scorer = load_scorer(llama)
    raw = scorer(batch)
    save_scorer(scorer, NoTokenizer(), tmp_path / "saved", mean=0.25, std=2.0)
    again = load_scorer(tmp_path / "saved", seed=9)  # the seed plays no part in a saved head
    torch.testing.assert_close(again(batch), (raw - 0.25) / 2.0)
    assert torch.equal(scorer(batch), raw)
    for mean, std in [(0.0, 0.0), (math.nan, 1.0), (0.0, math.inf)]:
        with pytest.raises(ValueError, match="normalised"):
            save_scorer(scorer, NoTokenizer(), tmp_path / "bad", mean, std)


def test_a_fresh_score_head_is_a_function_of_the_seed(llama: Path) -> None:
    one, same, other = (load_scorer(llama, seed=seed).plain.get_parameter("score.weight") for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_scorer_is_a_critic_with_a_value_before_every_token(llama: Path, batch: Batch) -> None:
    scorer = load_scorer(llama)
    values_N = scorer(batch, every=True)
    head = scorer.plain.get_submodule("score")
    torch.testing.assert_close(values_N, head(scorer.hidden(batch)[batch.predict_N]).squeeze(-1))


# --- folders that cannot be used ---


def refusal(folder: Path, load: type | object = load_policy) -> str:
    with pytest.raises(StageError) as caught:
        load(folder)  # type: ignore[operator]
    assert caught.value.status == "refused"
    assert str(folder) in str(caught.value) and "Fix:" in str(caught.value)
    return str(caught.value)


def edit(folder: Path, **changes: object) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def test_folders_that_hold_no_model(llama: Path, tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "config.json" in refusal(tmp_path / "empty")
    (llama / "model.safetensors").rename(tmp_path / "gone")
    torch.save({}, llama / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle" in refusal(llama)


def test_a_broken_weights_file(llama: Path) -> None:
    content = (llama / "model.safetensors").read_bytes()
    (llama / "model.safetensors").write_bytes(content[: len(content) // 2])
    refusal(llama)


def test_code_of_its_own_is_never_run(llama: Path) -> None:
    (llama / "evil.py").write_text("raise SystemExit('ran')")
    edit(llama, model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    assert "needs code from its folder, which is never run" in refusal(llama)


def test_models_of_another_kind(llama: Path, tmp_path: Path) -> None:
    assert "unknown to transformers" in refusal(edit(llama, model_type="nonesuch"))
    assert "encoder-decoder" in refusal(edit(llama, model_type="bart", is_encoder_decoder=True))
    assert "quantized" in refusal(edit(llama, model_type="llama", is_encoder_decoder=False, quantization_config={}))


def test_missing_weights_are_not_made_up(llama: Path) -> None:
    assert "missing" in refusal(edit(llama, num_hidden_layers=4))
    assert "missing" in refusal(llama, load_scorer)
    assert "misshapen" in refusal(edit(llama, num_hidden_layers=3, vocab_size=VOCABULARY + 1))


def test_a_reward_model_is_no_policy(llama: Path, tmp_path: Path) -> None:
    save_scorer(load_scorer(llama), NoTokenizer(), tmp_path / "reward")
    assert "reward model" in refusal(tmp_path / "reward")


def test_a_reward_model_of_several_labels(tmp_path: Path, llama: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=3)
    model.save_pretrained(tmp_path / "three")
    assert "one linear score" in refusal(tmp_path / "three", load_scorer)
