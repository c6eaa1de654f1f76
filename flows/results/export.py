"""`alignflow export`: a model as a folder that plain transformers loads, with a model card."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from flows.results.lookup import Model, model
from schemas.errors import refuse
from schemas.model_folder import is_reward_model, read_json
from stages import tracking
from stages.runtime import workspace

LANGUAGE_MODEL = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
messages = [{{"role": "user", "content": "Hello!"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1]:]
print(tokenizer.decode(answer, skip_special_tokens=True))
"""

REWARD_MODEL = """from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
prompt = [{{"role": "user", "content": "Hello!"}}]
text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
text += {lead}"Hello to you." + {end!r}
print(model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits)
"""


def export(what: str, out: Path) -> Path:
    """Write the model to the folder `out`, which must not hold anything yet; returns it.

    Raises:
        StageError: there is no such model, or `out` is taken or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise refuse("--out", out, "already exists.", "name a new folder", kind="export")
    chosen = model(what)
    try:
        write(chosen, out)
    except OSError as error:
        fix = "name a place where you may write, with room for the model"
        raise refuse("--out", out, f"cannot be written: {error}.", fix, kind="export") from error
    return out


def write(chosen: Model, out: Path) -> None:
    """Put the model's files and card into a new folder; under its name it is whole at once."""
    beside = out.with_name(f".{out.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.parent.mkdir(parents=True, exist_ok=True)
    left = tracking.FOR_MLFLOW if (chosen.folder / "MLmodel").exists() else ()
    # As new files, under the user's umask: those of the home are for nobody else.
    for file in filter(Path.is_file, chosen.folder.rglob("*")):
        inner = file.relative_to(chosen.folder)
        if inner.parts[0] in left:
            continue
        copy = beside / inner
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    card(chosen, out).save(beside / "README.md")
    workspace.sync_all(beside)
    if out.exists():
        out.rmdir()
    beside.replace(out)
    workspace.sync(out.parent)


def card(chosen: Model, out: Path) -> ModelCard:
    """The model card: how to load it, what it was trained with, and how it did."""
    scores = is_reward_model(json.loads((chosen.folder / "config.json").read_text()))
    # The text before an answer that the generation prompt leaves out, and the one that ends it, at which a reward model
    # gives its score: as they were saved, else nothing and the tokenizer's end.
    around = read_json(chosen.folder / "config.json").get("alignflow_answer") or {}
    if "end" in around:
        lead, end = str(around.get("lead") or ""), str(around["end"])
    else:
        token = read_json(chosen.folder / "tokenizer_config.json").get("eos_token")
        lead, end = "", token["content"] if isinstance(token, dict) else token or ""
    before = f"{lead!r} + " if lead else ""
    code = (REWARD_MODEL if scores else LANGUAGE_MODEL).format(folder=out.name, lead=before, end=end)
    metrics = {name: value for name, value in sorted((chosen.metrics or {}).items()) if name.startswith("eval/")}
    task = "text-classification" if scores else "text-generation"
    result = partial(EvalResult, task, dataset_type="prompts", dataset_name="held-out prompts")
    metadata = ModelCardData(
        library_name="transformers",
        tags=["alignflow"],
        pipeline_tag=task,
        model_name=chosen.name if metrics else None,
        eval_results=[result(metric_type=name, metric_value=value) for name, value in metrics.items()] or None,
    )
    parts = [f"---\n{metadata.to_yaml()}\n---", f"# {chosen.name}", origin(chosen), f"## Use\n\n```python\n{code}```"]
    if metrics:
        rows = {name: f"{value:.4g}" for name, value in metrics.items()}
        parts.append("## Evaluation\n\nOn held-out prompts.\n\n" + table(rows, "metric", "value"))
    if chosen.request is not None:
        settings = {name: json.dumps(value) for name, value in chosen.request.params.items()}
        parts.append("## Training\n\n" + table(settings | {"seed": chosen.request.seed}, "setting", "value"))
    return ModelCard("\n\n".join(parts) + "\n")


def origin(chosen: Model) -> str:
    """One paragraph: which stage made the model, from which data, under which run."""
    if chosen.request is None or chosen.tags is None:
        return "A model folder from outside alignflow's runs."
    tags = chosen.tags
    method = tags.get("method", chosen.request.stage)
    lines = [f"Made by alignflow, stage `{chosen.request.stage}`, method `{method}`. Weights in full, adapters merged."]
    lines += [f"- {title}: `{tags[name]}`" for title, name in ORIGIN.items() if name in tags]
    if (chosen.folder / "adapter" / "adapter_config.json").is_file():
        base = chosen.request.inputs["model"]
        lines.append(
            f"- `adapter/` is the LoRA adapter alone. Its base is `{base.uri}` (sha256 `{base.sha256[:12]}`, which "
            "stands in the adapter's `base_model_name_or_path`): export that, load it with the class above, and put "
            "the adapter on with `PeftModel.from_pretrained(model, folder)`; `AutoPeftModel` finds no base by a digest"
        )
    return lines[0] + "\n\n" + "\n".join(lines[1:])


ORIGIN = {"data version": "data.version", "pipeline run": "pipeline.run", "stage key": "stage.key"}


def table(rows: dict[str, Any], *titles: str) -> str:
    """A Markdown table of names and values, which break nothing: one line, no bars, cut when very long."""
    lines = [f"| {' | '.join(titles)} |", "|---|---|"]
    for name, value in rows.items():
        text = " ".join(str(value).split()).replace("|", "\\|")
        lines.append(f"| {name} | {text if len(text) <= 300 else text[:297] + '...'} |")
    return "\n".join(lines)
