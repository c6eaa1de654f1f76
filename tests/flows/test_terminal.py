"""What the command line prints, and where: help, completion, results as text and as JSON, and the view of a run."""

import json
import os
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner, Result

from flows import cli
from flows.planning import config_file
from schemas.config import PipelineConfig


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command that runs in this process leaves its umask and environment as they were."""
    umask, environment = os.umask(0o022), dict(os.environ)
    yield
    os.umask(umask)
    os.environ.clear()
    os.environ.update(environment)


def alignflow(*words: object, **settings: Any) -> Result:
    """A command of the user's, in this process."""
    environment = {"COLUMNS": "80", "TERM": "xterm", **settings}
    return CliRunner().invoke(cli.app, [str(word) for word in words], env=environment, prog_name="alignflow")


# --- help ---


def test_the_help_names_groups_and_hides_what_processes_use() -> None:
    text = alignflow("-h").stdout
    assert text == alignflow("--help").stdout
    groups = re.findall(r"^╭─ (.*?) ─", text, re.M)
    assert groups == ["Options", "Train", "Data and configs", "Look", "Serve"]
    listed = re.findall(r"^│ (\w+) ", text, re.M)
    assert {"run", "validate", "compare", "up"} <= set(listed) and "stage" not in listed


def test_the_help_of_a_command_names_values_in_capitals() -> None:
    text = alignflow("run", "-h").stdout
    assert "Usage: alignflow run [OPTIONS] PRESET_OR_FILE" in text
    assert re.search(r"--seeds +TEXT ", text) and re.search(r"--dry-run +Show the plan", text)
    assert not re.search("<[a-z]", text) and not re.search("<[a-z]", alignflow("up", "-h").stdout)
    assert "[MODEL]\n" in re.sub(" +\n", "\n", alignflow("rollback", "-h").stdout)


def test_the_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    assert alignflow("--version").stdout == f"alignflow {version('alignflow')}\n"


@pytest.mark.parametrize(
    ("line", "words"), [("alignflow comp", ["compare"]), ("alignflow run de", ["demo"]), ("alignflow run my", [])]
)
def test_a_shell_completes_commands_and_presets(line: str, words: list[str]) -> None:
    """Where nothing is offered the shell completes files."""
    asked = {"_ALIGNFLOW_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    assert alignflow(**asked).stdout.split() == words


# --- the schema of configs ---


def faults(raw: dict[str, Any]) -> list[str]:
    """Where an editor would underline a config."""
    checker = jsonschema.Draft202012Validator(json.loads(alignflow("schema").stdout))
    return [error.json_path for error in checker.iter_errors(raw)]


def test_the_schema_takes_what_the_pipeline_takes_and_finds_mistakes() -> None:
    raw = {"name": "trial", "model": {"path": "/m"}, "data": {"sft": {"path": "x", "kind": "sft"}}}
    assert faults({**raw, "align": {"dpo": None}, "evaluate": {"judge": "rule"}}) == []  # both are short for mappings
    assert faults({**raw, "align": {}, "evalute": {}}) == ["$"]
    assert faults({**raw, "align": {}, "sft": {"epochs": "two"}}) == ["$.sft"]
    PipelineConfig.model_validate({**raw, "align": {"dpo": None}, "evaluate": {"judge": "rule"}})


def test_presets_name_the_schema_and_fit_it() -> None:
    for name, file in config_file.presets().items():
        assert file.read_text().startswith("# yaml-language-server: $schema=alignflow.schema.json\n"), name
        assert faults(config_file.read(file)) == []
        assert not config_file.headline(file).startswith("yaml-language-server")
    assert json.loads(alignflow("presets", "--json").stdout)["demo"].startswith("The whole pipeline in under three")
    assert json.loads(alignflow("presets", "demo", "--json").stdout)["name"] == "demo"
