"""What the command line prints, and where: help, completion, results as text and as JSON, and the view of a run."""

import contextlib
import json
import logging
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from rich.style import Style
from typer.testing import CliRunner, Result

from flows import cli, pipeline
from flows.cli import options
from flows.planning import config_file
from flows.planning.nodes import until
from flows.results.summary import Compared, Summary, readable_seconds
from flows.servers import local_prefect
from schemas.config import PipelineConfig
from schemas.errors import EXIT_CODES, StageError
from schemas.stage import Result as Done


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


# --- what a run says at its end ---

FINDINGS = ["Head to head: dpo beats kto 58 % [54, 61].", "Clearly better than SFT: all aligned models."]


@pytest.fixture
def compared(tmp_path: Path) -> Compared:
    """A comparison as stage `compare` leaves it, with tables for two widths."""
    wide = "Model  Judge  Length  Distinct-2\ndpo    2.44  15.5  0.13"
    numbers = {"findings": [*FINDINGS, "Intervals."], "covers": "Intervals.", "best": ["dpo"], "sources": ""}
    numbers |= {"notes": ["SFT without alignment: 1.05."], "tables": {"80": "Model  Judge\ndpo    2.44", "120": wide}}
    (tmp_path / "comparison.json").write_text(json.dumps(numbers))
    (tmp_path / "table.json").write_text(json.dumps([{"model": "dpo"}]))
    (tmp_path / "table.txt").write_text("the old text\n")
    return Compared(tmp_path)


def summary(compared: Compared, **more: Any) -> Summary:
    results = {"sft": Done(status="done", key="a"), "dpo": Done(status="done", key="b", reused=True)}
    links = {"metrics": "http://127.0.0.1:5000/#/m", "answers": "http://127.0.0.1:5000/#/a"}
    given = {"links": links, "first": "  (start `alignflow ui`)", **more}
    return Summary("8634f932-aaa5", "demo", results, 326.0, compared, **given)


def test_the_finding_comes_first_and_the_table_fits(compared: Compared) -> None:
    narrow, wide = compared.text(80).plain, compared.text(150).plain
    assert narrow.startswith(f"{FINDINGS[0]}\n\nModel  Judge\ndpo    2.44\n{FINDINGS[1]}\nSFT without")
    assert "Distinct-2" in wide and "Distinct-2" not in compared.text(119).plain
    assert compared.text(30).plain.startswith("Head to head: dpo beats kto\n58 %")


def test_of_an_older_comparison_the_text_is_shown_as_it_is(compared: Compared) -> None:
    numbers = json.loads((compared.folder / "comparison.json").read_text())
    (compared.folder / "comparison.json").write_text(json.dumps({"findings": numbers["findings"], "covers": ""}))
    assert compared.text(80).plain == "the old text" and compared.best() == []


def test_addresses_are_behind_words_on_a_terminal_and_whole_in_a_pipe(compared: Compared) -> None:
    shown, piped = summary(compared).text(80, terminal=True), summary(compared).text(80, terminal=False).plain
    assert (
        "http" not in shown.plain and "MLflow  metrics and answers side by side  (start `alignflow ui`)" in shown.plain
    )
    assert "http://127.0.0.1:5000/#/m" in {span.style.link for span in shown.spans if isinstance(span.style, Style)}
    assert "metrics side by side in MLflow: http://127.0.0.1:5000/#/m  (start `alignflow ui`)\n" in piped
    assert f"report  {compared.report}" in piped and "report  alignflow report" in shown.plain
    for text in (shown.plain, piped):
        assert "run     8634f932  demo: 2 stages, 1 reused, 5 min 26 s\n" in text
        assert "next    alignflow chat dpo --versus sft" in text


def test_the_first_of_several_seeds_is_no_model_to_chat_with(compared: Compared) -> None:
    numbers = json.loads((compared.folder / "comparison.json").read_text()) | {"best": ["dpo 0.1"]}
    (compared.folder / "comparison.json").write_text(json.dumps(numbers))
    assert "next" not in summary(compared).text(80, terminal=False).plain


def test_a_program_gets_everything(compared: Compared) -> None:
    made = json.loads(json.dumps(summary(compared).as_json()))
    assert made["run"] == "8634f932-aaa5" and made["stages"]["dpo"]["reused"] is True
    assert made["comparison"]["best"] == ["dpo"] and made["comparison"]["table"] == [{"model": "dpo"}]


def test_json_is_what_every_reader_takes(capsys: pytest.CaptureFixture[str]) -> None:
    options.show_json({"loss": math.nan, "rate": [math.inf, 0.5], "path": Path("/x"), "text": "é\n\udc80"})
    told = capsys.readouterr().out
    assert json.loads(told, parse_constant=pytest.fail) == {
        "loss": None,
        "rate": [None, 0.5],
        "path": "/x",
        "text": "é\n\udc80",
    }


@pytest.mark.parametrize(
    ("seconds", "text"), [(59.4, "59 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"), (7500, "2 h 5 min")]
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert readable_seconds(seconds) == text


# --- Ctrl-C ---


@pytest.mark.parametrize(
    ("stopped", "message"),
    [
        (
            ["ppo stopped after step 8 of 94, saved"],
            "ppo stopped after step 8 of 94, saved; run the same command to resume",
        ),
        (["dpo stopped", "kto stopped"], "dpo stopped; kto stopped; run the same command to resume"),
        ([], "the run was stopped; run the same command to resume"),
    ],
)
def test_ctrl_c_says_where_it_stopped_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, stopped: list[str], message: str
) -> None:
    def call() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.checks, "check_tracking", lambda: None)
    monkeypatch.setattr(pipeline.tracking, "setup", lambda: None)
    monkeypatch.setattr(pipeline.supervisor, "interrupt_on_sigterm", lambda: None)
    monkeypatch.setattr(pipeline, "local_prefect", contextlib.nullcontext)
    monkeypatch.setattr(pipeline.process, "_stopped", stopped)
    with pytest.raises(StageError) as error:
        pipeline.run_locally(call)
    assert str(error.value) == message and EXIT_CODES[error.value.status] == 75


@pytest.mark.parametrize(
    ("message", "kept"),
    [
        ("Crash detected! Execution was aborted by Python interpreter.", False),
        ("Finished in state Completed('16 stages done')", False),
        ("Task run failed with state Failed", False),
        ("dpo: done after 5 s", True),
    ],
)
def test_what_prefect_repeats_is_not_shown(message: str, kept: bool) -> None:
    record = logging.LogRecord("prefect.flow_runs", logging.INFO, "", 0, message, (), None)
    assert local_prefect.not_repeated(record) == kept


# --- a run up to a stage ---


def test_until_takes_a_stage_and_what_it_needs() -> None:
    planned = config_file.load("demo")
    assert list(until(planned, "sft").nodes) == ["base", "data sft", "sft"]
    assert (
        set(until(planned, "eval sft").nodes) >= {"sft", "eval sft"} and "dpo" not in until(planned, "eval sft").nodes
    )
    assert {"dpo", "kto", "ppo"} <= set(until(planned, "align").nodes) and "eval dpo" not in until(
        planned, "align"
    ).nodes
    assert set(until(planned, "compare").nodes) == set(planned.nodes)
    with pytest.raises(StageError, match=r"--until = stf: the run has no such stage\. Fix: name one of base, validate"):
        until(planned, "stf")


def test_without_runs_the_list_says_how_to_start_one(home: Path) -> None:
    assert alignflow("runs").stdout == "No run yet. Start one with: alignflow run demo\n"
    assert json.loads(alignflow("runs", "--json").stdout) == []
