"""The table of faults in tests/README.md: every line names tests that exist."""

import re

from tests.conftest import ROOT


def test_each_line_names_its_tests() -> None:
    written = {
        name for file in ROOT.glob("tests/**/test_*.py") for name in re.findall(r"def (test_\w+)\(", file.read_text())
    }
    text = (ROOT / "tests" / "README.md").read_text().partition("## Fault tolerance")[2].partition("## How fast")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(lines) > 10
    for line in lines:
        named = re.findall(r"`(test_\w+)`", line)
        assert named and set(named) <= written, line
