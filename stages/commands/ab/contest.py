"""Two models' answers to the same prompts: the items that people judge, and what their verdicts come to."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from schemas.commands import AbCommand
from schemas.errors import refuse
from stages.commands.rank import rows
from stages.commands.rank.agreement import alpha
from stages.commands.rank.questions import Item, Question
from stages.commands.rank.verdicts import Verdict
from stages.compare import people
from stages.engine.scoring.evaluation_record import Evaluation, Sample, check_comparable
from stages.engine.scoring.paired import scores_alone, wins_between
from stages.tracking import digest


@dataclass(frozen=True)
class Side:
    """One prompt of the contest."""

    one: Sample
    other: Sample
    judge: float | None
    """1 where the judge prefers the first model's answer, 1/2 for a tie, 0; None where it has not compared the two."""


class Contest:
    """The prompts on which the two models differ, in an order that the seed decides and all people share."""

    def __init__(self, command: AbCommand) -> None:
        """Raises StageError where the evaluations cannot be compared, hold no texts, or never differ."""
        self.command = command
        first, second = Evaluation.load(command.first), Evaluation.load(command.second)
        check_comparable(command.model, first.settings, first.prompts, command.other, second)
        ones, others = ([one for one in own.first if one.draw == 0] for own in (first, second))
        if any(one.answer is None for one in [*ones, *others]):
            message = "its evaluation holds no answers."
            raise refuse("MODEL", command.model, message, "evaluate with log_text: true", kind="missing_input")
        self.digests = digest(command.first), digest(command.second)
        verdicts = self._judged(first, ones, others)
        pairs = list(zip(ones, others, verdicts, strict=True))
        random.Random(command.seed).shuffle(pairs)
        self.sides: dict[str, Side] = {}
        self.items: list[Item] = []
        for one, other, judge in pairs:
            item = Item(Question(one.prompt, [one.answer or "", other.answer or ""], [], {}), (0, 1))
            if one.answer != other.answer and item.id not in self.sides:
                self.sides[item.id] = Side(one, other, judge)
                self.items.append(item)
        self.identical = len(pairs) - len(self.items)
        self.items = self.items[: command.limit]
        if not self.items:
            fix = "name two models that differ"
            raise refuse("MODEL", command.other, "both models gave the same answer to every prompt.", fix)

    def _judged(self, first: Evaluation, ones: Sequence[Sample], others: Sequence[Sample]) -> list[float | None]:
        """What the run's judge said of each prompt; it is not asked again."""
        names = self.command.model, self.command.other
        if scores_alone(first.settings["judge"]):
            return list(wins_between(names, ones, others, first.settings["judge"]))
        if names[1] == "sft":
            return [one.win for one in ones]
        if names[0] == "sft":
            return [1 - other.win for other in others]
        return [None] * len(ones)

    def result(self, verdicts: Sequence[Verdict]) -> people.People | None:
        """What everybody's verdicts come to; None without any."""
        told = [one for one in verdicts if isinstance(one.verdict, list) and one.item in self.sides]
        leads: dict[str, float] = defaultdict(float)
        for one in told:
            first, *rest = one.verdict or []
            leads[one.item] += 0.0 if not rest else 1.0 if first == [0] else -1.0
        if not told:
            return None
        units = rows.units(told)
        pairs = [
            (0.5 + 0.5 * (lead > 0) - 0.5 * (lead < 0), judge)
            for item, lead in leads.items()
            if (judge := self.sides[item].judge) is not None
        ]
        # The majority is one verdict, however many people are in it.
        signs = [float((lead > 0) - (lead < 0)) for lead in leads.values()]
        return people.People.model_validate(
            {
                "model": self.command.model,
                "other": self.command.other,
                "evaluations": self.digests,
                "annotators": len({one.annotator for one in told}),
                "verdicts": len(told),
                "alpha": alpha(units) if units else None,
                "judge": people.agreement(pairs) if pairs else None,
                **people.counted(signs, [self.sides[item].one.cluster for item in leads]),
            }
        )

    def finish(self, verdicts: Sequence[Verdict], file: Path) -> list[str]:
        """Write the result; returns it in words."""
        result = self.result(verdicts)
        lines = rows.summary(self.items, verdicts)
        if result is None:
            return [*lines, "nothing was judged yet"]
        people.write(result, file)
        return [*lines, *result.sentences]
