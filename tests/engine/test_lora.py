"""Adapters: in training, merged on saving, apart from their model, and several models on one base."""

import json
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from schemas.config.training import LoRA, Training
from schemas.errors import StageError
from stages.engine.data.trees import Batch, collate
from stages.engine.models.loading import load_judge, load_policy, load_scorer
from stages.engine.models.lora import base_of
from stages.engine.models.saving import save_policy, save_scorer
from tests.engine.test_models import LORA, PAD, stir
from tests.support.architectures import KINDS, SCORERS, NoTokenizer, random_trees, save_tiny

# --- in training ---


@pytest.mark.parametrize("kind", KINDS)
def test_with_adapters_off_the_policy_is_exactly_the_loaded_model(kind: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, kind)
    batch = collate(random_trees(4), "shared", PAD)
    start = load_policy(folder)(batch).logps_N
    policy = load_policy(folder, LORA)
    assert torch.equal(policy(batch).logps_N, start)  # fresh adapters change nothing
    stir(policy)
    assert not torch.equal(policy(batch).logps_N, start)
    with policy.reference():
        assert torch.equal(policy(batch).logps_N, start)
    assert not torch.equal(policy(batch).logps_N, start)


def test_adapters_stand_in_every_layer_and_nothing_else_learns(llama: Path) -> None:
    policy = load_policy(llama, LORA, value_head=True)
    learning = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name or name.startswith("value_head") for name in learning)
    assert len(learning) == 2 * 7 * 3 + 2  # A and B for q, k, v, o, gate, up, down of three layers; the value head


