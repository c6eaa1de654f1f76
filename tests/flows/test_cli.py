"""The command line as a user meets it: help, messages, exit codes; and a README whose commands and code are real."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer

from flows import cli
from schemas.commands import ValidateCommand
from schemas.errors import EXIT_CODES
from schemas.stage import STAGES, Request
from stages.commands import validate as checked
from tests.conftest import PAPERS, ROOT
from tests.support.commands import alignflow
from tests.support.pictures import PICTURES

PAIRS = [{"prompt": f"Question {i}?", "chosen": f"Yes, {i}.", "rejected": f"No {i}."} for i in range(20)]


def write_rows(file: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def commands() -> dict[str, Any]:
    """Name -> typer's command."""
    group: Any = typer.main.get_command(cli.app)
    return dict(group.commands)


def test_the_commands_are_there() -> None:
    assert set(commands()) >= {"run", "validate", "generate", "stage", "compare", "export", "chat", "ui", "presets"}


@pytest.mark.parametrize("name", sorted(commands()))
def test_help_names_examples_that_parse(name: str) -> None:
    text = commands()[name].help or ""
    examples = re.findall(r"^- (alignflow .*)$", text, re.M)
    assert examples
    for example in examples:
        parses(example)


def parses(line: str) -> None:
    """Raise when typer would refuse the command line."""
    words = shlex.split(line.partition(" > ")[0], comments=True)
    assert words[0] == "alignflow"
    command = commands()[words[1]]
    with command.make_context(words[1], words[2:]):
        pass


def test_help_is_quick_and_says_where_to_start() -> None:
    answer = alignflow("--help")
    assert answer.returncode == 0
    assert "alignflow run demo" in answer.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "demoo"], "Did you mean 'demo'?"),
        (["run", "demo", "--set", "align.dpo.betta=1"], "align.dpo.betta: unknown key. Did you mean 'beta'?"),
        (["run", "tinystories"], "model.path = ./YOUR_MODEL: no such folder"),
        (["export", "dpo", "--out", "new"], "MODEL = dpo: there is no such model"),
        (["chat", "dpo"], "MODEL = dpo: there is no such model"),
        (["ab", "dpo", "sft"], "there is no finished pipeline run"),
        (
            ["label", "export", "rows.jsonl"],
            "--to = null: export needs it, and takes no --from. Fix: give --to label",
        ),
        (["label", "import", "x.json", "--to", "label-studio"], "--from = null: import needs it, and takes no --to"),
        (["label", "send", "x.json", "--to", "label-studio"], "ACTION = 'send': must be 'export' or 'import'"),
        (["label", "import", "none.json", "--from", "argilla"], "FILE = none.json: the file cannot be read"),
        (
            ["label", "import", "x.json", "--from", "doccano"],
            "--from = 'doccano': must be 'label-studio', 'argilla' or",
        ),
    ],
)
def test_a_users_mistake_is_one_message_and_a_code(ready_home: Path, arguments: list[str], message: str) -> None:
    answer = alignflow(*arguments)
    assert answer.returncode == EXIT_CODES["refused"]
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr
    assert answer.stdout == ""


