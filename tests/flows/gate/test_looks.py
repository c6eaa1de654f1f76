"""The gate's error budget: what a year holds, when the gate opens again, and what the answers of a look hang on."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from flows.gate import looks
from flows.gate.looks import Look
from schemas.errors import StageError
from schemas.promotion import Check, Decision, Gate
from stages import tracking
from tests.support.gate_simulation import World, false_years, power, power_after_luck

START = datetime(2026, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)


def look(day: float, number: int = 1, alpha: float = 0.01) -> Look:
    return Look(number, (START + day * DAY).isoformat(), alpha, f"key{number}", "candidate")


def test_a_year_holds_as_many_looks_as_its_error() -> None:
    gate = Gate(error=0.05, looks_per_year=5)
    taken = [look(day, number) for number, day in enumerate((0, 10, 20, 30), 1)]
    assert looks.opens(taken, gate, START + 40 * DAY) is None
    taken.append(look(40, 5))
    # the fifth has spent the rest: the first of them is a year old on day 365
    assert looks.opens(taken, gate, START + 50 * DAY) == START + 365 * DAY
    assert looks.opens(taken, gate, START + 364.9 * DAY) == START + 365 * DAY
    assert looks.opens(taken, gate, START + 365 * DAY) is None
    # looks that cost more than the gate's own share count as what they have cost
    dear = [look(0, 1, alpha=0.03), look(5, 2, alpha=0.02)]
    assert looks.opens(dear, gate, START + 50 * DAY) == START + 365 * DAY
    assert looks.opens(dear, Gate(error=0.05, looks_per_year=1), START + 50 * DAY) == START + 370 * DAY
    with pytest.raises(StageError, match=r"promote\.gate\.error = 0\.05: m has spent .* opens again on 2027-01-01"):
        looks.check_budget("m", taken, gate, START + 50 * DAY)


def test_each_look_draws_other_answers_and_the_same_look_the_same() -> None:
    one = look(0)
    assert looks.seed("m", one) == looks.seed("m", replace(one, decision="reject", p=0.4))
    others = [replace(one, number=2), replace(one, candidate="other"), replace(one, key="other")]
    seeds = {looks.seed("m", one), looks.seed("other", one), *(looks.seed("m", other) for other in others)}
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)


def test_looks_are_kept_in_the_registry_and_taken_once(ready_home: Path) -> None:
    gate = Gate(error=0.05, looks_per_year=2)
    first = looks.take("m", "key", "candidate", gate)
    assert first.number == 1 and first.alpha == 0.025 and looks.looks("m") == [first]
    assert looks.take("m", "key", "candidate", gate) == first  # resumed
    found = [Check(metric="win_rate_p", value=0.2, relation="<=", bound=0.025, meaning="", passed=False)]
    noted = looks.note("m", first, Decision(promote=False, against="sft", checks=found, decided=123))
    assert (noted.decision, noted.p, noted.n) == ("reject", 0.2, 123) and looks.looks("m") == [noted]
    assert looks.take("m", "key", "candidate", gate) == noted  # the same candidate in the same contest
    assert looks.take("m", "another champion", "candidate", gate).number == 2
    with pytest.raises(StageError) as refused:
        looks.take("m", "third", "candidate", gate)
    assert refused.value.problem.kind == "budget" and len(looks.looks("m")) == 2


def test_an_equal_candidate_of_more_than_a_year_ago_is_looked_at_anew(ready_home: Path) -> None:
    """Its number is one that no look had before, also where the oldest looks are removed: those of two years ago."""
    now = datetime.now(UTC)
    tracking.client().create_registered_model("m")
    for number, years in ((7, 2.1), (8, 1.1)):
        at = (now - years * looks.YEAR).isoformat(timespec="seconds")
        looks.write("m", Look(number, at, 0.01, "key", "candidate"))
    assert looks.take("m", "key", "candidate", Gate()).number == 9
    assert [one.number for one in looks.looks("m")] == [8, 9]
    assert looks.take("m", "key", "candidate", Gate()).number == 9


def test_a_simulated_year_errs_as_seldom_as_it_says_and_sees_what_it_says() -> None:
    generator = np.random.default_rng(3)
    world = World(Gate(), draws=1, spread=0.0)
    # 60 years at .05 or less: 8 or more wrong ones have chance .01
    assert false_years(world, 60, generator) < 8 / 60
    # one look at a true .60: .807 exactly; of 400, three standard errors are .06
    assert power(world, 400, generator) > 0.8 - 0.06
    assert power(World(Gate(), draws=2), 200, generator) > 0.9


def test_a_champion_that_had_luck_does_not_keep_better_ones_out() -> None:
    """Its answers are drawn anew for each look, and the luck is gone; by its old ones two of three would stay out."""
    generator, world = np.random.default_rng(4), World(Gate(), draws=1)
    assert power_after_luck(world, 300, generator, fresh=True) > 0.807 - 0.07  # three standard errors
    assert power_after_luck(world, 300, generator, fresh=False) < 0.5
