"""Stage `generate`: K answers per prompt, labelled by a judge, with noise, or left to people; `validate` reads them."""

import gzip
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from schemas.commands import GenerateCommand
from schemas.config import BaseParams, GenerateConfig, Scratch
from schemas.config.data import ValidateParams
from schemas.errors import StageError
from stages import generate
from stages.base import build
from stages.commands import generate as generate_command
from stages.commands.generate import main
from stages.engine import demo
from stages.engine.data.codec import Codec
from stages.engine.models.loading import load_scorer
from stages.engine.models.saving import save_scorer
from stages.engine.scoring.judges import RewardJudge
from stages.generate import Generated, label, win_probability
from stages.validate import check
from stages.validate.context import Context
from tests.support import models
from tests.support.context import MemoryContext
from tests.support.models import given

PROMPTS = [f"write a polite note to the {person} about the bread." for person in ("baker", "cook", "nurse", "uncle")]
Rows = list[dict[str, Any]]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate") / "model"
    small = Scratch(hidden_size=16, layers=2, heads=2, intermediate_size=32, max_length=64)
    build(BaseParams(scratch=small), 0, folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [models.row(i, prompt) for i, prompt in enumerate(PROMPTS)]
    return models.data_folder(tmp_path / "data", prompt=rows[:3], eval_prompt=rows[3:])


@pytest.fixture
def stage(tmp_path: Path, model: Path, data: Path) -> Callable[..., tuple[Rows, dict[str, float], MemoryContext]]:
    """Runs the stage; gives the rows written, the metrics and the run."""

    def run_stage(
        seed: int = 0, inputs: Mapping[str, Path] | None = None, **changes: Any
    ) -> tuple[Rows, dict, MemoryContext]:
        config = GenerateConfig(**{"max_new_tokens": 8, "answers": 3, **changes})
        folders = {"model": model, "data": data, **(inputs or {})}
        run = MemoryContext(tmp_path / "work", config, folders, stage="generate", seed=seed)
        metrics = generate.run(run)
        return read(run.published["rows"] / "rows.jsonl"), metrics, run

    return run_stage


def read(file: Path) -> Rows:
    return [json.loads(line) for line in file.read_text().splitlines()]


def texts(rows: Rows) -> list[list[str]]:
    return [row["responses"] for row in rows]


def test_every_prompt_gets_k_answers_with_the_judges_scores(stage: Callable[..., Any]) -> None:
    rows, metrics, run = stage()
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": p}] for p in PROMPTS]
    for row in rows:
        assert set(row) == {"prompt", "responses", "scores"}
        assert row["scores"] == [demo.reward(row["prompt"][0]["content"], text) for text in row["responses"]]
        assert len(row["responses"]) == 3
    assert metrics["generate/prompts"] == 4 and metrics["generate/answers"] == 12
    assert metrics["compute/generated_tokens"] <= 12 * 8
    scores = [score for row in rows for score in row["scores"]]
    assert metrics["generate/score"] == pytest.approx(sum(scores) / 12)
    assert run.tables["samples.json"]["prompt"] == PROMPTS
    assert set(run.tables["samples.json"]) == {"prompt", "answer 1", "answer 2", "answer 3"}


def test_answers_are_functions_of_seed_prompt_and_number(stage: Callable[..., Any]) -> None:
    rows = texts(stage()[0])
    assert rows == texts(stage()[0])
    assert rows != texts(stage(seed=1)[0])
    assert [row[:3] for row in texts(stage(answers=5)[0])] == rows, "more answers leave the first ones as they are"
    limited = texts(stage(limit=1)[0])
    assert limited == [rows[0], rows[3]], "the limit counts prompts to train on; the held-out ones all stay"


def test_noise_is_bradley_terry() -> None:
    scores = [0.0, 1.0, 3.0]
    prompt = [{"role": "user", "content": "x"}]
    wins: Counter[tuple[int, int]] = Counter()
    n = 4000
    for seed in range(n):
        row = label(Generated(prompt, ["a", "b", "c"], scores), 0.8, seed)
        assert set(row) == {"prompt", "responses", "comparisons"}
        assert [(c["a"], c["b"]) for c in row["comparisons"]] == [(0, 1), (0, 2), (1, 2)]
        wins.update((c["a"], c["b"]) for c in row["comparisons"] if c["winner"] == c["a"])
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        p = 1 / (1 + math.exp(-(scores[i] - scores[j]) / 0.8))
        assert wins[i, j] / n == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))


