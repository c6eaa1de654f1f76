"""`alignflow init`: the config that it writes fits the data and the model, and runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from flows.cli import init
from flows.planning import config_file
from schemas.errors import StageError
from tests.support.models import model_folder


def rows(n: int, **columns: str) -> list[dict[str, str]]:
    return [{"prompt": f"red blue {i}", **{name: f"{text} {i}" for name, text in columns.items()}} for i in range(n)]


def written(folder: Path, data: list[dict[str, Any]], model: Path | None = None, **options: Any) -> Any:
    """The config that is written for rows, and for a model that is not on this machine unless one is given."""
    file, out = folder / "rows.jsonl", folder / "own.yaml"
    file.write_text("".join(json.dumps(row) + "\n" for row in data))
    revision = "0" * 40 if model is None else None
    init.init(file, str(model or "someone/model"), out, **{"judge": "rule", "revision": revision, **options})
    return config_file.load(str(out)).config


def test_pairs_lead_to_all_methods_and_hold_out_enough(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of 300 prompts two fifths, 120, where a tenth would be 30."""
    config = written(tmp_path, rows(300, chosen="yes", rejected="no"), model_folder(tmp_path / "model"))
    assert config.name == "own" and list(config.align) == ["dpo", "kto", "ppo"]
    assert (config.data.preference.kind, config.data.preference.eval_fraction) == ("preference", 0.4)
    assert config.data.preference.max_length == config.sft.max_length == config.align["ppo"].max_length == 64
    assert (config.sft.epochs, config.sft.batch_size, config.sft.learning_rate) == (3, 8, 5e-4)
    assert config.evaluate.judge.judge == "rule" and config.sft.lora is None
    said = capfd.readouterr().out
    assert "300 of 300 rows of kind preference will be used" in said
    assert f"next      alignflow run {tmp_path / 'own.yaml'} --dry-run" in said
    text = (tmp_path / "own.yaml").read_text()
    assert "eval_fraction: 0.4   # 120 of 300 prompts, to evaluate on" in text


def test_what_the_rows_are_is_told_by_their_columns(tmp_path: Path) -> None:
    for name, columns, align in (
        ("sft", {"response": "yes"}, []),
        ("preference", {"chosen": "yes", "rejected": "no"}, 3),
    ):
        folder = tmp_path / name
        folder.mkdir()
        config = written(folder, rows(150, **columns))
        assert getattr(config.data, name).kind == name
        assert len(config.align) == (align or 0) and config.sft.lora is not None
    assert config.data.preference.eval_fraction == 0.5  # 150 prompts: 120 are more than half
    assert "75 of 150 prompts, to evaluate on; fewer than 100" in (folder / "own.yaml").read_text()
    thumbs = tmp_path / "thumbs"
    thumbs.mkdir()
    config = written(thumbs, [{**row, "label": i % 2 == 0} for i, row in enumerate(rows(150, response="yes"))])
    assert config.sft is None and config.reward is None and list(config.align) == ["kto"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_as_spreadsheets_write_it_is_told_by_its_columns_too(tmp_path: Path, encoding: str) -> None:
    """A mark before its first row, and an empty line."""
    text = "\r\n" + "".join(json.dumps(row) + "\r\n" for row in rows(150, chosen="yes", rejected="no"))
    (tmp_path / "rows.jsonl").write_text(text, encoding=encoding)
    init.init(tmp_path / "rows.jsonl", "someone/model", tmp_path / "own.yaml", judge="rule", revision="0" * 40)
    found = config_file.load(str(tmp_path / "own.yaml")).config.data.preference
    assert found is not None and found.kind == "preference"


def test_what_cannot_be_told_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StageError, match=r"--kind = missing: the columns \(prompt, what\) tell no kind"):
        written(tmp_path, rows(3, what="x"))
    (tmp_path / "notes.jsonl").write_text("not a row\n")
    with pytest.raises(StageError, match=r"DATA = .*notes\.jsonl: its first line is not a row"):
        init.init(tmp_path / "notes.jsonl", "someone/model", tmp_path / "own.yaml", judge="rule")
    with pytest.raises(StageError, match="--judge = missing: it decides which model is called best"):
        written(tmp_path, rows(150, response="yes"), judge=None)
    with pytest.raises(StageError, match=r"model\.path = .*nowhere"):  # before anybody is asked
        written(tmp_path, rows(150, response="yes"), tmp_path / "nowhere", judge=None)
    with pytest.raises(
        StageError, match=r"3 of 3 rows .* are bad.*response: empty \(3\).*`alignflow validate .* keeps every bad row"
    ):
        written(tmp_path, [{"prompt": "p", "response": ""}] * 3)
    assert not (tmp_path / "own.yaml").exists()
    (tmp_path / "own.yaml").write_text("mine")
    with pytest.raises(StageError, match="already exists"):
        written(tmp_path, rows(150, response="yes"))
    assert (tmp_path / "own.yaml").read_text() == "mine"
