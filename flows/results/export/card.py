"""The model card: what the Hub reads of a model, how to load it, how it did in words, and what it was trained with."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from flows.results.export import origins
from flows.results.lookup import Model
from schemas.model_folder import is_reward_model, read_json
from schemas.text import one_line
from stages import tracking

LANGUAGE_MODEL = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
messages = [{{"role": "user", "content": "Hello!"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1]:]
print(tokenizer.decode(answer, skip_special_tokens=True))
"""

ADAPTER = LANGUAGE_MODEL.replace(
    'AutoModelForCausalLM.from_pretrained("{folder}")',
    'AutoModelForCausalLM.from_pretrained({base})\nmodel = PeftModel.from_pretrained(model, "{folder}")',
).replace("from transformers", "from peft import PeftModel\nfrom transformers", 1)

REWARD_MODEL = """from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
prompt = [{{"role": "user", "content": "Hello!"}}]
text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
text += {lead}"Hello to you." + {end!r}
print(model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits)
"""

READABLE = {
    "win_rate_vs_sft": "Win rate against the SFT model",
    "length_controlled_win_rate": "Win rate with the effect of length removed",
    "judge_score": "Mean judge score",
    "kl_to_reference": "KL to the SFT model, nats per answer",
    "preference_accuracy": "Held-out pairs whose chosen answer gained",
    "reward_score": "Mean score of the reward model it was trained on",
    "length": "Tokens per answer",
    "distinct_2": "Unique word pairs",
    "ended": "Answers that end by themselves",
    "empty": "Empty answers",
    "reference_nll": "Negative log-likelihood under the SFT model, nats per token",
    "prompts": "Prompts answered",
}
"""Metric of an evaluation -> what people call it, in the order of a card."""
SHARES = {
    "win_rate_vs_sft",
    "length_controlled_win_rate",
    "preference_accuracy",
    "distinct_2",
    "ended",
    "empty",
}
"""Those that are shares of one."""


def card(chosen: Model, out: Path, adapter: origins.Pinned | None = None) -> ModelCard:
    """The card of a model that is exported to the folder `out`.

    `adapter`: the base of its adapter, which is exported alone then: without a name where nobody else can get it. None
    for a whole model.
    """
    request, folder = chosen.request, chosen.folder
    scores = is_reward_model(json.loads((folder / "config.json").read_text()))
    task = "text-classification" if scores else "text-generation"
    base = origins.base_of(request)
    on_hub = origins.pinned(base) if adapter is None else adapter
    method = None if request is None else str((chosen.tags or {}).get("method", request.stage))
    results = evaluation(chosen)
    metadata = ModelCardData(
        base_model=(on_hub and on_hub.name) or None,
        license=origins.licence(base),
        datasets=origins.datasets(request) or None,
        library_name="transformers" if adapter is None else "peft",
        pipeline_tag=task,
        tags=["alignflow", *([method] if method else []), *([] if adapter is None else ["lora"])],
        model_name=chosen.name if results else None,
        eval_results=[
            EvalResult(
                task,
                dataset_type="held-out-prompts",
                dataset_name="held-out prompts",
                metric_type=name,
                metric_name=words,
                metric_value=value,
            )
            for name, (words, value) in results.items()
        ]
        or None,
    )
    parts = [f"---\n{metadata.to_yaml()}\n---", f"# {one_line(chosen.name)}", origin(chosen, adapter)]
    parts.append(f"## Use\n\n```python\n{code(chosen.folder, out, scores, adapter)}```")
    if results:
        parts.append("## Evaluation\n\n" + judged(chosen) + "\n\n" + table(summary(results), "measure", "value"))
    if request is not None:
        given = {name: value for name, value in tracking.flatten(request.params).items() if value != "null"}
        parts.append("## Training\n\n" + table(given | {"seed": request.seed}, "setting", "value"))
    return ModelCard("\n\n".join(parts) + "\n")


def code(folder: Path, out: Path, scores: bool, adapter: origins.Pinned | None) -> str:
    """Lines of Python that load the model and use it once."""
    # The text before an answer that the generation prompt leaves out, and the one that ends it, at which a reward model
    # gives its score: as they were saved, else nothing and the tokenizer's end.
    around = read_json(folder / "config.json").get("alignflow_answer") or {}
    if "end" in around:
        lead, end = str(around.get("lead") or ""), str(around["end"])
    else:
        token = read_json(folder / "tokenizer_config.json").get("eos_token")
        lead, end = "", token["content"] if isinstance(token, dict) else token or ""
    before = f"{lead!r} + " if lead else ""
    text = REWARD_MODEL if scores else ADAPTER if adapter else LANGUAGE_MODEL
    base = "None" if adapter is None else adapter.as_arguments()
    return text.format(folder=out.name, lead=before, end=end, base=base)


# --- where it came from ---

ORIGIN = {"data version": "data.version", "pipeline run": "pipeline.run", "stage key": "stage.key"}