def test_noise_is_seeded_and_has_limits() -> None:
    item = Generated([{"role": "user", "content": "x"}], ["a", "b", "b", "c"], [0.0, 5.0, 5.0, 9.0])
    assert label(item, 0.5, 3) == label(item, 0.5, 3)
    pairs = [(c["a"], c["b"]) for c in label(item, 0.5, 3)["comparisons"]]
    assert (1, 2) not in pairs and len(pairs) == 5, "equal answers are not compared"
    assert all(c["winner"] == c["b"] for c in label(item, 1e-3, 3)["comparisons"])
    assert win_probability(0.0, 1e6, 1e-3) == 0.0 and win_probability(1e6, 0.0, 1e-3) == 1.0
    assert label(Generated(item.prompt, ["a", "a"], [1.0, 1.0]), 0.5, 0)["scores"] == [0.0, 0.0]


@pytest.fixture(scope="session")
def judge(model: Path) -> Path:
    """A reward model's folder; unlike the demo's rule it tells a random model's answers apart."""
    folder = model.parent / "judge"
    save_scorer(load_scorer(model, seed=5), Codec.load(model), folder)
    return folder


def test_a_reward_model_may_judge(stage: Callable[..., Any], judge: Path) -> None:
    rows, _, _ = stage(judge="reward", inputs={"judge": judge})
    for row in rows:
        expected = RewardJudge(judge).score([row["prompt"]] * 3, row["responses"])
        assert row["scores"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("noise", [0.0, 0.7])
def test_validate_reads_what_was_written(stage: Callable[..., Any], judge: Path, tmp_path: Path, noise: float) -> None:
    rows, _, run = stage(judge="reward", inputs={"judge": judge}, noise=noise, answers=4)
    params = ValidateParams(path="input:rows", kind="ranking", eval_fraction=0.0, max_bad=1.0)
    report = check(Context(params, rows=run.published["rows"]), tmp_path / "read")
    assert report.rows == 4 and report.quarantined == 0
    ranked = given(tmp_path / "read", "train", "ranking").to_dicts()
    by_prompt = {row["prompt"][0]["content"]: row for row in rows}
    for row in ranked:
        source = by_prompt[row["prompt"][0]["content"]]
        place = {text.strip(): i for i, text in reversed(list(enumerate(source["responses"])))}
        texts = [text.strip() for text in row["responses"]]
        pairs = [
            (place[texts[win]], place[texts[lose]]) for win, lose in zip(row["winners"], row["losers"], strict=True)
        ]
        if noise == 0:
            assert len(pairs) == 6 and all(source["scores"][win] > source["scores"][lose] for win, lose in pairs)
        else:
            told = [(c["winner"], c["a"] + c["b"] - c["winner"]) for c in source["comparisons"]]
            assert sorted(pairs) == sorted(told)


def test_people_rank_the_answers_and_the_file_comes_back(stage: Callable[..., Any], tmp_path: Path) -> None:
    rows, metrics, run = stage(judge=None)
    assert all(row["order"] == [] and "scores" not in row for row in rows)
    assert "generate/score" not in metrics
    assert "Fill in `order`" in (run.published["rows"] / "README.txt").read_text()
    rows[0]["order"], rows[1]["order"], rows[2]["order"] = [2, 0, 1], [0, [1, 2]], [1, 2, 0]
    file = tmp_path / "ranked.jsonl"
    generate.write(rows, file)
    params = ValidateParams(path=str(file), kind="ranking", eval_fraction=0.0, max_bad=0.5)
    report = check(Context(params), tmp_path / "read")
    assert (report.kept, report.quarantined) == (4, 0)
    assert report.notes == {"not_ranked": 1}, "rows that nobody has ranked yet are kept and counted"
    ranked = given(tmp_path / "read", "train", "ranking").sort("row").to_dicts()
    pairs = [sorted(zip(row["winners"], row["losers"], strict=True)) for row in ranked]
    assert pairs == [[(0, 1), (2, 0), (2, 1)], [(0, 1), (0, 2)], [(1, 0), (1, 2), (2, 0)]]
    assert given(tmp_path / "read", "train", "preference").height == 8


def test_equal_prompts_are_answered_once(model: Path, tmp_path: Path) -> None:
    data = models.data_folder(tmp_path / "d", prompt=[models.row(i, PROMPTS[i % 2]) for i in range(4)])
    assert [p[0]["content"] for p in generate.read_prompts(data, None)] == PROMPTS[:2]


def test_prompts_without_room_are_left_out_or_refused(model: Path, tmp_path: Path) -> None:
    long = models.row(1, " ".join(PROMPTS * 3))
    config = GenerateConfig(answers=2, max_new_tokens=8)
    for rows, message in (([models.row(0, PROMPTS[0]), long], None), ([long], "none leaves room")):
        data = models.data_folder(tmp_path / f"d{len(rows)}", prompt=rows)
        run = MemoryContext(tmp_path / f"w{len(rows)}", config, {"model": model, "data": data}, stage="generate")
        if message is None:
            assert generate.run(run)["generate/prompts"] == 1
        else:
            with pytest.raises(StageError, match=message):
                generate.run(run)


# --- alone, on the command line ---


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl.gz"
    lines = [
        {"prompt": PROMPTS[0]},
        {"prompt": [{"role": "user", "content": PROMPTS[1]}]},
        {"turns": [PROMPTS[2], "?"]},
    ]
    file.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    return file


def test_alone_writes_a_file_for_people(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "answers.jsonl"
    command = GenerateCommand(model=model, prompts=str(prompts), answers=2, max_new_tokens=6, out=out)
    assert main(command) == 0
    rows = read(out)
    assert [row["prompt"][-1]["content"] for row in rows] == PROMPTS[:3]
    assert all(len(row["responses"]) == 2 and row["order"] == [] for row in rows)
    assert "answers.jsonl holds one prompt per line" in (out.parent / "answers.README.txt").read_text()
    told = capsys.readouterr()
    assert told.out == f"6 answers to 3 prompts in {out}\nnext      alignflow rank {out}\n"
    assert told.err.endswith("answers 6/6\n") and "\r" not in told.err, "no terminal: whole lines"

    rows[0]["order"] = [1, 0]
    generate.write(rows, out)
    assert main(command) == 65
    assert "already exists" in capsys.readouterr().err
    assert read(out)[0]["order"] == [1, 0], "people's work is not overwritten"

    scored = tmp_path / "scored.jsonl"
    assert main(command.model_copy(update={"out": scored, "judge": "rule", "limit": 1})) == 0
    assert capsys.readouterr().out == f"2 answers to 1 prompts in {scored}, scored by rule\n"
    assert len(read(scored)) == 1 and "scores" in read(scored)[0]
    listed = command.model_copy(update={"out": tmp_path / "listed.jsonl", "as_json": True})
    assert main(listed) == 0
    told_all = json.loads(capsys.readouterr().out)
    assert (told_all["out"], told_all["prompts"], told_all["answers"]) == (str(listed.out), 3, 6)


def test_what_stands_beside_a_prompt_travels_with_it(model: Path, tmp_path: Path) -> None:
    """Ids of any type, nested columns and half an emoji; a column called as one of ours gets another name, and the
    ranked file is read as it was without them. Of a prompt given twice the first row's columns stay."""
    file, out = tmp_path / "p.jsonl", tmp_path / "to_rank.jsonl"
    lines = [
        {"id": 7, "prompt": PROMPTS[0], "scores": [5], "meta": {"by": ["x"]}},
        {"messages": [{"role": "user", "content": PROMPTS[1]}], "id": "q-8", "cut": "\ud83d"},
        {"id": 9, "prompt": PROMPTS[0]},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(GenerateCommand(model=model, prompts=str(file), answers=2, max_new_tokens=6, out=out)) == 0
    rows = read(out)
    beside = [{k: v for k, v in row.items() if k not in ("prompt", "responses", "order")} for row in rows]
    assert beside == [{"id": 7, "prompt_scores": [5], "meta": {"by": ["x"]}}, {"id": "q-8", "cut": "\ud83d"}]
    generate.write([{**row, "responses": ["a", "b"], "order": [1, 0]} for row in rows], out)
    params = ValidateParams(path=str(out), kind="ranking", eval_fraction=0)
    assert check(Context(params), tmp_path / "out").kept == 2


def test_what_stands_around_a_prompt_is_asked_too(tmp_path: Path) -> None:
    """The same conversation as `validate` reads, so that the ranked answers are answers to it."""
    file = tmp_path / "p.jsonl"
    lines = [
        {"prompt": PROMPTS[0], "system": "Be kind.", "history": [["Hi", "Hello."]], "id": 1},
        {"instruction": "Double it.", "input": "4", "id": 2},
        {"prompt": PROMPTS[1], "input": "of nothing that is asked", "id": 3},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = generate_command.prompts_of(str(file), None)
    check(Context(ValidateParams(path=str(file), kind="prompt", eval_fraction=0)), tmp_path / "out")
    read_by_validate = given(tmp_path / "out", "train", "prompt")["prompt"].to_list()
    assert [prompt for prompt, _ in asked] == read_by_validate
    assert [(message["role"], message["content"]) for message in asked[0].prompt] == [
        ("system", "Be kind."),
        ("user", "Hi"),
        ("assistant", "Hello."),
        ("user", PROMPTS[0]),
    ]
    assert [message["content"] for message in asked[1].prompt] == ["Double it.\n4"]
    assert [beside for _, beside in asked] == [{"id": 1}, {"id": 2}, {"input": "of nothing that is asked", "id": 3}]


def test_columns_of_a_parquet_file_travel_too(model: Path, tmp_path: Path) -> None:
    """What JSON has no form for is written as text."""
    day = date(2026, 1, 2)
    pl.DataFrame({"prompt": PROMPTS[:2], "day": [day, day], "source": ["a", "b"]}).write_parquet(tmp_path / "p.parquet")
    asked = generate_command.prompts_of(str(tmp_path / "p.parquet"), None)
    assert [beside for _, beside in asked] == [{"day": day, "source": "a"}, {"day": day, "source": "b"}]
    names = {"prompts": str(tmp_path / "p.parquet"), "out": tmp_path / "o.jsonl"}
    command = GenerateCommand(model=model, answers=2, max_new_tokens=6, **names)
    assert main(command) == 0
    assert [(row["day"], row["source"]) for row in read(tmp_path / "o.jsonl")] == [
        ("2026-01-02", "a"),
        ("2026-01-02", "b"),
    ]


@pytest.mark.parametrize("change", [{"model": Path("nowhere")}, {"prompts": "nowhere.jsonl"}, {"judge": "nowhere"}])
def test_alone_names_what_is_wrong(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    command = GenerateCommand(model=model, prompts=str(prompts), out=tmp_path / "out.jsonl")
    assert main(command.model_copy(update=change)) == 65
    assert str(*change.values()) in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_a_prompts_file_without_prompts_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": true}\n')
    with pytest.raises(StageError, match="row 1 holds no prompt: prompt: not_text"):
        generate_command.prompts_of(str(file), None)
    assert len(generate_command.prompts_of(str(file), 1)) == 1
    file.write_text("")
    with pytest.raises(StageError):
        generate_command.prompts_of(str(file), None)
