"""Stage `base`: the base model as a plain transformers folder, wherever it comes from.

A local folder, a Hub name with its commit, a GGUF file (alone or inside an installed Python package), or a small Llama
with random weights. Chat template and system prompt are written into the tokenizer, so that all later stages, and plain
transformers, need nothing but the folder. No pickle is read and no code from a model folder is run.
"""

import importlib.util
import logging
import re
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from schemas.config import BaseParams, Scratch
from schemas.errors import StageError, refuse
from schemas.model_folder import is_reward_model, why_unusable
from schemas.source import File, Hub, Package, is_commit, model_source, read_template, template_file
from schemas.text import one_line
from stages.engine import demo
from stages.engine.data.codec import Codec
from stages.engine.data.marks import load_tokenizer
from stages.engine.data.template import one_template, options, with_arguments, with_system_prompt
from stages.engine.models.loading import check_folder, check_parts, load_whole, quiet, read_config
from stages.engine.sampling import why_not_sampled
from stages.runtime.context import StageContext
from stages.runtime.limits import limited

log = logging.getLogger("alignflow")

# What a model is made of. Everything else in a folder (pickles, code, training states) stays behind.
MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
GGUF_SECONDS = 120.0
GGUF_BYTES = 8 << 30
"""What reading a GGUF file's head may take, beside the file itself. A large vocabulary takes seconds."""
_GREETING = [{"role": "user", "content": "hello"}]
FIELD = "model.path"
_refuse = partial(refuse, FIELD, kind="model")


def run(context: StageContext) -> dict[str, float]:
    """Publish `model`. Returns the number of its parameters."""
    request = context.request
    params = BaseParams.model_validate(request.params)
    if context.has("source"):
        params = params.model_copy(update={"path": str(context.input("source"))})
    folder = context.work / "model"
    shutil.rmtree(folder, ignore_errors=True)
    count = build(params, request.seed, folder)
    context.publish("model", folder, model=True)
    return {"model/parameters": float(count)}


def build(params: BaseParams, seed: int, folder: Path) -> int:
    """Write the base model to `folder`; returns the number of its parameters. Raises StageError with a fix."""
    if (params.scratch is None) == (params.path is None):
        message = "a base model is either a path or made from scratch"
        fix = "set exactly one of model.path and model.scratch"
        raise refuse("model.path", params.path, message, fix)
    if params.scratch is not None:
        tokenizer = demo.tokenizer()
        model: PreTrainedModel = from_scratch(params.scratch, tokenizer, seed)
    else:
        source = find(str(params.path), params.revision)
        if source.is_dir():
            check_fit(source)
        if source.is_file():
            model, tokenizer = read_gguf(source)
        elif is_reward_model(read_config(source, FIELD)):
            return copy_reward_model(source, folder)
        else:
            check_folder(source, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, FIELD)
            model = load_whole(AutoModelForCausalLM, source, field=FIELD, dtype="auto")
            tokenizer = read_tokenizer(source)
    if params.scratch is None and (reason := why_not_sampled(model)):
        fix = "use a decoder-only model with a key-value cache (Llama, Mistral, Qwen, Gemma, GPT-2 and the like)"
        raise _refuse(params.path, f"answers cannot be sampled from this model: {reason}", fix)
    write(model, set_template(tokenizer, params), folder)
    return int(model.num_parameters())


def find(path: str, revision: str | None) -> Path:
    """The local folder or GGUF file that `model.path` means."""
    match model_source(path):
        case Package() as package:
            return find_in_package(package)
        case Hub(name):
            return download(name, revision)
        case File(place) if place.is_dir() or (place.is_file() and place.suffix == ".gguf"):
            return place.absolute()
        case File(place) if place.is_file():
            raise _refuse(path, "the file is not a GGUF file", "give a model folder or a file that ends in .gguf")
        case _:
            fix = "check the path, or give a Hub name as owner/name"
            raise _refuse(path, "there is no such model folder or file", fix)


def find_in_package(package: Package) -> Path:
    """The one GGUF file of an installed package."""
    files = package.ggufs()
    if files is None:
        raise _refuse(str(package), "the package is not installed", f"pip install {package.module.replace('_', '-')}")
    if len(files) != 1:
        raise _refuse(str(package), f"the package holds {len(files)} GGUF files, not one", "give the file's path")
    return files[0]


