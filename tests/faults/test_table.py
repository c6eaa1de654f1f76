"""The tables of faults and of who gets in, in tests/README.md: every line names tests that exist."""

import re

from tests.conftest import ROOT


def test_each_line_names_its_tests() -> None:
    written = {
        name for file in ROOT.glob("tests/**/test_*.py") for name in re.findall(r"def (test_\w+)\(", file.read_text())
    }
    text = (ROOT / "tests" / "README.md").read_text().partition("## Fault tolerance")[2].partition("## How fast")[0]
    faults, _, access = text.partition("## Who gets in")
    tables = [[line for line in part.splitlines() if line.startswith("| ")][1:] for part in (faults, access)]
    assert all(len(table) >= 10 for table in tables)
    lines = [line for table in tables for line in table]
    for line in lines:
        named = re.findall(r"`(test_\w+)`", line)
        assert named and set(named) <= written, line
