"""What is held out of each source of a mixture: the same numbers as those of its rows alone. And a run that resumes on
rows that were drawn."""

import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from schemas.config import RewardConfig, SFTConfig
from schemas.config.data import MixtureParams
from schemas.config.methods import DPO as DPOConfig
from schemas.config.methods import KTO as KTOConfig
from stages import reward, sft
from stages.align.dpo import DPO
from stages.align.kto import KTO
from stages.compare import by_source as table_by_source
from stages.compare import compare, render_html, text
from stages.engine.scoring import metrics
from stages.engine.scoring.by_source import by_source
from stages.engine.scoring.evaluation_record import Evaluation
from stages.engine.scoring.intervals import bootstrap
from stages.engine.training.loop import train
from stages.validate import check_mixture
from stages.validate.context import Context
from tests.stages.test_evaluate import N, World, settings
from tests.stages.validate.test_validate import write
from tests.support import models
from tests.support.context import MemoryContext

pytestmark = pytest.mark.usefixtures("home")


def sourced(rows: Sequence[Mapping[str, Any]], names: str) -> list[dict[str, Any]]:
    """The rows, each with a source: one letter for each row."""
    return [{**row, "source": name} for row, name in zip(rows, names, strict=True)]


def context(folder: Path, config: Any, stage: str, **kinds: Any) -> MemoryContext:
    inputs = {"model": models.model_folder(folder / "model"), "data": models.data_folder(folder / "data", **kinds)}
    return MemoryContext(folder / "work", config, inputs, stage=stage)


def test_values_are_grouped_by_the_names_of_sources() -> None:
    rows = [{"source": "b"}, {"source": "a"}, {"source": "b"}]
    assert by_source(rows, [1, 2, 3]) == {"a": [2], "b": [1, 3]} and list(by_source(rows, [1, 2, 3])) == ["a", "b"]
    assert by_source([{}, {}], [1, 2]) == {} == by_source(rows[::2], [1, 3])


def test_sft_loss_of_a_source_is_the_mean_over_the_tokens_of_its_rows(tmp_path: Path) -> None:
    config = SFTConfig(batch_size=4)
    held_out = sourced(models.rows(5, *models.ANSWERS), "abbab")
    run = context(tmp_path, config, "sft", sft=models.rows(6, *models.ANSWERS), eval_sft=held_out)
    method = sft.SFT(config, run)
    found = method.finish(run.work / "model")
    for name in "ab":
        trees = [example.tree for example in method.held_out_examples() if example.row["source"] == name]
        every = [value for tree in trees for answer in models.logps(run.input("model"), tree) for value in answer]
        assert found[f"eval/{name}/loss"] == pytest.approx(-fmean(every), rel=1e-5)
        assert found[f"eval/{name}/perplexity"] == pytest.approx(math.exp(-fmean(every)), rel=1e-5)
        assert found[f"eval/{name}/rows"] == "abbab".count(name)
    assert found["eval/a/loss"] != pytest.approx(found["eval/b/loss"], rel=1e-2)
    assert {"eval/loss", "eval/perplexity"} <= found.keys() and len(found) == 8


def test_rewards_accuracy_of_a_source_is_that_of_its_comparisons(tmp_path: Path) -> None:
    config = RewardConfig(batch_size=4)
    rows = sourced(models.rows(6, *models.RANKINGS), "abbaab")
    run = context(tmp_path, config, "reward", ranking=rows, eval_ranking=rows)
    method = reward.Reward(config, run)
    found = method.held_out_metrics()
    alone = {}
    for name in "ab":
        mine = [row for row in rows if row["source"] == name]
        shutil.rmtree(run.input("data") / "eval")
        models.data_folder(run.input("data"), eval_ranking=mine)
        alone[name] = method.held_out_metrics()
        for measure in ("accuracy", "calibration", "pairs"):
            assert found[f"eval/{name}/{measure}"] == pytest.approx(alone[name][f"eval/{measure}"], abs=1e-6)
        assert not [key for key in alone[name] if key.startswith(("eval/a/", "eval/b/"))]  # of one source: the whole
    assert found["eval/pairs"] == alone["a"]["eval/pairs"] + alone["b"]["eval/pairs"]


