"""How often the gate errs over years of weekly looks, by the real test and the real budget on made-up wins.

    python -m tests.support.gate_simulation [YEARS]

Each prompt has a chance of its own that the candidate's answer wins, with the given mean; each look draws fresh answers
for both sides. What a training would do is left out: only the decision is simulated.
"""

import math
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import numpy as np

from flows.gate.looks import Look, opens
from schemas.promotion import Gate, PromoteConfig, exact
from stages.promote import signs

START = datetime(2026, 1, 1, tzinfo=UTC)
WEEK = timedelta(days=7)
LEAD = math.sqrt(2) * 0.2533
"""Between means of normal scores of variance 1, of which the higher wins .60: the .60 quantile is .2533."""


@dataclass(frozen=True)
class World:
    """How candidates do against the champion: `spread` is the standard deviation of the chances between prompts."""

    gate: Gate = field(default_factory=Gate)
    draws: int = PromoteConfig().samples_per_prompt
    spread: float = 0.2

    def passes(self, truth: float, generator: np.random.Generator) -> bool:
        """One look of `prompts_min` prompts at a candidate whose true win rate is `truth`."""
        prompts = self.gate.prompts_min
        chance_N = np.full(prompts, truth)
        if self.spread:
            size = truth * (1 - truth) / self.spread**2 - 1  # beta distribution of that mean and deviation
            chance_N = generator.beta(truth * size, (1 - truth) * size, prompts)
        won = (generator.random((self.draws, prompts)) < chance_N).astype(float)
        clusters = [str(i) for i in range(prompts)] * self.draws
        p = exact.sign_test(*signs(won.ravel().tolist(), clusters), self.gate.win_rate_min)
        return p <= self.gate.alpha

    def passes_luck(self, fresh: bool, generator: np.random.Generator, others: int = 52) -> bool:
        """One look at a true .60 before the luckiest of equal champions: the one whose answers were judged best.

        Scores are normal with variance 1. `fresh`: the champion answers anew; else by the answers that made it so.
        """
        shape = (self.draws, self.gate.prompts_min)
        equals = generator.normal(size=(others, *shape))
        luckiest = equals[equals.mean((1, 2)).argmax()]
        champion = generator.normal(size=shape) if fresh else luckiest
        won = (generator.normal(LEAD, 1, shape) > champion).astype(float)
        clusters = [str(i) for i in range(shape[1])] * self.draws
        return exact.sign_test(*signs(won.ravel().tolist(), clusters), self.gate.win_rate_min) <= self.gate.alpha

    def promotions(self, truths: list[float], generator: np.random.Generator) -> list[bool]:
        """A look a week while the budget lets: whether each candidate is promoted. A closed gate promotes none."""
        looks: list[Look] = []
        promoted = []
        for week, truth in enumerate(truths):
            now = START + week * WEEK
            if opens(looks, self.gate, now) is not None:
                promoted.append(False)
                continue
            looks.append(Look(week + 1, now.isoformat(), self.gate.alpha, str(week), "c"))
            promoted.append(self.passes(truth, generator))
        return promoted


def false_years(world: World, years: int, generator: np.random.Generator, truth: float = 0.5) -> float:
    """Share of years of 52 candidates with this true win rate in which at least one is promoted."""
    return float(np.mean([any(world.promotions([truth] * 52, generator)) for _ in range(years)]))


def power(world: World, looks: int, generator: np.random.Generator, truth: float = 0.6) -> float:
    """Share of looks that a candidate with this true win rate passes."""
    return float(np.mean([world.passes(truth, generator) for _ in range(looks)]))


def power_after_luck(world: World, looks: int, generator: np.random.Generator, fresh: bool) -> float:
    """Share of looks that a true .60 passes before a champion that had luck."""
    return float(np.mean([world.passes_luck(fresh, generator) for _ in range(looks)]))


def main() -> None:
    """Print the figures."""
    years, generator = int(sys.argv[1]) if len(sys.argv) > 1 else 400, np.random.default_rng(0)
    for draws in (1, 2):
        for spread in (0.0, 0.2, 0.4):
            world = World(draws=draws, spread=spread)
            false, found = false_years(world, years, generator), power(world, 4 * years, generator)
            print(
                f"{draws} answers a prompt, spread {spread}: false promotion in {false:.1%} of {years} years; "
                f"true .60 passes in {found:.1%} of {4 * years} looks"
            )
    for draws in (1, 2):
        shares = [power_after_luck(World(draws=draws), 2 * years, generator, fresh) for fresh in (True, False)]
        print(
            f"{draws} answers a prompt, luckiest of 52 equal champions: true .60 passes in {shares[0]:.1%} of "
            f"{2 * years} looks; judged by the champion's old answers it would in {shares[1]:.1%}"
        )


if __name__ == "__main__":
    main()
