"""What an evaluation folder holds: metrics.json, samples.jsonl, settings.json, perhaps pairs.json. No torch."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from schemas.conversation import Message, shown, words_of
from schemas.errors import refuse
from stages.engine.scoring.intervals import RESAMPLES

# Evaluations that differ in any of these cannot be compared.
CONDITIONS = ("judge", "judge_model", "temperatures", "samples_per_prompt", "max_new_tokens", "seed", "frozen")


@dataclass(frozen=True)
class Sample:
    """A model's answer to one held-out prompt beside the SFT model's, and what is known of both."""

    prompt: list[dict[str, str]]
    """Where texts are not kept (`log_text: false`) one message of the role `sha256`, the prompt's digest."""
    answer: str | None
    """None where texts are not kept."""
    score: float
    """By the judge. Of a judge that only compares: 1 won, 1/2 tied, 0 lost against the SFT model's answer."""
    sft_answer: str | None
    sft_score: float
    win: float
    """1 when better than the SFT model's answer, 0 when worse, 1/2 for a tie."""
    length: int
    """Tokens without the end token."""
    sft_length: int
    ended: bool
    """Whether the answer came to its end by itself."""
    kl: float
    """KL(pi || pi_sft) in nats along this answer, both at temperature 1, exact over the vocabulary at each token."""
    reward_score: float | None = None
    """By the reward model that the policy was trained on."""
    reference_logp: float | None = None
    """log pi_sft of this answer, in nats, at temperature 1."""
    relevance: float | None = None
    """How much likelier the SFT model finds the answer behind its own prompt than behind others, in nats."""
    matched_win: float | None = None
    """As `win`, against the SFT model at the temperature where it is as sharp as this model. For the gate."""
    temperature: float = 1.0
    """At which the answer was drawn."""
    draw: int = 0
    """Number of the answer among those to this prompt at this temperature. The same draw has the same seed for every
    model and temperature."""
    cluster: str = ""
    """What bootstraps draw again: `cluster_of` the prompt, by default made of it."""

    def __post_init__(self) -> None:
        if not self.cluster:
            object.__setattr__(self, "cluster", cluster_of(self.prompt))


@dataclass(frozen=True)
class Evaluation:
    """One model's evaluation."""

    metrics: dict[str, float]
    samples: list[Sample]
    """In the order of the temperatures, prompts and draws."""
    settings: dict[str, Any]
    """The stage's parameters with `seed` and `judge_model` (the sha256 of a judging reward model)."""
    pairs: list[tuple[str, float]] = field(default_factory=list)
    """Of each held-out pair: its prompt's cluster, 1 where the chosen answer gained more probability, 1/2 for a tie."""

    @property
    def temperatures(self) -> list[float]:
        """Those at which it was sampled; the metrics of the first one bear no temperature in their names."""
        return list(dict.fromkeys(sample.temperature for sample in self.samples))

    def at(self, temperature: float) -> list[Sample]:
        """One temperature's samples, in the order of the prompts, then of the draws.

        Raises:
            StageError: nothing was sampled at this temperature.
        """
        samples = [sample for sample in self.samples if sample.temperature == temperature]
        if not samples:
            given = ", ".join(f"{other:g}" for other in self.temperatures) or "none"
            message = f"nothing was sampled at this temperature, only at {given}."
            fix = "add it to evaluate.temperatures and evaluate again"
            raise refuse("evaluate.temperatures", temperature, message, fix, kind="not_comparable")
        return samples

    @property
    def first(self) -> list[Sample]:
        """The samples of the first temperature."""
        return self.at(self.temperatures[0]) if self.samples else []

    @property
    def prompts(self) -> list[list[dict[str, str]]]:
        """Each prompt once, in order."""
        return [sample.prompt for sample in self.first if sample.draw == 0]

    @property
    def resampling(self) -> dict[str, int]:
        """`resamples` and `seed` of intervals over it, so that equal evaluations give equal intervals."""
        return {"resamples": self.settings.get("bootstrap", RESAMPLES), "seed": self.settings.get("seed", 0)}

    def save(self, folder: Path) -> None:
        """Write its files into an existing folder."""
        lines = (json.dumps(asdict(sample), ensure_ascii=False) for sample in self.samples)
        _write(folder / "samples.jsonl", "".join(f"{line}\n" for line in lines))
        _write(folder / "metrics.json", json.dumps(self.metrics, indent=2))
        _write(folder / "settings.json", json.dumps(self.settings, indent=2))
        if self.pairs:
            _write(folder / "pairs.json", json.dumps(self.pairs))

    @classmethod
    def load(cls, folder: Path) -> "Evaluation":
        """Read what `save` wrote. Raises StageError when the folder is not an evaluation."""
        try:
            # Not splitlines: an answer may hold U+2028, which ends a line there and not in a file.
            lines = (folder / "samples.jsonl").read_text(encoding="utf-8").split("\n")
            known = {one.name for one in fields(Sample)}
            rows = [json.loads(line) for line in lines if line]
            metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
            if "temperature" in settings:  # of before there were several
                temperatures = [settings.pop("temperature")]
                settings = {"samples_per_prompt": 1, **settings, "temperatures": temperatures}
            pairs_file = folder / "pairs.json"
            pairs = json.loads(pairs_file.read_text(encoding="utf-8")) if pairs_file.is_file() else []
            only = {"temperature": settings.get("temperatures", [1.0])[0]}  # where the rows do not name theirs
            samples = [Sample(**only | {k: v for k, v in row.items() if k in known}) for row in rows]
            pairs = [(str(cluster), float(right)) for cluster, right in pairs]
        except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
            message = f"this is not an evaluation folder: {error}."
            fix = "give the output `evaluation` of stage evaluate"
            raise refuse("evaluation", folder, message, fix, kind="input") from error
        return cls(metrics, samples, settings, pairs)


