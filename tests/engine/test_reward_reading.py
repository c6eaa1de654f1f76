"""Reward models are read where plain transformers reads them: those from outside here, and ours there."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from flows.results import export
from schemas.config.methods import PPO
from schemas.errors import StageError
from schemas.model_folder import stored, why_unusable
from stages.align.ppo import RewardModel
from stages.engine.data.codec import Codec
from stages.engine.models.loading import load_judge, load_scorer
from stages.engine.models.saving import save_scorer
from stages.engine.scoring.judges import RewardJudge
from tests.support.families import FAMILIES, save_language_model, save_reward_model

ANSWERS = ["hello there", "No, it flew away!", "the", "Hello to you."]
PROMPTS = ["how are you today?", "hello", "the blue bird sat in a tree", "Hello!"]
CHATS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


def conversation(tokenizer: Any, chat: list[dict[str, str]], answer: str, end: str) -> str:
    """The whole of it as the template writes it, up to the answer's end."""
    text = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": answer}], tokenize=False)
    return text[: text.rindex(end) + len(end)]


@torch.no_grad()
def plain_scores(folder: Path, end: str) -> list[float]:
    """What transformers gives for each conversation as one text, alone and without padding."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = [conversation(tokenizer, chat, answer, end) for chat, answer in zip(CHATS, ANSWERS, strict=True)]
    return [
        float(model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits.squeeze())
        for text in texts
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_one_from_outside_is_read_as_its_own_code_reads_it(name: str, tmp_path: Path) -> None:
    """Its padding is what ends answers, so transformers reads the token before."""
    family = FAMILIES[name]
    folder = save_reward_model(tmp_path / "reward", family)
    expected = plain_scores(folder, family.end)
    assert RewardJudge(folder).score(CHATS, ANSWERS) == pytest.approx(expected, abs=1e-4)
    codec = Codec.load(folder)
    in_ppo = RewardModel(folder, folder, PPO(), None)
    trees = [in_ppo.tree({}, codec.prompt(c), codec.answer(a)) for c, a in zip(CHATS, ANSWERS, strict=True)]
    assert in_ppo(trees) == pytest.approx(expected, abs=1e-4)
    assert len({round(score, 3) for score in expected}) == len(expected)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1", b"\x40" + bytes(7) + b'{"a'])
def test_one_whose_file_is_not_whole_is_refused(content: bytes, tmp_path: Path) -> None:
    """Empty, a pointer of Git LFS, a header of 64 bytes of which 3 are there: before a run and where it is loaded."""
    folder = save_reward_model(tmp_path / "reward", FAMILIES["gpt2"])
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(StageError, match=r"its weights cannot be read: model\.safetensors is no safetensors file, or"):
        load_judge(folder)
    found = why_unusable(folder, scorer=True)
    assert found is not None and found[0].startswith("its weights cannot be read: model.safetensors is no safetensors")


def test_a_file_that_its_index_leaves_out_is_not_read(tmp_path: Path) -> None:
    folder = save_reward_model(tmp_path / "reward", FAMILIES["gpt2"])
    whole = stored(folder)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(whole, "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "old.safetensors").write_bytes(b"of another model")
    assert stored(folder) == whole and "score.weight" in whole
    assert load_judge(folder).held == "fp32"


def test_one_whose_padding_is_another_token_is_read_at_the_end(tmp_path: Path) -> None:
    family = FAMILIES["qwen2"]
    folder = save_reward_model(tmp_path / "reward", family, pad_token_id=0)  # <|endoftext|>
    tree = load_judge(folder).read([5, 6], [7, 8, 2])
    assert (tree.prompt, tree.answers) == ((5, 6), ((7, 8, 2),))
    assert RewardJudge(folder).score(CHATS, ANSWERS) == pytest.approx(plain_scores(folder, family.end), abs=1e-4)


def test_an_empty_answer_is_read_at_the_prompts_end(tmp_path: Path) -> None:
    folder = save_reward_model(tmp_path / "reward", FAMILIES["qwen2"])
    tree = load_judge(folder).read([5, 6, 7], [2])
    assert (tree.prompt, tree.answers) == ((5, 6), ((7,),))
    tree = load_judge(folder).read([2, 2], [2])  # nothing but padding
    assert (tree.prompt, tree.answers) == ((2, 2), ((2,),))


@pytest.mark.parametrize("name", FAMILIES)
def test_ours_scores_in_plain_transformers_by_its_card(
    name: str, tmp_path: Path, ready_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES[name]
    base = save_language_model(tmp_path / "base", family)
    save_scorer(load_scorer(base, seed=5), Codec.load(base), tmp_path / "reward", mean=0.5, std=2.0)
    judge = RewardJudge(tmp_path / "reward")
    ours = [2.0 * score + 0.5 for score in judge.score(CHATS, ANSWERS)]
    out = tmp_path / "exported"
    export.export(str(tmp_path / "reward"), out)
    assert plain_scores(out, family.end) == pytest.approx(ours, abs=1e-4)
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with torch.no_grad():
        exec(code.replace("print(", "score = ("), names)  # of "Hello!" and "Hello to you.", the last of ours
    assert float(names["score"]) == pytest.approx(ours[-1], abs=1e-4)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gpt2"])
@torch.no_grad()
def test_ours_scores_the_same_in_a_padded_batch(name: str, tmp_path: Path) -> None:
    """GPT-2's tokenizer has one special token, so transformers refuses its batches."""
    family = FAMILIES[name]
    base = save_language_model(tmp_path / "base", family)
    save_scorer(load_scorer(base, seed=5), Codec.load(base), tmp_path / "reward")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "reward", padding_side="right")
    texts = [conversation(tokenizer, chat, answer, family.end) for chat, answer in zip(CHATS, ANSWERS, strict=True)]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    scores = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(-1).tolist()
    assert scores == pytest.approx(plain_scores(tmp_path / "reward", family.end), abs=1e-4)
    assert int((batch["attention_mask"] == 0).sum()) > 0


def test_a_batch_is_refused_where_only_the_end_could_pad(tmp_path: Path) -> None:
    base = save_language_model(tmp_path / "base", FAMILIES["gpt2"])
    save_scorer(load_scorer(base, seed=5), Codec.load(base), tmp_path / "reward")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    with pytest.raises(ValueError, match="no padding token"):
        model(input_ids=torch.tensor([[1, 2], [3, 4]]))