def test_in_a_new_home_a_mistake_is_one_line(home: Path) -> None:
    """MLflow, which makes its database there, says nothing of it; nor does what a new process imports."""
    command = [sys.executable, "-m", "flows.cli", "compare"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == EXIT_CODES["refused"] and answer.stdout == ""
    (line,) = answer.stderr.splitlines()
    assert line.startswith("alignflow: there is no finished pipeline run. Fix: ")


@pytest.mark.parametrize(
    ("command", "place"),
    [(["compare"], "file"), (["compare"], "file/home"), (["run", "demo", "--dry-run"], "file"), (["up"], "file/home")],
)
def test_a_home_that_cannot_be_is_named(tmp_path: Path, command: list[str], place: str) -> None:
    (tmp_path / "file").write_text("")
    answer = alignflow(*command, ALIGNFLOW_HOME=str(tmp_path / place))
    assert answer.returncode == EXIT_CODES["refused"]
    assert f"ALIGNFLOW_HOME = {tmp_path / place}: cannot be used: " in answer.stderr
    assert "Traceback" not in answer.stderr


def test_presets_are_listed_and_printed() -> None:
    listed = alignflow("presets")
    assert {line.split()[0] for line in listed.stdout.splitlines()} >= {"demo", "smollm2"}
    assert alignflow("presets", "demo").stdout == (ROOT / "deploy" / "presets" / "demo.yaml").read_text()


def test_validate_prints_one_json_object(tmp_path: Path) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", [*PAIRS, {"prompt": "Q?", "chosen": "same", "rejected": "same"}])
    answer = alignflow("validate", pairs, "--kind", "preference", "--out", tmp_path / "out", "--json")
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    assert (found["rows"], found["kept"], found["quarantined"]) == (21, 20, 1)
    assert sum(found["reasons"].values()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-bad", "5"], "--max-bad = 5.0: must be less than or equal to 1"),
        (["--eval-fraction", "nan"], "--eval-fraction = nan: must be a number, which NaN is not"),
        (["--gold-fraction", "1"], "--gold-fraction = 1.0: must be less than 1"),
        (["--limit", "0", "--max-length", "1"], "--max-length = 1: must be greater than or equal to 8"),
        (["--limit", "9" * 30], f"--limit = {'9' * 30}: must be less than 9223372036854775808"),
        (["--kind", "prefrence"], "--kind = 'prefrence': must be 'sft', 'preference'"),
        (["--kind", "prefrence"], "Did you mean 'preference'?"),
        (["--columns", "prompt"], "--columns = prompt: this is not a pair of column names. Fix: write OURS=THEIRS"),
        (["--columns", "prompt=a", "--columns", "prompt=b"], "--columns = prompt=b: prompt is given twice."),
        (["--label-map", "up"], "--label-map = up: this is not a value and what it means. Fix: write VALUE=MEANING"),
        (["--label-map", "1=a", "--label-map", "1=b"], "--label-map = 1=b: 1 is given twice."),
        (["--format", "pku-safe"], "--format = 'pku-safe': must be 'alpaca', 'sharegpt'"),
        (["--evaluation", "nowhere"], "--evaluation = nowhere: there are no held-out prompts. Fix: name the folder"),
        (["--model", "nowhere"], "--model = nowhere: there is no such folder. Fix: give its path as seen from"),
        (["--out", "rows.jsonl"], "--out = rows.jsonl: this is not a folder."),
    ],
)
def test_validate_names_the_option_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", list(PAIRS))
    answer = alignflow("validate", "rows.jsonl", "--kind", "preference", "--out", "out", *options)
    assert answer.returncode == EXIT_CODES["refused"]
    assert message in answer.stderr and answer.stdout == ""
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_said_with_what_it_is_for() -> None:
    said = alignflow("validate", "rows.jsonl", "--out", "out").stderr
    assert "Missing option '--kind'. What a row is: sft, preference, ranking, feedback" in said
    assert "Missing argument 'PRESET_OR_FILE'. A preset's name, or a YAML file." in alignflow("run").stderr


@pytest.mark.parametrize(
    ("command", "messages"),
    [
        (
            ["generate", "prompts.jsonl", "--out", "new", "--answers", "1", "--noise", "inf"],
            ["--answers = 1: must be greater than or", "--noise = inf: must be a finite number"],
        ),
        (
            ["chat", "--temperature", "-1", "--max-new-tokens", "0"],
            [
                "--temperature = -1.0: must be greater than or equal to 0",
                "--max-new-tokens = 0: must be greater than or equal to 1",
            ],
        ),
    ],
)
def test_generate_and_chat_name_all_options_that_are_wrong(
    ready_home: Path, tmp_path: Path, command: list[str], messages: list[str]
) -> None:
    """Before a model is loaded: the one that is named here has no weights."""
    (tmp_path / "config.json").write_text("{}")
    answer = alignflow(command[0], tmp_path, *command[1:])
    assert (answer.returncode, answer.stdout) == (EXIT_CODES["refused"], "")
    assert all(message in answer.stderr for message in messages) and "Traceback" not in answer.stderr