@pytest.mark.parametrize(
    ("method", "config", "kind", "columns"),
    [(DPO, DPOConfig, "preference", models.PAIRS), (KTO, KTOConfig, "feedback", models.THUMBS)],
)
def test_the_change_of_liked_answers_of_a_source_is_the_mean_over_its_rows(
    method: Any, config: Any, kind: str, columns: Any, tmp_path: Path
) -> None:
    settings = config(batch_size=4, learning_rate=1e-2)
    held_out = sourced(models.rows(8, *columns), "abbabaab")
    run = context(tmp_path, settings, "align", **{kind: models.rows(8, *columns), f"eval_{kind}": held_out})
    trained = method(settings, run)
    models.perturb(trained.model, scale=0.3)
    found = trained.finish(run.work / "model")
    changes: dict[str, list[float]] = {"a": [], "b": []}
    for row, tree in zip(trained.test_rows, trained.test, strict=True):
        folders = (run.work / "model", run.input("model"))
        after, before = (sum(models.logps(folder, tree)[0]) for folder in folders)
        changes[row["source"]].append(after - before)
    for name, values in changes.items():
        assert found[f"eval/{name}/chosen_logp_change"] == pytest.approx(fmean(values), abs=1e-3)
        assert found[f"eval/{name}/rows"] == len(values) > 0
    assert fmean(changes["a"]) != pytest.approx(fmean(changes["b"]), abs=1e-2)


# --- evaluations ---


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.rows = sourced(made.rows, ("aab" * N)[:N])
    pairs = sourced(models.rows(9, *models.PAIRS), "ababababa")
    made.data = models.data_folder(tmp_path / "mixed", eval_prompt=made.rows, eval_preference=pairs)
    return made


def test_an_evaluations_numbers_of_a_source_are_those_of_its_prompts(world: World) -> None:
    config = settings(temperatures=[1.0, 0.5], samples_per_prompt=2)
    final, evaluation, run = world.evaluate(world.aligned, config, pairs=world.data, baseline=world.baseline(config))
    of = {world.rows[i]["prompt"][0]["content"]: world.rows[i]["source"] for i in range(N)}
    for temperature, start in ((1.0, "eval"), (0.5, "eval/t0.5")):
        for name in "ab":
            mine = [row for row in evaluation.at(temperature) if of[row.prompt[0]["content"]] == name]
            assert len(mine) == 2 * list(of.values()).count(name) == 2 * final[f"{start}/{name}/prompts"]
            assert final[f"{start}/{name}/judge_score"] == pytest.approx(fmean(row.score for row in mine))
            assert final[f"{start}/{name}/win_rate_vs_sft"] == pytest.approx(fmean(row.win for row in mine))
            assert final[f"{start}/{name}/length"] == pytest.approx(fmean(row.length for row in mine))
            interval = bootstrap([row.win for row in mine], [row.cluster for row in mine], resamples=200, seed=0)
            assert final[f"{start}/{name}/win_rate_vs_sft_low"] == interval.low
            assert final[f"{start}/{name}/win_rate_vs_sft_high"] == interval.high
            if temperature == 1.0:
                assert final[f"eval/{name}/kl_to_reference"] == pytest.approx(fmean(row.kl for row in mine))
    rights = [right for _, right in evaluation.pairs]
    assert final["eval/a/preference_accuracy"] == metrics.win_rate(rights[::2])
    assert final["eval/b/preference_accuracy"] == metrics.win_rate(rights[1::2])
    assert evaluation.settings["sources"] == {"a": 8, "b": 4} and N == 12
    assert run.published


def test_of_one_source_there_are_no_numbers_by_source(world: World) -> None:
    world.data = models.data_folder(world.folder / "one", eval_prompt=[{**row, "source": "a"} for row in world.rows])
    final, evaluation, _ = world.evaluate(world.sft)
    assert (
        not [name for name in final if name.startswith(("eval/a", "eval//"))] and "sources" not in evaluation.settings
    )


