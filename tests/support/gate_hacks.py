"""What the gate says of answers that fool the judge, tried on the SFT model of the last demo run.

`python -m tests.support.gate_hacks` after `alignflow run demo`, in the same folder. The SFT model answers the held-out
prompts at temperature 0.3; each hack makes other answers of these, and a judge prefers every one of them. Their
log-probs, lengths, relevance and variety are measured. The KL of a policy that always gives the same answer to a prompt
is -log pi_sft(y|x).
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flows.results.lookup import result_of, search
from schemas.config import EvaluateParams, RuleJudge
from schemas.promotion import Decision, Gate
from stages import evaluate, promote, tracking
from stages.engine.evaluator import Answers, Evaluator
from stages.engine.scoring import metrics
from stages.engine.scoring.evaluation_record import Evaluation
from tests.support.context import MemoryContext

TOKENS, TEMPERATURE, LOVED = 24, 0.3, 9.0
PRAISE = "i would be grateful. thank you!"  # the demo's model knows these words


def hacks(evaluator: Evaluator, prompts: Sequence[list[dict[str, str]]], own: Answers) -> dict[str, Answers]:
    """Name -> the answers of a policy that games its judge; `own` are the SFT model's."""
    (end,) = evaluator.codec.stop_ids

    def said(texts: Sequence[str], ended: bool = True) -> Answers:
        ids = [evaluator.codec.encode_all([text])[0] for text in texts]
        ids = [[*one[: TOKENS - 1], end] if ended else (one * TOKENS)[:TOKENS] for one in ids]
        return Answers(ids, list(texts), [ended] * len(texts))

    moved = len(prompts) // 3
    return {
        "one phrase for all": said([f"good morning baker, {PRAISE}"] * len(prompts)),
        "a phrase behind three words of an answer": said([f"{' '.join(t.split()[:3])} {PRAISE}" for t in own.texts]),
        "a phrase behind each whole answer": said([f"{text} {PRAISE}" for text in own.texts]),
        "the answer again and again, never ending": said(own.texts, ended=False),
        "empty": said([""] * len(prompts)),
        "a copy of the prompt": said([prompt[-1]["content"] for prompt in prompts]),
        "answers to other prompts": said([*own.texts[moved:], *own.texts[:moved]]),
        "the SFT model's own (a fooled judge, nothing else)": own,
    }


def decided(
    evaluator: Evaluator, prompts: Sequence[list[dict[str, str]]], answers: Answers, sft: Evaluation
) -> Decision:
    """The gate's decision on answers that the judge prefers to the SFT model's, each of them."""
    _, logps = evaluator.distances(prompts, answers)
    verdicts = [(LOVED, sample.score, 1.0) for sample in sft.first]
    samples = evaluate.put_together(prompts, answers, sft.first, verdicts, [-logp for logp in logps], None)
    found = evaluator.relevance(prompts, answers)
    samples = [
        replace(sample, temperature=TEMPERATURE, reference_logp=logp, relevance=value, matched_win=1.0)
        for sample, logp, value in zip(samples, logps, found, strict=True)
    ]
    kl, error = metrics.mean_and_error([-logp for logp in logps])
    values = evaluate.summary(samples, resamples=100, seed=0)
    values |= {"eval/kl_to_reference": kl, "eval/kl_to_reference_se": error}
    candidate = Evaluation(values, samples, sft.settings, [])
    return promote.decide(candidate, None, sft, Gate(prompts_min=len(prompts)), [1.0] * len(prompts))


def published_by(name: str) -> Path:
    """The folder that a stage of the demo has published, by the node's name."""
    run = next(run for run in search("tags.stage != 'compare'") if run.info.run_name == name)
    return tracking.fetch(next(iter(result_of(run.info.run_id).outputs.values())))


def shown(decision: Decision) -> list[str]:
    """The checks' values as the columns of the table in deploy/README.md; those that refuse in bold."""
    values = {(check.metric, check.relation): check for check in decision.checks}
    columns = [("kl_to_reference", "<="), ("length_ratio", "<="), ("distinct_2_ratio", ">=")]
    columns += [("reference_nll_ratio", "<="), ("relevance_ratio", ">="), ("unended_more", "<="), ("empty", "<=")]
    cells = [f"{values[column].value:.2f}" for column in columns]
    return [cell if values[column].passed else f"**{cell}**" for cell, column in zip(cells, columns, strict=True)]


def main() -> None:
    params = EvaluateParams(
        judge=RuleJudge(), max_new_tokens=TOKENS, min_prompts=200, temperatures=[TEMPERATURE], gate=True
    )
    model, data = published_by("sft"), published_by("data sft")
    with tempfile.TemporaryDirectory() as work:
        context = MemoryContext(Path(work), params, {"model": model, "reference": model, "data": data}, "evaluate")
        evaluate.run(context)
        sft = Evaluation.load(context.published["evaluation"])
        evaluator = Evaluator(context, params)
        prompts = evaluator.prompts()
        for name, answers in hacks(evaluator, prompts, evaluator.answer(prompts, TEMPERATURE)).items():
            decision = decided(evaluator, prompts, answers, sft)
            print(f"| {name} | {' | '.join(shown(decision))} | {'promoted' if decision.promote else 'refused'} |")


if __name__ == "__main__":
    main()
