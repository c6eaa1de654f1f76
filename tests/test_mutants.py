"""The list of mistakes fits the code, so that `make mutants` can make every one of them."""

from pathlib import Path

import pytest

from tests.mutants.listed import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]


def test_there_are_many_and_each_is_another() -> None:
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS) >= 80


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}-{mutant.new[:40]}")
def test_each_changes_one_place_and_is_still_python(mutant: Mutant) -> None:
    text = (ROOT / mutant.file).read_text()
    broken = mutant.applied(text)
    assert broken != text
    compile(broken, mutant.file, "exec")
    assert mutant.tests and all((ROOT / test).is_file() for test in mutant.tests)
    assert not any("golden" in test for test in mutant.tests)
