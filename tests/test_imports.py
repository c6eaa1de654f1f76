"""What is promised of imports holds when modules really load, lazy ones included; the contracts see only statements."""

import importlib.util
import re
import subprocess
import sys

import pytest

from schemas.stage import STAGES
from tests.conftest import ROOT

HEAVY = {"torch", "transformers", "peft", "accelerate"}


def loaded(statement: str) -> set[str]:
    """Top-level modules that a fresh process has loaded after a statement."""
    code = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return set(answer.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "flows.cli",
        "flows.planning.config_file",
        "flows.results.lookup",
        "flows.results.export",
        "flows.servers.supervisor",
        "flows.planning.dry_run",
    ],
)
def test_the_flow_side_loads_no_torch(module: str) -> None:
    assert not loaded(f"import {module}") & HEAVY


def test_help_loads_neither_prefect_nor_mlflow_nor_pydantic() -> None:
    assert not loaded("import flows.cli") & {"prefect", "mlflow", "pydantic", "yaml", "ruamel"}


def test_schemas_load_nothing_heavy() -> None:
    modules = loaded(
        "import schemas.config, schemas.config.methods, schemas.rows, schemas.stage, schemas.config.training"
    )
    assert not modules & (HEAVY | {"prefect", "mlflow"})


def test_a_training_does_not_load_pandera() -> None:
    """Rows are checked in stage `validate` alone, and it takes a second to import."""
    assert "pandera" not in loaded("import stages.engine.data.examples, stages.evaluate, stages.align")


def test_tracking_alone_does_not_load_mlflow() -> None:
    assert not loaded("import stages.tracking") & (HEAVY | {"mlflow", "prefect"})


def test_every_stage_is_a_file_or_folder_of_its_name() -> None:
    assert {name for name in STAGES if importlib.util.find_spec(f"stages.{name}") is None} == set()


CODE = {file: file.read_text() for name in ("flows", "stages", "schemas") for file in (ROOT / name).rglob("*.py")}


def test_every_module_logs_under_the_one_name_whose_info_is_shown() -> None:
    """A stage shows INFO of the logger `alignflow` alone; a logger of a module's own name would be silent."""
    assert any('logging.getLogger("alignflow")' in text for text in CODE.values())
    assert [file.name for file, text in CODE.items() if "getLogger(__name__)" in text] == []


def test_an_underscore_keeps_a_name_in_its_file() -> None:
    imported = re.compile(r"^from (?:flows|stages|schemas)[\w.]* import (?:\([^)]*?\b_[a-z]|[^(\n]*\b_[a-z])", re.M)
    assert [file.name for file, text in CODE.items() if imported.search(text)] == []


def test_every_file_that_the_code_names_exists() -> None:
    """A comment that points to a file which has moved sends its reader nowhere."""
    path = re.compile(r"\b(?:flows|stages|schemas|deploy|tests)/[\w./]+\.(?:py|yaml|json)\b")
    assert len([name for text in CODE.values() for name in path.findall(text)]) > 10
    assert {name for text in CODE.values() for name in path.findall(text) if not (ROOT / name).exists()} == set()


def test_variables_of_the_environment_have_one_home_and_all_are_documented() -> None:
    """A name that is spelled where it is read has a default and a type of its own there, and is in no table."""
    name = re.compile(r"[\"'`](ALIGNFLOW_\w+)[\"'`]")
    told = re.findall(r"^\| `(ALIGNFLOW_\w+)` \| \S", (ROOT / "deploy" / "README.md").read_text(), re.M)
    home = ROOT / "schemas" / "environment.py"
    assert len(told) > 10 and told == name.findall(CODE[home])
    assert {file.name for file, text in CODE.items() if file != home and name.search(text)} == set()


def test_every_python_that_is_started_leaves_the_working_directory_out() -> None:
    """With `-m` alone the working directory comes first, where a user's `random.py` or `stages/` may lie."""
    started = {file.name: re.findall(r"sys\.executable,\s*\"(-\w)\"", text) for file, text in CODE.items()}
    assert sum(map(len, started.values())) >= 8
    assert [name for name, options in started.items() if set(options) - {"-P"}] == []
