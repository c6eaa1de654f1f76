"""The config of a pipeline run: one YAML file, checked whole before anything starts."""

import itertools
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, JsonValue, field_validator, model_validator
from pydantic_core import PydanticCustomError

from schemas import Grown, Strict, no_truth
from schemas.config.data import FewPrompts, Learn, PipelineData
from schemas.config.methods import Method, MethodConfig
from schemas.config.training import Half, Training
from schemas.promotion import PromoteConfig
from schemas.source import PathText, could_exist, template_file
from schemas.stage import STAGES
from schemas.text import short


class Scratch(Strict):
    """A small Llama with random weights and a tokenizer of the demo's words."""

    hidden_size: int = Field(default=96, ge=8)
    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=4, ge=1)
    intermediate_size: int = Field(default=256, ge=8)
    max_length: int = Field(default=128, ge=16)

    @model_validator(mode="after")
    def _heads_share_evenly(self) -> "Scratch":
        if self.hidden_size % (2 * self.heads):
            what = f"hidden_size is {self.hidden_size}, of which {self.heads} heads cannot take an even part each"
            raise ValueError(f"{what}. Fix: make it a multiple of {2 * self.heads}")
        return self


_NOT_FOR_TEMPLATES = {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"}
"""What each conversation, or the tokenizer, tells the template."""


class ModelConfig(Strict):
    """The base model: a local folder, a Hub name, a GGUF file, or `scratch`. Stage `base` publishes it."""

    path: PathText | None = None
    """Local folder, Hub name, GGUF file, or `package:NAME` for the GGUF inside an installed Python package."""
    revision: str | None = None
    """Commit of the Hub model, so that the same config means the same weights. Without one, or for a branch or tag, the
    Hub is asked once, and the commit is kept in the home, in `hub.json`."""
    scratch: Scratch | None = None
    chat_template: str | None = None
    """Jinja text or a file of it; default is the tokenizer's own, else the messages' text, one after the other."""
    template_args: dict[str, JsonValue] = {}
    """What the chat template is told: {enable_thinking: false}, for example. It is written into the template."""
    system_prompt: str | None = None
    """Put before prompts that bring no system message."""

    @field_validator("template_args")
    @classmethod
    def _names_of_variables(cls, arguments: dict[str, JsonValue]) -> dict[str, JsonValue]:
        for name in arguments:
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or name in _NOT_FOR_TEMPLATES:
                raise PydanticCustomError(
                    "no_variable",
                    "{name} cannot be set. Fix: give names that the template reads, such as enable_thinking",
                    {"name": short(name)},
                )
        return arguments

    @field_validator("chat_template")
    @classmethod
    def _could_be_a_file(cls, template: str | None) -> str | None:
        return template if template is None or template_file(template) is None else could_exist(template)


class Reads(Grown):
    """What a stage that trains nothing says of the models that it reads."""

    later: ClassVar[frozenset[str]] = frozenset({"frozen"})
    frozen: Half | None = None
    """Type in which the model, the reference and judging reward models are held and multiplied. None: from a billion
    parameters on as bf16 where their files are, else as fp32; multiplied in fp32."""


class RuleJudge(Strict):
    """A programmatic score: the demo's ground truth."""

    judge: Literal["rule"] = "rule"


class SentimentJudge(Strict):
    """vaderSentiment's compound score of the answer, in [-1, 1]."""

    judge: Literal["sentiment"] = "sentiment"


class RewardJudge(Strict):
    """A reward model: `gold` is trained by the pipeline on rows of its own, else a model folder."""

    judge: Literal["reward"] = "reward"
    model: PathText = "gold"


class EndpointJudge(Strict):
    """A model behind an OpenAI-compatible endpoint, asked which of two answers is better, in both orders."""

    judge: Literal["endpoint"] = "endpoint"
    url: str
    model: str = Field(min_length=1)
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; the key itself stands nowhere."""
    timeout: float = Field(default=60.0, gt=0)
    max_tokens: int = Field(default=1024, ge=16)
    """Of a reply: room to reason, and an end to rambling. One that is cut holds no verdict."""
    concurrency: int = Field(default=4, ge=1)


_JUDGES = {"rule": RuleJudge, "sentiment": SentimentJudge, "reward": RewardJudge, "endpoint": EndpointJudge}


def _choose_judge(value: Any) -> Any:
    if isinstance(value, str):
        value = {"judge": value}
    if isinstance(value, dict):
        name = value.get("judge")
        if not isinstance(name, str) or name not in _JUDGES:
            raise ValueError(f"judge {short(name)} is not known. Fix: use one of {', '.join(_JUDGES)}")
        return _JUDGES[name].model_validate(value)
    if not isinstance(value, tuple(_JUDGES.values())):
        names = ", ".join(_JUDGES)
        raise PydanticCustomError("no_judge", "must be one of {names}, or keys with values", {"names": names})
    return value


_Judge = RuleJudge | SentimentJudge | RewardJudge | EndpointJudge
# Prefect checks a deployed run by the schema: there a name alone is a judge too, where it needs no more.
_Form = _Judge | Literal["rule", "sentiment", "reward"]
Judge = Annotated[_Judge, BeforeValidator(_choose_judge, json_schema_input_type=_Form)]


class BaseParams(ModelConfig):
    """Stage `base`."""


class SFTConfig(Training):
    """Supervised fine-tuning."""

    learning_rate: float = Field(default=2e-5, gt=0)
    learn: Learn = "last"
    """`last`: the last answer of a conversation alone. `all`: every turn of the assistant with the token that ends it,
    but those of `weight: 0`. The loss is the mean over all learned tokens of a step in both."""


class RewardConfig(Training):
    """Reward model, from pairs or K-way rankings (Ouyang et al. 2022)."""

    learning_rate: float = Field(default=1e-5, gt=0)
    rows: Literal["train", "gold"] = "train"
    """Which part of the preference data to train on; the pipeline sets it."""
    margin: bool = False
    """Subtract the annotators' margin inside the sigmoid (Llama 2, eq. 2). Where a margin is above 3, the largest of
    Llama 2, all are scaled so that the largest of the training rows is 3: differences of scores from 0 to 100 would
    make the loss a linear one."""


class GenerateConfig(Reads):
    """Sample K answers per prompt from the SFT model and let a judge rank them."""

    answers: int = Field(default=4, ge=2)
    """Answers per prompt (K)."""
    max_new_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    judge: Judge | None = RuleJudge()
    """None exports the answers as JSONL for people to rank."""
    noise: float = Field(default=0.0, ge=0)
    """Temperature of Bradley-Terry label noise: answer i beats j with probability sigmoid((s_i - s_j) / noise)."""
    limit: int | None = Field(default=None, ge=1, lt=2**63)
    """Use only the first N prompts."""


class BaselinesConfig(Strict):
    """What the SFT model gives without alignment, to hold every method against."""

    temperatures: list[Annotated[float, BeforeValidator(no_truth), Field(gt=0, lt=1)]] = [0.7, 0.5, 0.3]
    """The SFT model at these: its distribution sharpened."""
    best_of: list[Annotated[int, BeforeValidator(no_truth), Field(ge=2)]] = [2, 4, 16]
    """The best of so many answers of the SFT model at temperature 1, by the reward model; none without one."""

    @field_validator("temperatures", "best_of")
    @classmethod
    def _ordered(cls, values: list[Any]) -> list[Any]:
        if len(set(values)) < len(values):
            raise ValueError("a value is given twice. Fix: give each once")
        return sorted(values, reverse=bool(values) and isinstance(values[0], float))


ENOUGH_PROMPTS = 100
"""Held-out prompts with which models can be told apart, where they differ much."""


class BaselinesParams(BaselinesConfig, Reads):
    """Stage `baselines`: the evaluation's conditions beside the baselines."""

    judge: Judge
    max_new_tokens: int
    samples_per_prompt: int
    limit: int | None
    min_prompts: int
    few_prompts: FewPrompts = "warn"


def _also_one_temperature(schema: dict[str, Any]) -> None:
    """Prefect checks a deployed run by the schema, before our code reads `temperature: 0.7`."""
    schema["properties"]["temperature"] = {"type": "number", "exclusiveMinimum": 0, "deprecated": True}


class EvaluateConfig(Reads):
    """Every model answers the same held-out prompts under the same seeds; the judge scores the answers."""

    model_config = ConfigDict(json_schema_extra=_also_one_temperature)

    judge: Judge = SentimentJudge()
    max_new_tokens: int = Field(default=64, ge=1)
    temperatures: list[Annotated[float, BeforeValidator(no_truth), Field(gt=0)]] = Field(
        default=[1.0, 0.3], min_length=1
    )
    """Every model answers at each of these, and is compared with others at the same one alone. The first one's numbers
    are `eval/win_rate_vs_sft` and so on, the others' `eval/t0.3/win_rate_vs_sft`. `temperature: 0.7` is `[0.7]`."""
    samples_per_prompt: int = Field(default=1, ge=1)
    """Answers to each prompt at each temperature."""
    limit: int | None = Field(default=None, ge=1, lt=2**63)
    """Use only the first N prompts."""
    min_prompts: int = Field(default=ENOUGH_PROMPTS, ge=1)
    """On fewer held-out prompts, differences are hard to tell: `few_prompts` says what happens then."""
    few_prompts: FewPrompts = "warn"
    """`refuse` stops the run before anything is trained. With `promote` it always is: its gate needs as many as
    `promote.gate.prompts_min`."""
    bootstrap: int = Field(default=2000, ge=100, le=100_000)
    """Resamples over prompts for 95 % intervals."""
    traces: int = Field(default=50, ge=0, le=10_000)
    """Answers of each model that are on MLflow's evaluation pages, as traces with what the judge says of them: those to
    the first prompts, at the first temperature. Changes no result, so that a finished evaluation keeps what it has."""
    baselines: BaselinesConfig | None = BaselinesConfig()
    """None: no method is held against what the SFT model gives without it. Neither is it where `temperatures` lacks 1:
    distances and baselines are those of temperature 1."""

    @model_validator(mode="before")
    @classmethod
    def _one_temperature(cls, value: Any) -> Any:
        """A config written for a single temperature."""
        if not isinstance(value, dict) or "temperature" not in value:
            return value
        if "temperatures" in value:
            raise ValueError("temperature and temperatures are both set. Fix: keep temperatures alone")
        return {k: v for k, v in value.items() if k != "temperature"} | {"temperatures": [value["temperature"]]}

    @field_validator("temperatures")
    @classmethod
    def _each_once(cls, temperatures: list[float]) -> list[float]:
        if len(set(temperatures)) < len(temperatures):
            raise ValueError("a temperature is given twice. Fix: give each once")
        return temperatures


class EvaluateParams(EvaluateConfig):
    """Stage `evaluate`."""

    part: Literal["eval", "test"] = "eval"
    """The prompts to answer: those held out, or the test part, which no comparison looks at."""
    gate: bool = False
    """Measure what only the gate asks for: relevance to the prompt, and wins over the SFT model made as sharp."""


def _name_methods(value: Any) -> Any:
    """`align: {dpo: {}}` means `align: {dpo: {method: dpo}}`."""
    if isinstance(value, dict):
        return {k: {"method": k, **(v or {})} if v is None or isinstance(v, dict) else v for k, v in value.items()}
    return value


def _known_stages(pools: dict[str, str]) -> dict[str, str]:
    for stage in pools:
        if stage not in STAGES:
            raise ValueError(f"{short(stage)} is not a stage. Fix: use {', '.join(STAGES)}")
    return pools


class PipelineConfig(Strict):
    """A whole run: base model, data, and the stages with their settings."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """Name of the MLflow experiment."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    model: ModelConfig
    data: PipelineData
    sft: SFTConfig | None = SFTConfig()
    """None: the base model is an SFT model already."""
    generate: GenerateConfig | None = None
    """When set, preference data is sampled from the SFT model."""
    reward: RewardConfig | None = RewardConfig()
    reward_model: PathText | None = None
    """Folder of a reward model of your own; stage `reward` is skipped."""
    gold: RewardConfig | None = None
    """Trains the gold reward model on the `gold_fraction` of the preference data; for `judge: reward`."""
    align: Annotated[dict[str, Method], BeforeValidator(_name_methods, json_schema_input_type=dict[str, Method | None])]
    """Name in tables and pictures -> method. `method` defaults to the name."""
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(min_length=1)] | None = None
    """Train every method under `align` once per seed: models `dpo-s0`, `dpo-s1`. SFT model, data, reward model and
    evaluation are the same for all. Only then do intervals cover another training, and say something of the method.
    None: one model each, by the seed of the run."""
    equal_tokens: bool = False
    """Every method under `align` trains on equally many tokens: the smallest number that any of them would use."""
    sweep: str | None = Field(default=None, max_length=250)
    """Name of a sweep, the tag `sweep` of its runs: the comparison then groups the models by method, beta and seed.
    `alignflow sweep` sets it."""
    evaluate: EvaluateConfig = EvaluateConfig()
    promote: PromoteConfig | None = None
    """For `alignflow retrain`; a plain run promotes nothing. None: all defaults."""
    log_text: bool = True
    """False keeps prompts and answers out of logs, MLflow's tables, reports, quarantine files and error messages. They
    then are only in the folders that training reads: `data` and `rows`."""
    devices: int = Field(default=1, ge=1)
    """Devices per training stage, on each of its nodes; more than one runs under torchrun."""
    nodes: int = Field(default=1, ge=1)
    """Machines per training stage. More than one need a place that starts them: pool `slurm` or `nodes`, or torchrun's
    own variables (PET_NNODES and so on)."""
    replicas: int = Field(default=1, ge=1)
    """With `sharding: full`, how many copies of a model the devices hold (HSDP): of 8 devices with 2 replicas each copy
    is on 4. Weights are gathered within a copy, gradients are summed over all; one copy per machine keeps gathers off
    the network. It divides `nodes` x `devices`, and changes results by rounding alone."""
    parallel: int = Field(default=1, ge=1)
    """Stages that may run side by side."""
    stage_minutes: float = Field(default=240.0, gt=0)
    """A stage that shows no sign of progress for so long is stopped, and started again as one that was preempted: it
    prints nothing, its work folder does not change, and it neither reads nor writes a megabyte a minute."""
    pools: Annotated[dict[str, str], AfterValidator(_known_stages)] = {}
    """Stage -> work pool whose workers run it: `{sft: gpu, align: gpu}`. What is not named runs where the flow runs."""

    @property
    def trained(self) -> dict[str, MethodConfig]:
        """Name of a model -> the method that trains it, with its seed: those of `align`, once per seed of `seeds`."""
        if self.seeds is None:
            return {name: self._seeded(method, self.seed) for name, method in self.align.items()}
        pairs = itertools.product(self.align.items(), self.seeds)
        return {seeded_name(name, seed): self._seeded(method, seed) for (name, method), seed in pairs}

    @staticmethod
    def _seeded(method: MethodConfig, seed: int) -> MethodConfig:
        return method if method.seed is not None else method.model_copy(update={"seed": seed})


def seeded_name(name: str, seed: int) -> str:
    """What the model of one of several seeds is called."""
    return f"{name}-s{seed}"