def test_a_comparison_shows_models_by_source(world: World) -> None:
    baseline = world.baseline()
    evaluations = {
        "sft": Evaluation.load(baseline),
        "tales": world.evaluate(world.aligned, baseline=baseline)[1],  # whose name begins as a temperature's column
    }
    comparison = compare(evaluations)
    assert comparison.sources == {"a": 8, "b": 4}
    shown = text(comparison)
    lines = table_by_source.lines(comparison.table, comparison.sources)
    assert [line[:2] for line in lines] == [
        (f"{source} prompts)", model) for source in ("a (8", "b (4") for model in ("sft", "tales")
    ]
    numbers = evaluations["tales"].metrics
    assert lines[1][2] == f"{numbers['eval/a/judge_score']:.2f}"
    assert lines[1][3].startswith(f"{100 * numbers['eval/a/win_rate_vs_sft']:.0f} % [")
    assert "At T=" not in shown and shown.count("(8 prompts)") == 2
    assert "By source of the prompts" in render_html(comparison)


def test_a_source_is_never_taken_for_a_temperature(world: World) -> None:
    world.data = models.data_folder(
        world.folder / "named",
        eval_prompt=[{**row, "source": "tales" if row["source"] == "a" else "b"} for row in world.rows],
    )
    config = settings(temperatures=[1.0, 0.5])
    baseline = world.baseline(config)
    evaluations = {"sft": Evaluation.load(baseline), "dpo": world.evaluate(world.aligned, config, baseline=baseline)[1]}
    shown = text(compare(evaluations))
    assert shown.count("At T=") == 1 and "At T=0.5" in shown


# --- training on what was drawn ---


def test_an_interrupted_run_on_drawn_rows_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Some rows twice, some thrice, some not at all; steps of packed rows, over more than one epoch."""
    words = models.WORDS
    a = [{"prompt": f"{words[i]} one", "response": "yes good"} for i in range(6)]
    b = [{"prompt": f"{words[i]} two", "response": "no bad two"} for i in range(8)]
    files = {name: str(write(tmp_path / f"{name}.jsonl", rows)) for name, rows in (("a", a), ("b", b))}
    sources = [
        {"path": files["a"], "kind": "sft", "epochs": 2.5},
        {"path": files["b"], "kind": "sft", "epochs": 0.5},
    ]
    params = MixtureParams.model_validate({"sources": sources, "eval_fraction": 0, "seed": 4})
    check_mixture(params, {one.name: Context(params.of(one)) for one in params.sources}, tmp_path / "data")
    config = SFTConfig(batch_size=4, learning_rate=1e-2, epochs=2, max_steps=7, checkpoint_steps=3, layout="packed")
    inputs = {"model": models.model_folder(tmp_path / "model"), "data": tmp_path / "data"}
    whole = MemoryContext(tmp_path / "whole", config, inputs, stage="sft")
    method = sft.SFT(config, whole)
    drawn = Counter((example.row["source"], example.row["row"]) for example in method.examples)
    assert sorted(drawn.values()) == [1, 1, 1, 1, 2, 2, 2, 3, 3, 3]  # 4 of b, and 6 of a: 15 rows
    sft.train_and_publish(method, whole)

    cut = MemoryContext(tmp_path / "cut", config, inputs, stage="sft")
    shutil.copytree(tmp_path / "whole" / "checkpoints", tmp_path / "cut" / "checkpoints")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-7")  # as if it had been killed after step 6
    again = sft.SFT(config, cut)
    train(again, cut)
    assert min(step for name, step in cut.logged if name == "train/loss" and step) == 7
    published = load_file(whole.published["model"] / "model.safetensors")
    again.finish(tmp_path / "again")
    resumed = load_file(tmp_path / "again" / "model.safetensors")
    assert published.keys() == resumed.keys()
    assert all(torch.equal(published[name], resumed[name]) for name in published)
