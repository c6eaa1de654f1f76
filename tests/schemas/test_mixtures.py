"""Mixtures in a config: their forms, what is refused, how many rows weights and epochs give, and names."""

from typing import Any

import pytest

from flows.planning.explain import validate
from schemas.config import PipelineConfig
from schemas.config.data import DataConfig, Mixture, MixtureParams, PipelineData, default_name, sources_of
from schemas.errors import StageError


def config(**data: Any) -> PipelineConfig:
    return validate({"name": "t", "model": {"scratch": {}}, "align": {}, "data": data})


def mixture(*sources: dict[str, Any], **more: Any) -> Mixture:
    named = [{"path": f"{name}.jsonl", "kind": "sft", **source} for name, source in zip("abcd", sources, strict=False)]
    return Mixture.model_validate({"sources": named, **more})


# --- forms ---


def test_a_list_is_a_mixture_of_the_kind_of_its_place() -> None:
    data = config(
        sft=[{"path": "x/chat.jsonl.gz"}, {"path": "pairs.parquet", "kind": "preference", "name": "liked"}],
        evaluation=[{"path": "asked.csv"}],
    ).data
    assert isinstance(data.sft, Mixture) and isinstance(data.evaluation, Mixture)
    told = [(source.name, source.kind, source.weight, source.epochs) for source in data.sft.sources]
    assert told == [("chat", "sft", None, None), ("liked", "preference", None, None)]
    assert data.evaluation.sources[0].kind == "prompt"
    assert data.sft.eval_fraction == DataConfig(path="a", kind="sft").eval_fraction
    whole = config(sft={"sources": [{"path": "chat.jsonl"}], "eval_fraction": 0.3, "stopping": "first_exhausted"}).data
    assert isinstance(whole.sft, Mixture) and whole.sft.eval_fraction == 0.3
    assert [place for place, _ in sources_of(data.sft)] == [".sources.0", ".sources.1"]


def test_a_single_source_is_what_it_was() -> None:
    """Also what its request holds, of which the key is made: no field of mixtures is in it."""
    single = config(sft={"path": "a.jsonl", "kind": "sft"}).data.sft
    assert type(single) is DataConfig and list(sources_of(single)) == [("", single)]
    fields = {"path", "kind", "sha256", "revision", "subset", "split", "columns", "format", "label_map", "limit"}
    fields |= {"eval_fraction", "test_fraction", "gold_fraction", "max_bad", "max_length", "ngrams"}
    assert single.model_dump().keys() == fields


def test_a_config_and_its_dump_are_the_same() -> None:
    data = config(sft=[{"path": "a.jsonl", "weight": 2}, {"path": "b.jsonl", "weight": 1}]).data
    assert PipelineData.model_validate(data.model_dump(mode="json")) == data
    assert PipelineData.model_validate({"sft": data.sft}) == data


def test_the_schema_of_a_deployment_takes_a_list_without_kinds_and_names() -> None:
    schema = PipelineData.model_json_schema()
    forms = schema["properties"]["sft"]["anyOf"]
    assert {"items": {"$ref": "#/$defs/MixtureSource"}, "minItems": 1, "type": "array"} in forms
    assert schema["$defs"]["MixtureSource"]["required"] == ["path"]


@pytest.mark.parametrize(
    ("sft", "words"),
    [
        ([{"path": "a.jsonl", "weight": 1}, {"path": "b.jsonl"}], "a has a weight, and b has none. Fix: give every"),
        ([{"path": "a.jsonl", "weight": 1}, {"path": "b.jsonl", "epochs": 2}], "weight and epochs exclude each other"),
        ([{"path": "a.jsonl"}, {"path": "x/a.csv"}], "several sources are called a. Fix: give each a `name`"),
        ([{"path": "a.jsonl", "weight": 0}], "data.sft.sources.0.weight = 0: must be greater than 0"),
        ([{"path": "a.jsonl", "epochs": -1}], "data.sft.sources.0.epochs = -1: must be greater than 0"),
        ([{"path": "a.jsonl", "weigth": 1}], "data.sft.sources.0.weigth: unknown key. Did you mean 'weight'?"),
        ([{"path": "a.jsonl", "max_length": 9}], "max_length is the same for all sources. Fix: write it beside them"),
        ({"sources": [{"path": "a.jsonl"}], "columns": {}}, "columns belongs to a source"),
        ({"sources": [{"path": "a.jsonl"}], "stopping": "all_exhausted"}, "changes nothing without weights"),
        ([{"path": "a.jsonl", "kind": "prompt"}], "a is of kind prompt, which gives no rows of kind sft"),
        ([{"path": "t0.3.jsonl"}], "data.sft.sources.0.name = 't0.3': metrics of a temperature are called so"),
        ([{"weight": 1}], "data.sft.sources.0.path: missing."),
        (["a.jsonl"], "data.sft.sources.0 = 'a.jsonl': must be keys with values"),
        ([], "data.sft.sources = []"),
        ("a.jsonl", "data.sft = 'a.jsonl': must be keys with values"),
    ],
)
def test_what_is_wrong_is_named(sft: Any, words: str) -> None:
    with pytest.raises(StageError) as refused:
        config(sft=sft)
    assert words in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_an_evaluation_has_no_weights() -> None:
    with pytest.raises(StageError, match=r"all prompts are asked once\. Fix: leave them out"):
        config(evaluation=[{"path": "a.jsonl", "weight": 1}])