def download(name: str, revision: str | None) -> Path:
    """A Hub model at one commit, from the local cache where it is there."""
    # Imported here: only a Hub name needs them.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if not is_commit(revision):
        message = f"{name} is not a local folder, and as a name on the Hub it needs a commit"
        fix = f"set it to the 40 hex digits of a commit, listed at https://huggingface.co/{name}/commits/main"
        raise refuse("model.revision", revision, message, fix, kind="missing_revision")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=MODEL_FILES))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        fix = "connect to the network (and unset HF_HUB_OFFLINE), or download it elsewhere and give the folder"
        raise _refuse(name, "the Hub cannot be reached and the model is not in the local cache", fix) from error
    except (HfHubHTTPError, HFValidationError) as error:
        first_line = str(error).strip().splitlines()[0]
        fix = "check name and revision; for a gated model set HF_TOKEN"
        raise _refuse(name, f"the Hub does not give the model: {first_line}", fix) from error


def check_fit(folder: Path) -> None:
    """Refuse a folder whose parts do not belong together, before its weights are read."""
    if problem := why_unusable(folder, scorer=is_reward_model(read_config(folder, FIELD))):
        raise _refuse(folder, problem[0], problem[1])


def from_scratch(scratch: Scratch, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A small Llama with random weights that are a function of `seed`."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=scratch.hidden_size,
        intermediate_size=scratch.intermediate_size,
        num_hidden_layers=scratch.layers,
        num_attention_heads=scratch.heads,
        max_position_embeddings=scratch.max_length,
        initializer_range=scratch.hidden_size**-0.5,  # the usual 0.02 is for wide models; small ones then learn slowly
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=Codec(tokenizer).end_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def read_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A GGUF file's model, its weights unpacked to float32, and its tokenizer."""
    if importlib.util.find_spec("gguf") is None:
        raise _refuse(file, "reading a GGUF file needs the package gguf", "pip install gguf")
    from gguf import GGUFReader  # an extra

    with quiet():
        try:
            # An array that the head announces and the file does not hold is read for ever.
            fields = limited(lambda: GGUFReader(str(file)), GGUF_SECONDS, GGUF_BYTES + file.stat().st_size).fields
            wanted = (field for name, field in fields.items() if name.endswith((".block_count", ".expert_count")))
            head = {field.name.rpartition(".")[2]: int(field.parts[field.data[0]][0]) for field in wanted}
            check_parts(head, file, FIELD)
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False)
        except (StageError, MemoryError):
            raise
        except Exception as error:  # a broken head: of struct, NumPy, UTF-8, and what transformers makes of it
            why = f"the GGUF file cannot be read: {one_line(error, 300)}"
            raise _refuse(file, why, "check that it is whole") from error
    model = load_whole(AutoModelForCausalLM, file.parent, field=FIELD, gguf_file=file.name, dtype=torch.float32)
    # What is saved is no longer quantized, and its config must not claim it.
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if name in vars(model):
            delattr(model, name)
    vars(model.config).pop("quantization_config", None)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id) and "<|endoftext|>" in tokenizer.added_tokens_encoder:
        tokenizer.pad_token = "<|endoftext|>"
        model.config.pad_token_id = None
    return model, tokenizer


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer; one without tokenizer.json is converted where transformers can."""
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # transformers raises all sorts here; each means the same to the user
        fix = "put the model's tokenizer.json into the folder"
        raise _refuse(folder, f"the folder has no tokenizer that can be read: {error}", fix) from error
    if not tokenizer.is_fast:
        raise _refuse(folder, "the tokenizer has no tokenizer.json", "put one into the folder")
    return tokenizer


def copy_reward_model(source: Path, folder: Path) -> int:
    """A reward model of the user's own, checked and copied as it is: its scores belong to its own template."""
    check_folder(source, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, FIELD)
    load_tokenizer(source)
    model = load_whole(AutoModelForSequenceClassification, source, field=FIELD, dtype="auto")
    folder.mkdir(parents=True)
    for pattern in MODEL_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    return int(model.num_parameters())