def test_validate_passes_refusals_and_options_through(tmp_path: Path) -> None:
    rows = [{"q": f"Question {i}?", "a": f"Answer {i}."} for i in range(20)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    refused = alignflow("validate", file, "--kind", "sft", "--out", tmp_path / "one", "--json")
    assert refused.returncode == EXIT_CODES["refused"]
    assert json.loads(refused.stdout)["kept"] == 0
    mapped = ["--columns", "prompt=q", "--columns", "response=a", "--limit", "10"]
    answer = alignflow("validate", file, "--kind", "sft", "--out", tmp_path / "two", "--json", *mapped)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["kept"] == 10


def test_validate_reads_bounds_of_labels_and_keeps_other_data(tmp_path: Path) -> None:
    """A label may begin with a dash, and a bound holds an equals sign of its own."""
    rows = [{"prompt": f"Question {i}?", "completion": "Answer.", "label": i % 4 - 2} for i in range(20)]
    file, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    mapped = ["--label-map", "-2=down", "--label-map", ">=0=up", "--label-map", "-1=skip"]
    command = ["validate", file, "--kind", "feedback", "--out", out, *mapped]
    told = alignflow(*command)
    assert told.returncode == 0, told.stderr
    assert "20 rows, 15 kept, 5 quarantined" in told.stdout and "next      alignflow run my.yaml" in told.stdout
    write_rows(file, rows[:10])
    refused = alignflow(*command)
    assert refused.returncode == EXIT_CODES["refused"] and "add --force" in refused.stderr
    assert alignflow(*command, "--force").returncode == 0


def test_a_stage_runs_alone_and_its_code_comes_through(ready_home: Path, tmp_path: Path) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", list(PAIRS))
    params = {"path": str(pairs), "kind": "preference", "eval_fraction": 0.3}
    request = tmp_path / "request.json"
    request.write_text(Request(stage="validate", version=STAGES["validate"].version, params=params).model_dump_json())  # type: ignore[arg-type]
    answer = alignflow("stage", "validate", request)
    assert answer.returncode == 0, answer.stderr
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "done"
    gone = Request(stage="validate", version=STAGES["validate"].version, params={**params, "path": "gone"})  # type: ignore[arg-type]
    request.write_text(gone.model_dump_json())
    assert alignflow("stage", "validate", request).returncode == EXIT_CODES["refused"]
    assert alignflow("stage", "validate", tmp_path / "nothing.json").returncode == EXIT_CODES["refused"]


def test_a_dry_run_tells_stages_steps_and_memory_and_makes_nothing(ready_home: Path, tmp_path: Path) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", list(PAIRS))
    config = tmp_path / "config.yaml"
    data = {"preference": {"path": str(pairs), "kind": "preference", "eval_fraction": 0.0}}
    training = {"batch_size": 8, "epochs": 2}
    config.write_text(
        json.dumps(
            {
                "name": "trial",
                "model": {"scratch": {}},
                "data": data,
                "sft": training,
                "align": {
                    "kto": training,
                    "ppo": {"iterations": 5, "ppo_epochs": 2, "rollout_size": 8, "batch_size": 4},
                },
                "evaluate": {"judge": "rule"},
            }
        )
    )
    answer = alignflow("run", config, "--dry-run")
    assert answer.returncode == 0, answer.stderr
    steps = {line.split()[0]: line.split() for line in answer.stdout.splitlines() if line}
    # 20 rows twice in steps of 8; 40 thumbs twice; 5 rounds of 2 passes over 8 answers in steps of 4
    assert (steps["sft"][3], steps["kto"][3], steps["ppo"][2:4]) == ("~5", "~10", ["*", "20"])
    assert steps["sft"][5] in ("MB", "GB")
    assert "at most about 0 prompts will be held out, 100 are asked for" in answer.stdout
    assert "0 reused" in answer.stdout
    assert not (ready_home / "work").exists() and not (ready_home / "artifacts").exists()


def test_a_taken_port_is_refused_by_name(ready_home: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        answer = alignflow("ui", "--mlflow-port", taken.getsockname()[1])
    assert answer.returncode == EXIT_CODES["refused"]
    assert "--mlflow-port" in answer.stderr and "the port is taken" in answer.stderr


# --- The papers ---

TEXT = "\n".join(paper.read_text() for paper in PAPERS)
BLOCKS = re.findall(r"^```(\w+)(?: ([^\n]*))?\n(.*?)^```", TEXT, re.M | re.S)


def test_the_papers_hold_what_is_tested() -> None:
    """A block whose tag is misspelt would be tested by nobody."""
    assert len(PAPERS) == 6 and len((ROOT / "README.md").read_text().splitlines()) <= 170
    kinds = [language for language, _, _ in BLOCKS]
    counts = {language: kinds.count(language) for language in ("bash", "json", "yaml", "diff", "python")}
    assert counts == {"bash": 32, "json": 8, "yaml": 5, "diff": 2, "python": 2}


def shell_lines() -> list[str]:
    """The lines of the README's shell blocks, continued ones joined."""
    texts = [text.replace("\\\n", " ") for language, _, text in BLOCKS if language in ("bash", "sh")]
    return [line.strip() for text in texts for line in text.splitlines() if line.strip()]


def test_every_command_in_the_readme_parses() -> None:
    lines = [line for line in shell_lines() if re.match(r"(\.venv/bin/)?alignflow ", line)]
    assert len(lines) >= 10
    for line in lines:
        parses(line.removeprefix(".venv/bin/"))


def test_every_make_target_in_the_readme_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {word for line in shell_lines() if line.startswith("make ") for word in re.findall(r"^make (\w+)", line)}
    named |= set(re.findall(r"`make ([\w-]+)`", TEXT))
    assert {"demo", "test", "pictures"} <= named <= targets


def test_every_picture_in_the_readme_exists_is_described_and_small() -> None:
    pictures = re.findall(r"^!\[(.*)\]\((.*)\)$", (ROOT / "README.md").read_text(), re.M)
    assert {name for _, name in pictures} == {f"deploy/pictures/{file}" for file in os.listdir(PICTURES)}
    assert len(pictures) == 2 and all(words and (ROOT / name).stat().st_size < 150_000 for words, name in pictures)


def test_every_file_that_the_readme_names_exists() -> None:
    named = re.findall(r"`((?:stages|flows|schemas|deploy|tests)/[\w./]+\.(?:py|yaml))`", TEXT)
    new = {place for _, place, _ in BLOCKS}
    assert named
    assert [name for name in named if name not in new and not (ROOT / name).exists()] == []


def test_every_config_in_the_readme_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.planning import config_file, explain

    texts = [text for language, _, text in BLOCKS if language == "yaml"]
    assert texts
    for text in texts:
        explain.validate(config_file.parse(text))


# The first row of each kind in the README's table of formats, checked by the stage itself.
def test_every_row_in_the_readme_is_a_row(tmp_path: Path) -> None:
    rows = [(place, text) for language, place, text in BLOCKS if language == "json" and place]
    assert {kind for kind, _ in rows} == {"sft", "preference", "ranking", "feedback", "prompt"}
    for number, (kind, text) in enumerate(rows):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(text)
        out = tmp_path / f"out{number}"
        command = ValidateCommand.model_validate({"path": str(file), "kind": kind, "out": out})
        assert checked.main(command) == 0, kind
        assert json.loads((out / "report.json").read_text())["kept"] == len(text.splitlines())


def apply_diff(text: str, diff: str) -> str:
    """Apply hunks, separated by `@@`, that are found by their lines alone."""
    for hunk in re.split(r"^@@.*\n", diff, flags=re.M):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] or "\n" for line in lines if line[0] in " -")
        after = "".join(line[1:] or "\n" for line in lines if line[0] in " +")
        assert text.count(before) == 1, f"the README's diff does not fit any more:\n{hunk}"
        text = text.replace(before, after)
    return text