def origin(chosen: Model, adapter: origins.Pinned | None) -> str:
    """One paragraph: which stage made the model, from which base and data, under which run."""
    if chosen.request is None or chosen.tags is None:
        return "A model folder from outside alignflow's runs."
    request, tags = chosen.request, chosen.tags
    method = tags.get("method", request.stage)
    what = "Weights in full, adapters merged." if adapter is None else "The LoRA adapter alone, in peft's format."
    lines = [f"Made by alignflow, stage `{request.stage}`, method `{method}`. {what}"]
    if (source := origins.pinned(origins.base_of(request))) is not None:
        lines.append(f"- base model: [{source.name}](https://huggingface.co/{source.name}) at `{source.commit}`")
    lines += [f"- data: [{name}](https://huggingface.co/datasets/{name})" for name in origins.datasets(request)]
    lines += [f"- {title}: `{tags[name]}`" for title, name in ORIGIN.items() if name in tags]
    if adapter is not None and adapter.name:
        lines.append(f"- the adapter's base: `{adapter.name}`" + (f" at `{adapter.commit}`" if adapter.commit else ""))
    elif (chosen.folder / "adapter" / "adapter_config.json").is_file():
        below = request.inputs["model"]
        where = "`adapter/` is the LoRA adapter alone. Its" if adapter is None else "The adapter's"
        lines.append(
            f"- {where} base is `{below.uri}` (sha256 `{below.sha256[:12]}`, which "
            "stands in the adapter's `base_model_name_or_path`): export that, load it with transformers, and put "
            "the adapter on with `PeftModel.from_pretrained(model, folder)`; `AutoPeftModel` finds no base by a digest"
        )
    return lines[0] + "\n\n" + "\n".join(lines[1:])


# --- how it did ---


def evaluation(chosen: Model) -> dict[str, tuple[str, float]]:
    """Metric without `eval/` -> its name for people and its value. The Hub takes finite numbers alone."""
    metrics = {
        name.removeprefix("eval/"): value for name, value in (chosen.metrics or {}).items() if name.startswith("eval/")
    }
    known = {name: _words(name) for name, value in metrics.items() if math.isfinite(value)}
    order = {words: place for place, words in enumerate(READABLE.values())}
    listed = sorted(known, key=lambda name: (name.count("/"), name.rpartition("/")[0], order.get(known[name], 99)))
    return {name: (known[name], metrics[name]) for name in listed}


def _words(name: str) -> str:
    """`t0.3/win_rate_vs_sft_low` -> `Win rate against the SFT model at temperature 0.3, lower end`."""
    place, _, own = name.rpartition("/")
    bare, end = own, ""
    for suffix, words in (("_low", ", lower end"), ("_high", ", upper end"), ("_se", ", standard error")):
        if own.endswith(suffix):
            bare, end = own.removesuffix(suffix), words
    where = ""
    for part in filter(None, place.split("/")):
        warm = re.fullmatch(r"t(\d[\d.e+-]*)", part)
        where += f" at temperature {warm[1]}" if warm else f" on prompts of {part}"
    return READABLE.get(bare, bare.replace("_", " ")) + where + end


def summary(results: Mapping[str, tuple[str, float]]) -> dict[str, str]:
    """Name for people -> value with its interval or error, shares in per cent."""
    rows: dict[str, str] = {}
    for name, (words, value) in results.items():
        share = name.rpartition("/")[2] in SHARES
        if name.endswith(("_low", "_high", "_se")):
            continue
        ends = [results[name + suffix][1] for suffix in ("_low", "_high") if name + suffix in results]
        text = _number(value, share)
        if len(ends) == 2:
            text += f" [{_number(ends[0], share)}, {_number(ends[1], share)}]"
        elif name + "_se" in results:
            text += f" ± {_number(results[name + '_se'][1], share)}"
        rows[words] = f"{text} %" if share else text
    return rows


def _number(value: float, share: bool) -> str:
    return f"{100 * value:.1f}" if share else f"{value:.4g}"


def judged(chosen: Model) -> str:
    """Who judged, on what; and what was not measured."""
    given = chosen.judged
    judge = given.get("judge.judge") or given.get("judge")
    limit = f", at most {given['max_new_tokens']} tokens an answer" if "max_new_tokens" in given else ""
    by = f"Judged by `{judge}`" if judge else "Judged"
    return (
        f"{by} on held-out prompts{limit}; in brackets are 95 % intervals over prompts. Nothing else was measured: no "
        "safety, no truthfulness, no other tasks."
    )


def table(rows: Mapping[str, Any], *titles: str) -> str:
    """A Markdown table of names and values, which break nothing: one line, no bars, cut when very long."""
    lines = [f"| {' | '.join(titles)} |", "|---|---|"]
    lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(lines)


def _cell(value: object) -> str:
    text = " ".join(str(value).split()).replace("|", "\\|")
    return text if len(text) <= 300 else text[:297] + "..."