def test_names() -> None:
    paths = {
        "x/chat.v2.jsonl.gz": "chat.v2",
        "s3://bucket/rows.parquet": "rows",
        "hub:owner/ultra": "ultra",
        "demo:sft": "demo-sft",
        "my rows (1).csv": "my_rows__1_",
        "_.jsonl": "source",
        "ü.jsonl": "source",
    }
    assert {path: default_name(path) for path in paths} == paths
    for path in paths:
        assert config(sft=[{"path": path}]).data.sft


# --- kinds ---


@pytest.mark.parametrize(
    ("kinds", "kind", "gives"),
    [
        (["preference", "ranking"], "preference", {"preference", "ranking", "feedback", "sft", "prompt"}),
        (["preference", "sft"], "sft", {"sft", "prompt"}),
        (["feedback", "ranking"], "feedback", {"feedback", "sft", "prompt"}),
        (["ranking", "prompt"], "prompt", {"prompt"}),
    ],
)
def test_a_mixture_gives_what_each_source_gives(kinds: list[str], kind: str, gives: set[str]) -> None:
    made = mixture(*({"kind": one} for one in kinds))
    assert (made.kind, made.gives) == (kind, gives)


# --- how many rows ---


@pytest.mark.parametrize(
    ("weights", "rows", "stopping", "drawn"),
    [
        # The README's: shares of 3/5, 1/5, 1/5. Reaches: 540 / .6 = 900, 180 / .2 = 900, 270 / .2 = 1350.
        ((3, 1, 1), (540, 180, 270), "first_exhausted", (540, 180, 180)),
        ((3, 1, 1), (540, 180, 270), "all_exhausted", (810, 270, 270)),
        # 0.7 and 0.3 are no floats: 70 / 0.7 is less than 100 there.
        ((0.7, 0.3), (70, 30), "first_exhausted", (70, 30)),
        # Only the ratio counts. b reaches 10 * 3 = 30.
        ((20, 10), (100, 10), "first_exhausted", (20, 10)),
        ((2, 1), (100, 10), "all_exhausted", (100, 50)),
        # Thirds of floor(3 * 10 / 1) = 30; then of 4, 4, 3 rows: 9 in all.
        ((1, 1, 1), (10, 10, 11), "first_exhausted", (10, 10, 10)),
        # T = floor(5 / (1/3)) = 15 with 2:1 of 11 and 5: 11 / (2/3) = 16.5.
        ((2, 1), (11, 5), "first_exhausted", (10, 5)),
        # T = floor(7 / .6) = 11: 2.2, 2.2 and 6.6, of which the last is nearest to a row more.
        ((1, 1, 3), (100, 100, 7), "first_exhausted", (2, 2, 7)),
        # T = floor(min(641 * 4 / 3, 488 * 4)) = floor(854.67) = 854: 640.5 and 213.5, of which the first gets the row.
        ((3, 1), (641, 488), "first_exhausted", (641, 213)),
        # T = ceil(10 / (2/3)) = 15; of two thirds 10, of one third 5.
        ((2, 1), (10, 4), "all_exhausted", (10, 5)),
    ],
)
def test_weights(weights: tuple[float, ...], rows: tuple[int, ...], stopping: str, drawn: tuple[int, ...]) -> None:
    made = mixture(*({"weight": weight} for weight in weights), stopping=stopping)
    available = dict(zip("abc", rows, strict=False))
    assert tuple(made.drawn(available).values()) == drawn
    enough = [n >= have for n, have in zip(drawn, rows, strict=True)]
    assert any(enough) if stopping == "first_exhausted" else all(enough)
    assert made.draws


def test_weights_of_sources_without_rows_count_for_nothing() -> None:
    """A source may give no rows of a kind that is derived: the others keep their ratio."""
    made = mixture({"weight": 1}, {"weight": 2}, {"weight": 1})
    assert made.drawn({"a": 10, "b": 0, "c": 10}) == {"a": 10, "c": 10} and made.drawn({}) == {}


def test_epochs() -> None:
    """Without regard to each other: 2.5 of 5 rows are 12.5, half of them 2.5; halves are rounded up."""
    made = mixture({"epochs": 2.5}, {"epochs": 0.5}, {})
    assert made.drawn({"a": 5, "b": 5, "c": 3}) == {"a": 13, "b": 3, "c": 3}
    assert made.draws and not mixture({"epochs": 2}, {}).draws
    assert mixture({"epochs": 0.1}).drawn({"a": 30}) == {"a": 3}


def test_one_source_stands_under_the_settings_of_the_whole() -> None:
    params = MixtureParams.model_validate(
        {
            "sources": [{"path": "a.jsonl", "kind": "sft", "limit": 7}, {"path": "b.jsonl", "kind": "sft"}],
            "max_length": 99,
            "others_eval_fraction": 0.4,
        }
    )
    alone = params.of(params.sources[0])
    assert (alone.path, alone.limit, alone.max_length, alone.others_eval_fraction) == ("a.jsonl", 7, 99, 0.4)
    assert params.of(params.sources[1]).limit is None