def set_template(tokenizer: PreTrainedTokenizerBase, params: BaseParams) -> Codec:
    """Write the config's chat template and system prompt into the tokenizer, and try them."""
    if isinstance(tokenizer.chat_template, dict):  # some models bring several, for tools and the like
        tokenizer.chat_template = one_template(tokenizer.chat_template)
    if params.chat_template is not None:
        file = template_file(params.chat_template)  # else it is the template itself
        if file is not None and not file.is_file():
            message = "this is neither a Jinja template nor an existing file"
            fix = "give the path of a file with a Jinja template, or the template's text"
            raise refuse("model.chat_template", params.chat_template, message, fix, kind="chat_template")
        tokenizer.chat_template = params.chat_template if file is None else read_template(file)
    codec = _try(tokenizer, params.chat_template)
    if params.template_args:
        tokenizer.chat_template = with_template_args(str(tokenizer.chat_template), params.template_args)
        codec = _try(tokenizer, params.chat_template)
    if params.system_prompt is None:
        return codec
    tokenizer.chat_template = with_system_prompt(str(tokenizer.chat_template), params.system_prompt)
    if params.system_prompt.strip() not in _try(tokenizer, params.chat_template).render(_GREETING):
        message = "the chat template leaves the system prompt out"
        fix = "set model.chat_template to one that writes system messages"
        raise refuse("model.system_prompt", params.system_prompt, message, fix, kind="chat_template")
    return Codec(tokenizer)


def with_template_args(template: str, arguments: Mapping[str, Any]) -> str:
    """The template with these set. Raises StageError for one that it does not read: it would change nothing."""
    for name, value in arguments.items():
        if not re.search(rf"\b{name}\b", template):
            names = ", ".join(options(template)) or "none by `is defined`"
            fix = f"take it out, or use a name that the template reads ({names})"
            message = "the chat template does not read it"
            raise refuse(f"model.template_args.{name}", value, message, fix, kind="chat_template")
    return with_arguments(template, arguments)


def write(model: PreTrainedModel, codec: Codec, folder: Path) -> None:
    """Save model and tokenizer, with end and padding set as the codec has them."""
    rows = next(model.get_input_embeddings().parameters()).shape[0]
    if len(codec.tokenizer) > rows:
        what = f"the tokenizer has {len(codec.tokenizer)} tokens, the model only {rows}"
        raise _refuse(folder, what, "give the tokenizer that belongs to the model")
    vars(model.config).pop("auto_map", None)  # code that is never executed
    if model.config.pad_token_id is None:
        model.config.pad_token_id = codec.pad_id
    model.generation_config = generation_config(model, codec)
    with quiet():
        model.save_pretrained(folder)
    codec.save(folder)


def generation_config(model: PreTrainedModel, codec: Codec) -> GenerationConfig:
    """The model's own, with the codec's ends and padding; fresh where its own contradicts itself."""
    config = model.generation_config or GenerationConfig()
    try:
        config.validate(strict=True)
    except ValueError:  # transformers would refuse to save it
        config = GenerationConfig(do_sample=True)
    own = config.eos_token_id
    listed = own if isinstance(own, list) else [] if own is None else [own]
    # A folder whose generation_config.json says so was refused; config.json may hold the default of its class.
    if words := [i for i in listed if codec.is_word(i)]:
        spelled = codec.tokenizer.convert_ids_to_tokens(words)
        log.warning("eos_token_id %s of the model's config is left out: an ordinary word, %s", words, spelled)
    ends = list(dict.fromkeys([codec.end_id, *(i for i in listed if i not in words)]))
    log.info("an answer ends with %r; sampling stops at %s", codec.end, codec.tokenizer.convert_ids_to_tokens(ends))
    config.eos_token_id = ends if len(ends) > 1 else ends[0]
    config.pad_token_id = codec.pad_id
    return config


def _try(tokenizer: PreTrainedTokenizerBase, template: str | None) -> Codec:
    """The codec, once its template has rendered a conversation."""
    try:
        codec = Codec(tokenizer)
        codec.prompt(_GREETING)
    except (TemplateError, TypeError, ValueError) as error:
        message, value = f"the chat template fails: {error}", template or "the model's own"
        fix = "fix the template, or leave it out to use the model's own" if template else "set a template that works"
        raise refuse("model.chat_template", value, message, fix, kind="chat_template") from error
    return codec
