"""What MLflow has to know of a model folder to load and serve it: `MLmodel`, and the files that this names.

Weights are not copied: MLflow reads those of the folder. A language model is MLflow's flavour `transformers` with the
task `llm/v1/chat`, a reward model a `python_function` whose code (`engine/scoring/served_reward.py`) travels with it.
No pickle is written.
"""

import json
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from schemas.model_folder import is_reward_model, read_json
from stages.tracking.mlflow_client import as_default, set_up_mlflow

_SERVED_REWARD = Path(__file__).resolve().parents[1] / "engine" / "scoring" / "served_reward.py"
"""Copied, never imported here: it needs transformers."""
FOR_MLFLOW = ("MLmodel", "input_example.json", "requirements.txt", "python_env.yaml", "components", "code")
"""What MLflow alone needs of a published model."""
_REQUIRED = ("mlflow", "torch", "transformers", "safetensors", "accelerate")
_TOKENIZER = ("tokenizer*", "chat_template*", "special_tokens_map.json", "vocab.*", "merges.txt", "added_tokens.json")
_HELLO = {"role": "user", "content": "Hello!"}


def describe(folder: Path) -> None:
    """Write `MLmodel` and what belongs to it into a model folder; nothing into another folder.

    `mlflow.transformers.load_model` and `mlflow models serve` then take the model, or `mlflow.pyfunc.load_model` the
    reward model, whose rows have the columns `prompt` (a text, or messages) and `answer`.
    """
    config = read_json(folder / "config.json")
    if not config.get("architectures") or not (folder / "tokenizer_config.json").exists():
        return
    from mlflow.models import Model  # late: see value_classes

    scores = is_reward_model(config)
    make = _reward_model if scores else _language_model
    flavours, signature, example = make(folder, config)
    (folder / "input_example.json").write_text(json.dumps(example, indent=2) + "\n")
    described = Model(
        signature=signature,
        saved_input_example_info={"artifact_path": "input_example.json", "type": "json_object"},
        metadata=None if scores else {"task": "llm/v1/chat"},
    )
    python = {"env": {"virtualenv": "python_env.yaml"}, "python_version": platform.python_version()}
    flavours["python_function"] |= python
    described.flavors = flavours
    versions = "".join(f"{name}=={metadata.version(name).partition('+')[0]}\n" for name in _REQUIRED)
    (folder / "requirements.txt").write_text(versions)
    (folder / "python_env.yaml").write_text(
        f"python: {platform.python_version()}\nbuild_dependencies: [pip]\ndependencies: [-r requirements.txt]\n"
    )
    values = described.to_dict()
    for by_chance in ("model_uuid", "utc_time_created"):  # equal models have equal digests
        del values[by_chance]
    (folder / "MLmodel").write_text(yaml.safe_dump(values))


def _language_model(folder: Path, config: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], Any, Any]:
    """Flavours, signature and an example of the input."""
    from mlflow.models import ModelSignature
    from mlflow.types.llm import CHAT_MODEL_INPUT_SCHEMA, CHAT_MODEL_OUTPUT_SCHEMA

    beside = folder / "components" / "tokenizer"  # where MLflow looks for it
    beside.mkdir(parents=True, exist_ok=True)
    for pattern in _TOKENIZER:
        for file in filter(Path.is_file, folder.glob(pattern)):
            shutil.copyfile(file, beside / file.name)
    own = {
        "code": None,
        "task": "text-generation",
        "inference_task": "llm/v1/chat",
        "instance_type": "TextGenerationPipeline",
        "model_binary": ".",
        "pipeline_model_type": config["architectures"][0],
        "components": ["tokenizer"],
        "tokenizer_type": "AutoTokenizer",
        "source_model_name": "",
        "transformers_version": metadata.version("transformers"),
    }
    flavours = {"transformers": own, "python_function": {"loader_module": "mlflow.transformers"}}
    signature = ModelSignature(inputs=CHAT_MODEL_INPUT_SCHEMA, outputs=CHAT_MODEL_OUTPUT_SCHEMA)
    return flavours, signature, {"messages": [_HELLO], "max_tokens": 32}


def _reward_model(folder: Path, config: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], Any, Any]:
    """Flavours, signature and an example of the input."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import AnyType

    (folder / "code").mkdir(exist_ok=True)
    shutil.copyfile(_SERVED_REWARD, folder / "code" / "alignflow_reward_model.py")
    flavours = {"python_function": {"loader_module": "alignflow_reward_model", "code": "code"}}
    inputs = Schema([ColSpec(AnyType(), "prompt"), ColSpec(DataType.string, "answer")])
    signature = ModelSignature(inputs=inputs, outputs=Schema([ColSpec(DataType.double, "score")]))
    return flavours, signature, {"dataframe_records": [{"prompt": [_HELLO], "answer": "Hello to you."}]}


def load_pipeline(uri: str) -> Any:
    """A published language model as MLflow's users and its server load it: transformers' pipeline.

    Raises:
        Exception: whatever MLflow and transformers raise.
    """
    set_up_mlflow()
    import mlflow.transformers  # late: it imports transformers, which no flow may

    with as_default():  # `mlflow.set_tracking_uri` would stay, in the environment too
        return mlflow.transformers.load_model(uri)
