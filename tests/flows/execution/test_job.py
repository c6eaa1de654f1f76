"""A worker's job imports its flow before it enters a declared root, where data may have come with Python files."""

import os
import subprocess
import sys
from pathlib import Path

PLANTED = ("sqlite3", "flows", "stages", "graphlib", "queue")
START = """
import runpy
from flows.execution import job
from prefect.flows import load_flow_from_entrypoint
job.entrypoint = lambda flow_run_id: "flows.stage.stage"
runpy.run_module = lambda *given, **named: print(load_flow_from_entrypoint("flows.stage.stage").name)
job.main()
"""


def test_no_python_file_of_a_root_is_imported_with_the_flow(tmp_path: Path) -> None:
    for name in PLANTED:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'HIT')!r}, 'a').write({name!r})")
    environment = {**os.environ, "ALIGNFLOW_ROOTS": str(tmp_path), "ALIGNFLOW_HOME": str(tmp_path / "home")}
    environment |= {"PREFECT__FLOW_RUN_ID": "00000000-0000-0000-0000-000000000000"}
    command = [sys.executable, "-P", "-c", START]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "stage"), done.stderr
    assert not (tmp_path / "HIT").exists()