@pytest.fixture
def extended(tmp_path: Path) -> Path:
    """A copy of the project to which a method was added just as the README says."""
    tree = tmp_path / "tree"
    for name in ("flows", "stages", "schemas", "deploy", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    for language, place, text in BLOCKS:
        if place and language == "python":
            (tree / place).write_text(text)
        if place and language == "diff":
            (tree / place).write_text(apply_diff((tree / place).read_text(), text))
    return tree


def test_adding_a_method_takes_what_the_readme_says(extended: Path, ready_home: Path) -> None:
    changed = {
        str(file.relative_to(extended))
        for file in extended.rglob("*.py")
        if not (ROOT / file.relative_to(extended)).exists()
        or file.read_text() != (ROOT / file.relative_to(extended)).read_text()
    }
    assert changed == {
        "schemas/config/methods.py",
        "stages/align/__init__.py",
        "stages/align/orpo.py",
        "tests/test_orpo.py",
    }
    added = sum(len((extended / name).read_text().splitlines()) for name in changed if not (ROOT / name).exists())
    assert added <= 80
    for tool in (["ruff", "check"], ["ruff", "format", "--check"]):
        subprocess.run([sys.executable, "-m", *tool, *changed], cwd=extended, check=True)
    subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/test_orpo.py"], cwd=extended, check=True)


def test_an_added_method_trains(extended: Path, ready_home: Path, tmp_path: Path) -> None:
    from stages import tracking
    from tests.support import models

    folders = {
        "model": models.model_folder(tmp_path / "model"),
        "data": models.data_folder(tmp_path / "data", preference=models.rows(12, *models.PAIRS)),
    }
    inputs = {name: {"uri": str(folder), "sha256": tracking.digest(folder)} for name, folder in folders.items()}
    params = {"method": "orpo", "batch_size": 4, "max_steps": 3, "learning_rate": 1e-3}
    request = tmp_path / "request.json"
    asked = {"stage": "align", "version": STAGES["align"].version, "params": params, "inputs": inputs, "name": "orpo"}
    request.write_text(json.dumps(asked))
    command = [sys.executable, "-m", "stages", "align", str(request)]
    answer = subprocess.run(command, cwd=extended, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["outputs"]) == {"model"} and result["metrics"]["train/loss"] > 0


def test_files_of_the_working_directory_are_never_imported(tmp_path: Path) -> None:
    """A user's `stages/` folder or `random.py` is theirs: no command imports it, nor does a process that it starts."""
    for name in ("stages", "schemas", "flows"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported a package of the working directory')")
    for name in ("random.py", "json.py", "torch.py"):
        (tmp_path / name).write_text("raise SystemExit('imported a file of the working directory')")
    pair = {"prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "Bread."}
    rows = write_rows(tmp_path / "pairs.jsonl", [pair])
    console_script = [sys.executable, "-P", "-m", "flows.cli"]  # as the installed `alignflow`, which is safe itself
    command = [*console_script, "validate", str(rows), "--kind", "preference", "--out", "checked", "--max-bad", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "working directory" not in done.stdout + done.stderr
    assert (tmp_path / "checked" / "report.json").is_file(), done.stderr
