"""A reward model as MLflow serves it. This file travels with the model, so that a server needs transformers alone."""

from pathlib import Path
from typing import Any


class RewardModel:
    """Scores answers as training saw them: normalised by mean and spread of the reference's answers."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.scale: dict[str, float] = getattr(self.model.config, "alignflow_score", {"mean": 0.0, "std": 1.0})
        self.around: dict[str, str] = getattr(self.model.config, "alignflow_answer", {})

    def score(self, prompt: Any, answer: str) -> float:
        """The score of one answer. prompt: a text, which is one user's message, or messages with role and content."""
        import torch

        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        text += self.around.get("lead", "") + answer + self.around.get("end", self.tokenizer.eos_token or "")
        with torch.no_grad():
            (raw,) = (
                self.model(**self.tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0].tolist()
            )
        return (raw - self.scale["mean"]) / self.scale["std"]

    def predict(self, rows: Any, params: Any = None) -> list[float]:
        """A score for each row of a DataFrame with the columns `prompt` and `answer`."""
        return [self.score(prompt, answer) for prompt, answer in zip(rows["prompt"], rows["answer"], strict=True)]


def _load_pyfunc(folder: str) -> RewardModel:
    """What MLflow calls, by this name."""
    return RewardModel(Path(folder))
