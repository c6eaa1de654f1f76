"""Prompts worth looking at: by a rule that is stated, with how many there are and the first of them. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from stages.compare.head_to_head import STARTING_POINTS
from stages.engine.scoring.evaluation_record import Sample

EXAMPLES = 5


@dataclass(frozen=True)
class Group:
    """Prompts that have something in common."""

    title: str
    about: str
    """By which rule they are here and in which order."""
    places: Sequence[int]
    """Their numbers among all prompts, the most striking ones first."""
    total: int
    """Of how many prompts."""

    @property
    def share(self) -> str:
        """`31 of 231 prompts`."""
        return f"{len(self.places)} of {self.total} prompts"


def groups(samples: Mapping[str, Sequence[Sample]], alone: bool) -> list[Group]:
    """The groups of the prompts by the models' first answers to them; those without prompts are there too, and empty.

    samples: model -> one sample per prompt, in one order for all. alone: whether the judge scores answers by
    themselves; of one that only compares the scores are wins over SFT.
    """
    aligned = {name: own for name, own in samples.items() if name not in STARTING_POINTS}
    if not aligned or "sft" not in samples:
        return []
    numbers = range(len(samples["sft"]))

    def scores(place: int) -> list[float]:
        return [own[place].score for own in aligned.values()]

    found = []
    for name, own in aligned.items():
        lost = [place for place in numbers if own[place].win == 0]
        lost.sort(key=lambda place: own[place].score - own[place].sft_score)
        about = "The judge prefers the SFT model's answer. The clearest losses come first."
        found.append(Group(f"{name} loses to SFT", about, lost, len(numbers)))
    if len(aligned) > 1:
        split = [place for place in numbers if {0, 1} <= {own[place].win for own in aligned.values()}]
        split.sort(key=lambda place: min(scores(place)) - max(scores(place)))
        about = "One aligned model beats SFT and another one loses to it. The widest apart come first."
        found.append(Group("Methods disagree", about, split, len(numbers)))
    cut = [place for place in numbers if not all(own[place].ended for own in aligned.values())]
    cut.sort(key=lambda place: -max(own[place].length for own in aligned.values()))
    about = "An aligned model's answer did not end by itself within the tokens allowed. The longest come first."
    found.append(Group("Answers cut off", about, cut, len(numbers)))
    whole = sorted(numbers, key=lambda place: -max(own[place].length for own in aligned.values()))
    about = "All prompts, those with the longest answer of an aligned model first."
    found.append(Group("Longest answers", about, whole, len(numbers)))
    if alone:
        worst = [place for place in numbers if fmean(scores(place)) < samples["sft"][place].score]
        worst.sort(key=lambda place: fmean(scores(place)))
        about = "The aligned models' mean score is below the SFT model's. The lowest mean comes first."
        found.append(Group("Worst answers", about, worst, len(numbers)))
    return found
