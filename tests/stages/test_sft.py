"""SFT: exactly the answers and their end tokens are learned, as a mean over the whole step's tokens."""

import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from schemas.config import SFTConfig
from schemas.errors import StageError
from stages import sft
from stages.engine.data.codec import Codec
from stages.engine.data.trees import Tree
from tests.support import models
from tests.support.context import MemoryContext

pytestmark = pytest.mark.usefixtures("home")


def config(**changes: Any) -> SFTConfig:
    return SFTConfig(**{"batch_size": 4, "learning_rate": 1e-2, **changes})


ROWS = models.rows(6, *models.ANSWERS)


def make(
    folder: Path, training: SFTConfig, rows: Any = ROWS, pad_is_end: bool = False, seed: int = 0, **more: Any
) -> tuple[sft.SFT, MemoryContext]:
    model = models.model_folder(folder / "model", pad_is_end)
    data = models.data_folder(folder / "data", sft=rows, **more)
    run = MemoryContext(folder / "work", training, {"model": model, "data": data}, stage="sft", seed=seed)
    return sft.SFT(training, run), run


def negative_mean(folder: Path, trees: list[Tree]) -> float:
    """-mean log pi over all answer tokens, in float64."""
    every = [value for tree in trees for answer in models.logps(folder, tree) for value in answer]
    return -sum(every) / len(every)


@pytest.mark.parametrize("pad_is_end", [False, True])
@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_labels_are_the_answer_and_its_end(tmp_path: Path, layout: str, pad_is_end: bool) -> None:
    method, run = make(tmp_path, config(layout=layout), pad_is_end=pad_is_end)
    codec = Codec.load(run.input("model"))
    assert (codec.pad_id == codec.end_id) is pad_is_end
    for micro in next(method.batches(0)):
        rows = [method.examples[row].row for row in micro.rows]
        expected = [token for row in rows for token in [*codec.answer(row["response"])]]
        assert micro.batch.labels_N.tolist() == expected
        ends = micro.batch.labels_N[micro.batch.lengths_A.cumsum(0) - 1]
        assert ends.tolist() == [codec.end_id] * len(rows)
        assert micro.batch.labels_N.tolist().count(codec.end_id) == len(rows)


@pytest.mark.parametrize("pad_is_end", [False, True])
@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_loss_is_the_mean_over_the_steps_tokens(tmp_path: Path, layout: str, pad_is_end: bool) -> None:
    method, run = make(tmp_path, config(layout=layout, tokens_per_micro_batch=16), pad_is_end=pad_is_end)
    micros = next(method.batches(0))
    assert len(micros) > 1
    trees = [method.trees[row] for micro in micros for row in micro.rows]
    assert models.one_step(method)[0] == pytest.approx(negative_mean(run.input("model"), trees), rel=1e-5)


def test_held_out_loss_and_perplexity(tmp_path: Path) -> None:
    held_out = models.rows(5, *models.ANSWERS)
    method, run = make(tmp_path, config(), eval_sft=held_out)
    expected = negative_mean(run.input("model"), method.held_out())
    metrics = method.finish(run.work / "model")
    assert metrics["eval/loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval/perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_without_held_out_rows_there_is_no_held_out_loss(tmp_path: Path) -> None:
    method, run = make(tmp_path, config())
    assert method.finish(run.work / "model") == {}


def test_rows_that_are_too_long_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # A prompt has 2, 3 or 4 words; the answers beside them have 3, 1 and 6 words and an end: 6, 5 and 11 tokens.
    method, run = make(tmp_path, config(max_length=10))
    assert [example.row["row"] for example in method.examples] == [0, 1, 3, 4]
    assert run.logged["data/too_long", None] == 2
    assert run.logged["data/rows", None] == 4
    assert "2 of 6 rows are longer than 10 tokens" in caplog.text


def test_a_row_of_exactly_the_longest_length_stays(tmp_path: Path) -> None:
    assert len(make(tmp_path, config(max_length=11))[0].examples) == 6


def test_the_models_context_bounds_the_rows_too(tmp_path: Path) -> None:
    rows = [*ROWS, models.row(6, "a", response=" ".join(["b"] * 63))]  # 65 tokens; the model has 64 positions
    assert len(make(tmp_path, config(max_length=1000), rows)[0].examples) == 6


def test_no_row_left_stops_with_the_shortest_length(tmp_path: Path) -> None:
    rows = [models.row(0, "a b", response="c d e f g h a"), models.row(1, "a b", response="c d e f g h")]
    with pytest.raises(StageError, match="all 2 are too long; the shortest has 9 tokens") as stopped:
        make(tmp_path, config(max_length=8), rows)
    assert stopped.value.problem.field == "max_length"


def test_missing_rows_are_named(tmp_path: Path) -> None:
    model = models.model_folder(tmp_path / "model")
    data = models.data_folder(tmp_path / "data", prompt=models.rows(2, {}))
    run = MemoryContext(tmp_path / "work", config(), {"model": model, "data": data})
    with pytest.raises(StageError, match=r"no rows of kind `sft`.*only: prompt") as stopped:
        sft.SFT(config(), run)
    assert stopped.value.problem.field == "data.sft"
    assert stopped.value.problem.fix


@pytest.mark.parametrize("lora", [None, models.LORA])
def test_stage_learns_and_publishes_a_plain_transformers_folder(tmp_path: Path, lora: Any) -> None:
    training = config(epochs=20, lora=lora)
    method, run = make(tmp_path, training, eval_sft=models.rows(6, *models.ANSWERS))
    before = method.finish(run.work / "before")["eval/loss"]
    metrics = sft.run(run)
    assert metrics["eval/loss"] < before - 0.3
    assert metrics["compute/train_tokens"] > 0
    assert len(run.steps("train/loss")) == 20 * 6 / 4
    published = run.published["model"]
    assert negative_mean(published, method.held_out()) == pytest.approx(metrics["eval/loss"], rel=1e-4)
    assert not [name for name in AutoModelForCausalLM.from_pretrained(published).state_dict() if "lora" in name]
    assert Codec.load(published).end_id == method.codec.end_id


def test_which_rows_a_step_sees_is_a_function_of_seed_and_step(tmp_path: Path) -> None:
    method, _ = make(tmp_path, config(epochs=3))
    whole = [[micro.rows for micro in micros] for micros in method.batches(0)]
    assert len(whole) == method.total_steps == math.ceil(6 * 3 / 4)
    assert [[micro.rows for micro in micros] for micros in method.batches(2)] == whole[2:]
    seen = [row for micros in whole for rows in micros for row in rows]
    assert len(seen) == method.total_steps * 4
    assert min(seen.count(row) for row in range(6)) == 3
    assert whole != [
        [micro.rows for micro in micros] for micros in make(tmp_path, config(epochs=3), seed=1)[0].batches(0)
    ]
