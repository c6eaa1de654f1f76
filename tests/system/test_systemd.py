"""The unit that starts `alignflow up` again, judged by systemd's own reader of units."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

UNIT = (ROOT / "deploy" / "alignflow.service").read_text()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not on this machine")
def test_systemd_understands_every_line(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("alignflow")
    unit = tmp_path / "alignflow.service"
    unit.write_text(UNIT.replace("%h/alignflow/.venv/bin/alignflow", str(command)))
    verify = ["systemd-analyze", "verify", "--user", str(unit)]
    answer = subprocess.run(
        verify, capture_output=True, text=True, env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    )
    assert (answer.returncode, answer.stderr) == (0, "")


def test_it_comes_back_after_a_crash_and_not_after_a_mistyped_line() -> None:
    lines = UNIT.splitlines()
    assert {"Restart=on-failure", "RestartPreventExitStatus=2", "UMask=0077"} <= set(lines)