def save_all(evaluations: Mapping[str, Evaluation], folder: Path) -> None:
    """Several evaluations as folders 0, 1, ... with their names in names.json."""
    for number, evaluation in enumerate(evaluations.values()):
        (folder / str(number)).mkdir()
        evaluation.save(folder / str(number))
    _write(folder / "names.json", json.dumps(list(evaluations)))


def load_all(folder: Path) -> dict[str, Evaluation]:
    """What `save_all` wrote, by name. Raises StageError when the folder is something else."""
    try:
        names: list[str] = json.loads((folder / "names.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"this folder does not hold several evaluations: {error}."
        raise refuse("baselines", folder, message, "give the output of stage baselines", kind="input") from error
    return {name: Evaluation.load(folder / str(number)) for number, name in enumerate(names)}


def cluster_of(prompt: Sequence[Message]) -> str:
    """`schemas.rows.cluster_id` of a prompt, by which data is split too; its digest where its text was not kept."""
    if [message["role"] for message in prompt] == ["sha256"]:
        return digest_of(prompt)
    from schemas.rows import (
        cluster_id,  # late: polars takes a third of a second, and stored samples name their clusters
    )

    return cluster_id(prompt)


def digest_of(prompt: Sequence[Message]) -> str:
    """sha256 of a prompt, also of one whose text was not kept."""
    if [message["role"] for message in prompt] == ["sha256"]:
        return prompt[0]["content"]
    turns = [[message["role"], words_of(message)] for message in prompt]
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()


def without_text(sample: Sample) -> Sample:
    """All numbers of a sample, and its prompt's digest."""
    digest = [{"role": "sha256", "content": digest_of(sample.prompt)}]
    return replace(sample, prompt=digest, answer=None, sft_answer=None)


def texts(samples: Sequence[Sample], name: str) -> list[str]:
    """The answers. Raises StageError where the evaluation keeps none."""
    answers = [sample.answer for sample in samples if sample.answer is not None]
    if len(answers) < len(samples):
        message = f"{name}'s evaluation holds no answers, and the judge can only compare."
        fix = "evaluate it with log_text: true, or use a judge that scores"
        raise refuse("evaluate.judge", "endpoint", message, fix, kind="missing_input")
    return answers


def _write(path: Path, text: str) -> None:
    """UTF-8; a lone surrogate, which no encoding has, becomes `?`."""
    path.write_bytes(text.encode("utf-8", errors="replace"))


def text_of(messages: Sequence[Message]) -> str:
    """A prompt for people: a single message's text, else each message after its role."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {shown(message)}" for message in messages)


def check_comparable(
    name: str,
    settings: Mapping[str, Any],
    prompts: Sequence[Sequence[Message]],
    other_name: str,
    other: Evaluation,
    conditions: Sequence[str] = CONDITIONS,
) -> None:
    """Raises StageError unless both were judged alike, sampled alike, and asked the same prompts in the same order."""
    for key in conditions:
        own, others = settings.get(key), other.settings.get(key)
        if own != others:
            message = f"{name} was evaluated with {key} = {own}, {other_name} with {others}."
            fix = "evaluate both under the same settings"
            raise refuse(f"evaluate.{key}", own, message, fix, kind="not_comparable")
    if list(map(digest_of, prompts)) != list(map(digest_of, other.prompts)):
        message = f"{name} was asked {len(prompts)} prompts, {other_name} {len(other.prompts)}: they are not the same."
        fix = "evaluate both on the same data"
        raise refuse("data.evaluation", name, message, fix, kind="not_comparable")
