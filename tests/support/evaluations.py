"""Evaluations made of given scores, for tests of what is concluded from them."""

from collections.abc import Sequence
from typing import Any

from stages.engine.scoring.evaluation_record import Evaluation, Sample

N = 120
ENDPOINT = {"judge": "endpoint", "url": "http://127.0.0.1:9/v1", "model": "m"}


def settings(judge: dict[str, Any] | None = None, temperatures: Sequence[float] = (1.0,)) -> dict[str, Any]:
    more = {"judge": judge or {"judge": "rule"}, "judge_model": None, "temperatures": list(temperatures)}
    return {"samples_per_prompt": 1, "max_new_tokens": 8, "seed": 0, "bootstrap": 500, **more}


def made(scores: Sequence[float], judge: dict[str, Any] | None = None, **metrics: float) -> Evaluation:
    """An evaluation whose answers have these scores, one per prompt; the SFT model's all have 0."""
    samples = [
        Sample([{"role": "user", "content": f"say {i}"}], f"{i}", s, "so", 0.0, (s > 0) + 0.5 * (s == 0), 3, 3, True, 1)
        for i, s in enumerate(scores)
    ]
    named = {"judge_score": sum(scores) / N, "win_rate_vs_sft": sum(s.win for s in samples) / N, "length": 3.0}
    named |= {"kl_to_reference": 1.0, "kl_to_reference_se": 0.1, **metrics}
    return Evaluation({f"eval/{name}": value for name, value in named.items()}, samples, settings(judge))


SFT = made([0.0] * N)
