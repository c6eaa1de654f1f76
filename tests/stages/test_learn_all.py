"""`sft.learn: all`, from a file through `validate` to tokens, masks and one step of training, worked by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from schemas.config import SFTConfig
from schemas.config.data import Learn, ValidateParams
from stages import sft
from stages.engine.data.codec import Codec
from stages.engine.data.examples import encode_sft, read
from stages.engine.data.trees import Layout, Tree, collate
from stages.engine.training.loop import train_and_publish
from stages.validate import check
from stages.validate.context import Context
from stages.validate.forms.formats import parse
from stages.validate.quarantine import Report
from tests.support import models
from tests.support.context import MemoryContext
from tests.support.models import given

pytestmark = pytest.mark.usefixtures("home")

# models.WORDS: <end> is 1, a to h are 4 to 11, red 12, blue 13, green 14, yes 15, no 16, good 17, bad 18. The default
# template writes texts as they are, `<end>` behind the assistant's; this tokenizer has no token for line breaks.
TALKS: list[list[tuple[str, str, dict[str, Any]]]] = [
    [("user", "a b", {}), ("assistant", "yes good", {}), ("user", "c", {}), ("assistant", "no", {})],
    [("user", "d", {}), ("assistant", "bad", {"weight": 0}), ("user", "e", {}), ("assistant", "yes", {"weight": 1})],
    [("user", "f", {}), ("assistant", "good", {}), ("user", "g", {}), ("assistant", "bad bad", {"weight": 0})],
    [("user", "h", {}), ("assistant", "bad", {"train": False})],
    [("user", "a", {}), ("assistant", "red", {"weight": 0.5}), ("user", "b", {}), ("assistant", "blue", {})],
]


def file_of(folder: Path, talks: list[list[tuple[str, str, dict[str, Any]]]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"messages": [{"role": r, "content": c, **more} for r, c, more in talk]} for talk in talks]
    file = folder / "talks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def validated(folder: Path, talks: list[list[tuple[str, str, dict[str, Any]]]], learn: Learn) -> tuple[Codec, Report]:
    codec = Codec.load(models.model_folder(folder / "model"))
    params = ValidateParams(path=str(file_of(folder, talks)), kind="sft", eval_fraction=0, max_bad=1, learn=learn)
    return codec, check(Context(params, codec), folder / "data")


def reasons(folder: Path) -> dict[int, str]:
    lines = (folder / "data" / "quarantine.jsonl").read_text().splitlines()
    return {entry["row"]: entry["reason"] for entry in map(json.loads, lines)}


def trees(folder: Path, learn: Learn, codec: Codec) -> list[Tree]:
    return [example.tree for example in encode_sft(read(folder / "data", "train", "sft"), learn, codec)]


def test_all_turns_by_hand(tmp_path: Path) -> None:
    """Row 0: both answers with their ends; row 1: the second alone; row 2 ends at its first, the last learned one."""
    codec, report = validated(tmp_path, TALKS, "all")
    assert reasons(tmp_path) == {3: "not_learned", 4: "unknown_weight"} and report.kept == 3
    yes, no = True, False
    assert trees(tmp_path, "all", codec) == [
        Tree((4, 5), ((15, 17, 1, 6, 16, 1),), ((yes, yes, yes, no, yes, yes),)),
        Tree((7, 18, 1, 8), ((15, 1),)),
        Tree((9,), ((17, 1),)),
    ]


def test_a_row_is_cut_behind_the_last_learned_turn() -> None:
    """Of three turns the last has weight 0: the second becomes the answer, and the first stays before it."""
    spoken = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e"), ("assistant", "f")]
    messages = [{"role": role, "content": content} for role, content in spoken]
    messages[-1] = {**messages[-1], "weight": 0}  # type: ignore[dict-item]
    assert parse("sft", {"messages": messages}, "all") == {"prompt": tuple(spoken[:3]), "response": "d"}


def test_the_last_turn_by_hand(tmp_path: Path) -> None:
    """Weights of earlier turns say nothing; a last turn of weight 0 leaves nothing to learn."""
    codec, report = validated(tmp_path, TALKS, "last")
    assert reasons(tmp_path) == {2: "not_learned", 3: "not_learned"} and report.kept == 3
    assert trees(tmp_path, "last", codec) == [
        Tree((4, 5, 15, 17, 1, 6), ((16, 1),)),
        Tree((7, 18, 1, 8), ((15, 1),)),
        Tree((4, 12, 1, 5), ((13, 1),)),
    ]


def test_without_weights_both_tables_are_the_same(tmp_path: Path) -> None:
    """Which turns are learned is for training to know: the table holds the conversation, in the fields of old."""
    tables = []
    for learn in ("last", "all"):
        validated(tmp_path / learn, TALKS[:1], learn)  # type: ignore[arg-type]
        tables.append(given(tmp_path / learn / "data", "train", "sft"))
    assert tables[0].equals(tables[1])
    assert tables[0].columns == ["row", "prompt", "prompt_id", "cluster", "response"]
    assert tables[0]["prompt"].to_list()[0][0] == {"role": "user", "content": "a b"}


# --- training ---


def make(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> tuple[sft.SFT, MemoryContext]:
    config = SFTConfig(**{"batch_size": len(rows), "learning_rate": 1e-2, "learn": "all", **changes})
    model = models.model_folder(folder / "model")
    data = models.data_folder(folder / "data", sft=rows, eval_sft=rows[:2])
    run = MemoryContext(folder / "work", config, {"model": model, "data": data}, stage="sft")
    return sft.SFT(config, run), run


def talk(number: int, *texts: str, response: str) -> dict[str, Any]:
    row = models.row(number, texts[0], response=response)
    roles = ("user", "assistant")
    return {**row, "prompt": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


ROWS = [
    talk(0, "a b", "yes good", "c", response="no"),
    talk(1, "d", "bad", "e red", "green yes no", "f", response="one two three"),
    talk(2, "g h", response="good"),
]


def by_hand(folder: Path) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(loss, gradients end to end, learned tokens) by plain PyTorch: cross-entropy on whole rows, other labels -100."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    codec = Codec.load(folder)
    total, learned = torch.zeros(()), 0
    for row in ROWS:
        ids: list[int] = []
        labels: list[int] = []
        for message in [*row["prompt"], {"role": "assistant", "content": row["response"]}]:
            own = codec.tokenizer.encode(message["content"], add_special_tokens=False)
            own = [*own, codec.end_id] if message["role"] == "assistant" else own
            ids += own
            labels += own if message["role"] == "assistant" else [-100] * len(own)
        logits_TV = model(input_ids=torch.tensor([ids])).logits[0]
        total = total + torch.nn.functional.cross_entropy(
            logits_TV[:-1], torch.tensor(labels[1:]), ignore_index=-100, reduction="sum"
        )
        learned += sum(label != -100 for label in labels)
    (total / learned).backward()
    gradients = {name: p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None}
    return (total / learned).detach(), torch.cat([gradients[name] for name in sorted(gradients)]), learned


@pytest.mark.parametrize("budget", [4096, 16])
@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_one_step_is_plain_cross_entropy(tmp_path: Path, layout: str, budget: int) -> None:
    """Loss and gradient of the mean over all learned tokens of the step: 5 + 10 + 2 of them, however it is cut."""
    method, run = make(tmp_path, ROWS, layout=layout, tokens_per_micro_batch=budget)
    expected, gradient, learned = by_hand(run.input("model"))
    assert learned == (3 + 2) + (2 + 4 + 4) + 2
    loss, _ = models.one_step(method)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    named = {name: p.grad.flatten() for name, p in method.policy.hf.named_parameters() if p.grad is not None}
    torch.testing.assert_close(torch.cat([named[name] for name in sorted(named)]), gradient, rtol=1e-4, atol=1e-6)


def test_held_out_loss_counts_learned_tokens(tmp_path: Path) -> None:
    method, run = make(tmp_path, ROWS)
    every: list[float] = []
    for tree in method.held_out():
        [logps] = models.logps(run.input("model"), Tree(tree.prompt, tree.answers))
        mask = tree.masks[0] if tree.masks else [True] * len(logps)
        every += [value for value, is_learned in zip(logps, mask, strict=True) if is_learned]
    assert len(every) == (3 + 2) + (2 + 4 + 4)
    metrics = method.finish(run.work / "model")
    assert metrics["eval/loss"] == pytest.approx(-sum(every) / len(every), rel=1e-5)
    assert metrics["eval/perplexity"] == pytest.approx(math.exp(-sum(every) / len(every)), rel=1e-5)


def test_it_trains_and_says_how_many_turns_stand_apart(tmp_path: Path) -> None:
    method, run = make(tmp_path, ROWS, epochs=30)
    before = method.finish(run.work / "before")["eval/loss"]
    assert run.logged["data/turns_apart", None] == 0
    metrics = train_and_publish(method, run)
    assert metrics["eval/loss"] < before - 0.3


# --- masks in batches ---

MASKED = [
    Tree((5, 6), ((7, 8, 9, 10),), ((True, False, False, True),)),
    Tree((11,), ((12, 13), (14,))),
    Tree((15,), ((16, 17), (18, 19, 20)), ((False, True), (True, True, False))),
]


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_a_batch_holds_what_is_learned(layout: Layout) -> None:
    """Tokens, their places, the states that predict them, and counts per answer: as written here, by hand."""
    batch = collate(MASKED, layout, pad_id=2)
    flat = batch.input_ids_BT.flatten()
    assert batch.labels_N.tolist() == [7, 10, 12, 13, 14, 17, 18, 19]
    assert flat[batch.token_N].tolist() == batch.labels_N.tolist()
    assert flat[batch.predict_N].tolist() == [6, 9, 11, 12, 11, 16, 15, 18]
    assert batch.answer_N.tolist() == [0, 0, 1, 1, 2, 3, 4, 4]
    assert batch.lengths_A.tolist() == [2, 2, 1, 1, 2]
    assert flat[batch.last_A].tolist() == [10, 13, 14, 17, 20]  # an answer's last token, learned or not
    assert batch.tokens == (2 + 4) + (1 + 3) + (1 + 5)
    assert [tree.learned for tree in MASKED] == [2, 3, 3]


@pytest.mark.parametrize(
    ("masks", "message"),
    [(((True,),), "each token"), (((True, True), (True,)), "each token"), (((False, False),), "a token at least")],
)
def test_masks_that_do_not_fit_are_refused(masks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tree((1,), ((2, 3),), masks)


def test_what_a_step_learns_is_a_function_of_seed_and_step(tmp_path: Path) -> None:
    """So a training that begins again at step 2 learns the very tokens that it would have learned."""
    method, _ = make(tmp_path, ROWS, batch_size=2, epochs=3)

    def learned(start: int) -> list[list[int]]:
        return [
            [token for micro in micros for token in micro.batch.labels_N.tolist()] for micros in method.batches(start)
        ]

    assert learned(2) == learned(0)[2:] and len(learned(0)) == math.ceil(3 * 3 / 2)