def test_adapters_are_a_function_of_the_seed(llama: Path) -> None:
    def first(seed: int) -> Tensor:
        policy = load_policy(llama, LORA, seed=seed)
        return next(p for name, p in policy.named_parameters() if "lora_A" in name)

    before = torch.get_rng_state()
    assert torch.equal(first(1), first(1)) and not torch.equal(first(1), first(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_adapters_can_be_aimed(llama: Path) -> None:
    policy = load_policy(llama, Training(lora=LoRA(target=r".*\.(q|v)_proj")))
    learning = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    assert learning and all("q_proj" in name or "v_proj" in name for name in learning)
    with pytest.raises(StageError, match=r"lora\.target"):
        load_policy(llama, Training(lora=LoRA(target="nothing")))
    with pytest.raises(StageError, match="embeddings and heads"):
        load_policy(llama, Training(lora=LoRA(target=r".*\.(q_proj|embed_tokens)")))
    with pytest.raises(StageError, match="embeddings and heads"):
        load_scorer(llama, Training(lora=LoRA(target=r".*(q_proj|score)")))


def test_adapters_learn_with_checkpointed_layers(llama: Path, batch: Batch) -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = load_policy(llama, LORA.model_copy(update={"gradient_checkpointing": checkpointing})).train()
        stir(policy)
        policy(batch).logps_N.sum().backward()
        gradients.append([p.grad for p in policy.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_policy_has_its_adapters_merged(kind: str, tmp_path: Path) -> None:
    policy = load_policy(save_tiny(tmp_path / "start", kind), LORA, value_head=True)
    stir(policy)
    batch = collate(random_trees(4), "padded", PAD)
    before = policy(batch).logps_N
    save_policy(policy, NoTokenizer(), tmp_path / "saved")
    assert torch.equal(policy(batch).logps_N, before)  # saving changes nothing here
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    logits = plain(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
    logps_N = logits.flatten(0, 1)[batch.predict_N].log_softmax(-1).gather(-1, batch.labels_N[:, None]).squeeze(-1)
    torch.testing.assert_close(logps_N, before, atol=1e-4, rtol=1e-4)
    assert {file.suffix for file in (tmp_path / "saved").iterdir()} == {".json", ".safetensors"}


def test_a_scorer_learns_with_adapters_and_saves_them_merged(llama: Path, tmp_path: Path, batch: Batch) -> None:
    scorer = load_scorer(llama, LORA)
    learning = {name for name, parameter in scorer.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name or name.endswith("score.weight") for name in learning)
    assert any(name.endswith("score.weight") for name in learning)
    stir(scorer)
    expected = scorer(batch)
    save_scorer(scorer, NoTokenizer(), tmp_path / "saved")
    torch.testing.assert_close(load_scorer(tmp_path / "saved")(batch), expected, atol=1e-5, rtol=1e-5)


# --- apart from its model ---


def logits(model: nn.Module, batch: Batch) -> Tensor:
    return model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3"])
def test_peft_puts_the_saved_adapter_on_its_base(kind: str, tmp_path: Path) -> None:
    start = save_tiny(tmp_path / "start", kind)
    policy = load_policy(start, LORA)
    stir(policy)
    save_policy(policy, NoTokenizer(), tmp_path / "saved", base="a digest")
    assert base_of(tmp_path / "saved") == "a digest"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    batch = collate(random_trees(4), "padded", PAD)
    before = logits(base, batch)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "saved" / "adapter"))
    assert (logits(adapted, batch) - before).abs().max() > 0.1
    torch.testing.assert_close(logits(adapted, batch), logits(merged, batch), atol=1e-4, rtol=1e-4)


def test_a_saved_adapter_depends_on_nothing_but_its_content(llama: Path, tmp_path: Path) -> None:
    for name in ("one", "other"):
        save_policy(load_policy(llama, LORA), NoTokenizer(), tmp_path / name, base="a digest")
    config = (tmp_path / "one" / "adapter" / "adapter_config.json").read_text()
    assert str(tmp_path) not in config
    targets = json.loads(config)["target_modules"]
    assert targets == sorted(targets), "peft keeps a set, whose order changes from process to process"
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        one, other = ((tmp_path / name / "adapter" / file).read_bytes() for name in ("one", "other"))
        assert one == other
    save_policy(load_policy(llama), NoTokenizer(), tmp_path / "full", base="a digest")
    assert base_of(tmp_path / "full") is None


# --- several models on one base ---


@pytest.fixture
def reward(llama: Path, tmp_path: Path) -> Path:
    """A reward model that was trained with adapters on `llama`."""
    return reward_on(llama, tmp_path / "reward")


def reward_on(start: Path, folder: Path) -> Path:
    scorer = load_scorer(start, LORA, seed=3)
    stir(scorer)
    save_scorer(scorer, NoTokenizer(), folder, mean=0.2, std=1.5, base="start")
    return folder


def stores(*models: nn.Module, adapters: bool = True) -> dict[int, int]:
    """Address and size in bytes of everything that the models hold, each once; perhaps without adapters."""
    named = chain.from_iterable(model.named_parameters() for model in models)
    return {p.data_ptr(): p.nbytes for name, p in named if adapters or ".lora_" not in name}


@pytest.mark.parametrize("kind", SCORERS)
def test_judge_and_critic_stand_on_the_policys_weights(kind: str, tmp_path: Path) -> None:
    start = save_tiny(tmp_path / "start", kind)
    folder = reward_on(start, tmp_path / "reward")
    batch = collate(random_trees(4), "padded", PAD)
    policy = load_policy(start, LORA)
    judge = load_judge(folder, LORA, on=policy)
    critic = load_scorer(folder, LORA, on=policy, adapter=True)
    merged = load_judge(folder)
    torch.testing.assert_close(judge(batch), merged(batch), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(critic(batch, every=True), merged(batch, every=True), atol=1e-5, rtol=1e-5)
    own = stores(judge, critic, adapters=False).keys() - stores(policy).keys()
    assert len(own) == 2, "the heads"


def parts(model: nn.Module) -> Iterator[str]:
    """Kinds of the parameters that learn."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name.rsplit(".", 2)[1] if ".lora_" in name else name.rsplit(".", 2)[-2]


def test_what_learns_on_one_base_moves_nobody_else(llama: Path, reward: Path, batch: Batch) -> None:
    policy = load_policy(llama, LORA)
    judge = load_judge(reward, LORA, on=policy)
    critic = load_scorer(reward, LORA, on=policy, adapter=True)
    assert set(parts(policy)) == {"default"}
    assert set(parts(critic)) == {"default", "score"}, "the adapter that it was given stays as it is"
    assert not set(parts(judge))
    with policy.reference():
        start = policy(batch).logps_N
    scores, values_N = judge(batch), critic(batch, every=True)
    stir(policy)
    stir(critic)
    assert torch.equal(judge(batch), scores)
    with policy.reference():
        assert torch.equal(policy(batch).logps_N, start)
    assert not torch.equal(policy(batch).logps_N, start) and not torch.equal(critic(batch, every=True), values_N)
    critic(batch, every=True).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in critic.parameters())


def test_a_critic_stands_on_a_frozen_judge_without_its_adapter(llama: Path, reward: Path, batch: Batch) -> None:
    judge = load_judge(reward)
    critic = load_scorer(reward, LORA, on=judge)
    assert len(stores(critic, adapters=False).keys() - stores(judge).keys()) == 1
    scores = judge(batch)
    torch.testing.assert_close(critic(batch), scores)
    stir(critic)
    assert torch.equal(judge(batch), scores) and not torch.equal(critic(batch), scores)


def spoil_config(place: Path) -> None:
    (place / "adapter_config.json").write_text('{"r": 4}')


def spoil_json(place: Path) -> None:
    (place / "adapter_config.json").write_text("{")


def take_a_weight(place: Path) -> None:
    state = load_file(place / "adapter_model.safetensors")
    state.popitem()
    save_file(state, place / "adapter_model.safetensors")


def another_size(place: Path) -> None:
    state = load_file(place / "adapter_model.safetensors")
    save_file({name: value[:1].clone() for name, value in state.items()}, place / "adapter_model.safetensors")


def no_weights(place: Path) -> None:
    (place / "adapter_model.safetensors").unlink()


def no_safetensors(place: Path) -> None:
    (place / "adapter_model.safetensors").write_bytes(b"PK not what it should be")


def no_such_module(place: Path) -> None:
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["nothing"]}))


SPOILT = [spoil_config, spoil_json, take_a_weight, another_size, no_weights, no_safetensors, no_such_module]


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_broken_adapter_is_refused(llama: Path, reward: Path, spoil: Callable[[Path], None]) -> None:
    spoil(reward / "adapter")
    with pytest.raises(StageError, match="adapter cannot be used") as error:
        load_judge(reward, on=load_policy(llama, LORA))
    assert error.value.problem.value == str(reward / "adapter")
