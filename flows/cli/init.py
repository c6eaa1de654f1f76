"""`alignflow init`: looks at data and model, and writes a config that fits them, each choice with its reason."""

import codecs
import csv
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.child import answer

if TYPE_CHECKING:
    from schemas.config.data import Kind

_MARKS: dict["Kind", tuple[set[str], set[str]]] = {
    "preference": ({"chosen"}, {"rejected"}),
    "ranking": ({"responses", "answers", "completions"}, {"order", "ranks", "scores", "comparisons"}),
    "feedback": ({"prompt", "messages", "response", "completion"}, {"label", "thumb", "thumbs"}),
    "sft": ({"prompt", "question", "instruction"}, {"response", "completion", "answer", "output"}),
}
"""Kind -> columns of which its rows have one each."""
_JUDGES = {
    "sentiment": "how cheerful answers are: for trying things out",
    "rule": "the demo's own rule",
    "reward": "a reward model of yours: --judge '{judge: reward, model: FOLDER}'",
    "endpoint": "a language model: --judge '{judge: endpoint, url: ..., model: ...}'",
}


def init(
    data: Annotated[Path, typer.Argument(help="Your rows: JSONL, JSONL.gz, Parquet or CSV.")],
    model: Annotated[str, typer.Option(help="Model folder, .gguf file, package:NAME, or a Hugging Face name.")],
    out: Annotated[Path, typer.Option(help="The config to write.")] = Path("my.yaml"),
    kind: Annotated[str | None, typer.Option(help="What a row is; by default told by its columns.")] = None,
    columns: Annotated[list[str], typer.Option(metavar="OURS=THEIRS", help="A column's name in the file.")] = [],
    judge: Annotated[str | None, typer.Option(help="Who judges answers; asked for on a terminal.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of a Hugging Face model.")] = None,
) -> None:
    """Look at your data and model, and write a config that fits them.

    Example:

    - alignflow init pairs.jsonl --model ./my-model --judge sentiment
    """
    from flows.planning import config_file
    from schemas.errors import refuse
    from schemas.text import show

    if out.exists():
        raise refuse("--out", out, "already exists.", "name another file")
    if not data.is_file():
        raise refuse("DATA", data, "there is no such file.", f"give its path as seen from {Path.cwd()}")
    named = {ours: theirs for ours, _, theirs in (pair.partition("=") for pair in columns)}
    chosen = kind or _kind_of(data, set(named))
    report = _looked_at(data, chosen, named, Path(model) if (Path(model) / "config.json").is_file() else None)

    def text(judge: str) -> str:
        """The config; all that a run would refuse before it starts is refused."""
        written = _config(out.stem, data, chosen, named, model, revision, judge, report)
        config_file.planned(config_file.parse(written))
        return written

    if judge is None:
        text("rule")  # before anybody is asked
        judge = _asked()
    out.write_text(text(judge), encoding="utf-8")
    show(f"wrote     {out}: {report['kept']} of {report['rows']} rows of kind {chosen} will be used")
    show(f"next      alignflow run {out} --dry-run")


def _kind_of(data: Path, mapped: set[str]) -> "Kind":
    """The kind that the columns of the first row tell. Raises StageError where they tell none."""
    from schemas.errors import refuse

    have = _columns(data) | mapped
    if not have:
        whole = "one JSON object per line, CSV with a header, or Parquet"
        fix = f"see that it is whole ({whole}), or say what a row is: --kind"
        raise refuse("DATA", data, "its first line is not a row.", fix)
    for kind, marks in _MARKS.items():
        if all(mark & have for mark in marks):
            return kind
    fix = f"name it: --kind {', '.join([*_MARKS, 'prompt'])}; or name its columns, as in --columns chosen=THEIRS"
    raise refuse("--kind", "missing", f"the columns ({', '.join(sorted(have)[:12])}) tell no kind of row.", fix)


def _columns(data: Path) -> set[str]:
    """The names of the columns in a file; none where it cannot be read, which the check of its rows will say."""
    import gzip

    if data.suffix == ".parquet":
        import polars as pl

        return set(pl.read_parquet_schema(data))
    with gzip.open(data, "rb") if data.suffix == ".gz" else data.open("rb") as lines:
        begin = lines.read(1 << 20)
    encoding = "utf-16" if begin[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    first = begin.decode(encoding, errors="replace").lstrip().partition("\n")[0]
    if data.suffix == ".csv":
        return set(next(csv.reader([first]), []))
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        return set()
    return set(row) if isinstance(row, dict) else set()


def _looked_at(data: Path, kind: str, columns: dict[str, str], model: Path | None) -> dict[str, Any]:
    """What `alignflow validate` reports of the rows, which are kept nowhere. Raises StageError where it refuses."""
    from pydantic import ValidationError

    from flows.planning.explain import explain
    from schemas.commands import ValidateCommand
    from schemas.errors import StageError

    values: dict[str, Any] = {"path": str(data), "kind": kind, "columns": columns, "model": model, "as_json": True}
    with tempfile.TemporaryDirectory() as folder:
        try:
            request = ValidateCommand.model_validate({**values, "out": folder, "max_length": 1 << 20})
        except ValidationError as error:
            raise StageError("\n".join(explain(one, values) for one in error.errors()), kind="config") from None
        said = answer("validate", request)
    if not said:
        raise StageError("the rows could not be looked at; see above.", status="failed", kind="validate")
    report: dict[str, Any] = json.loads(said)
    if report["error"]:
        why = str(report["error"]).replace(f" See {Path(folder) / 'quarantine.jsonl'}.", "")
        every = f"`alignflow validate {data} --kind {kind} --out DIR` keeps every bad row with its reason"
        raise StageError(f"{why} ({every})", kind="data")
    return report


def _asked() -> str:
    """Who judges the answers: asked on a terminal. Elsewhere somebody has to say it: it decides which model is best."""
    from schemas.errors import refuse
    from schemas.text import show

    if not sys.stdin.isatty():
        fix = f"name one of {', '.join(_JUDGES)}"
        raise refuse("--judge", "missing", "it decides which model is called best.", fix)
    for name, what in _JUDGES.items():
        show(f"  {name:10} {what}", sys.stderr)
    return typer.prompt("Who judges the answers?", err=True)


def _config(
    name: str,
    data: Path,
    kind: str,
    columns: dict[str, str],
    model: str,
    revision: str | None,
    judge: str,
    report: dict[str, Any],
) -> str:
    """The config as YAML, with a comment for each choice."""
    from flows.planning import memory
    from flows.planning.config_file import SCHEMA_LINE
    from schemas.architectures import positions
    from schemas.config import ENOUGH_PROMPTS, EvaluateConfig, ModelConfig
    from schemas.config.data import SLOTS
    from schemas.model_folder import read_json

    prompts = sum(kinds.get("prompt", 0) for kinds in report["parts"].values())
    # By the hash of a prompt about that share is held out: a fifth more than are needed.
    share = min(0.5, max(0.1, math.ceil(120 * ENOUGH_PROMPTS / max(1, prompts)) / 100))
    held_out = round(prompts * share)
    why = f"{held_out} of {prompts} prompts, to evaluate on"
    if held_out < ENOUGH_PROMPTS:
        why += f"; fewer than {ENOUGH_PROMPTS}: differences will be hard to tell"
    rows = max(1, prompts - held_out)
    batch, epochs = (8, 3) if rows < 500 else (16, 2) if rows < 5000 else (32, 1)
    length = _length(report)
    sizes = memory.model_sizes(ModelConfig(path=model, revision=revision))
    size, rates = _rates(None if sizes is None else sizes.parameters)
    slot = SLOTS.get(kind, kind)
    more = f", max_length: {length}" if length else ""
    lines = [
        SCHEMA_LINE,
        f"name: {json.dumps(name)}",
        "seed: 0",
        "model:",
        f"  path: {json.dumps(model)}" + (f"\n  revision: {json.dumps(revision)}" if revision else ""),
        "data:",
        f"  {slot}:",
        f"    path: {json.dumps(str(data))}",
        f"    kind: {kind}",
        *([f"    columns: {json.dumps(columns)}"] if columns else []),
        f"    eval_fraction: {share:g}   # {why}",
        *([f"    max_length: {length}   # tokens, for the longest row"] if length else []),
        f"# {size} There are about {rows} rows to train on.",
    ]
    own = {"sft": kind != "feedback", "reward": slot == "preference"}
    passes = f", epochs: {epochs}, batch_size: {batch}"
    lines += [f"{stage}: {{{rates[stage]}{passes}{more}}}" if made else f"{stage}: null" for stage, made in own.items()]
    methods = {"preference": ["dpo", "kto", "ppo"], "feedback": ["kto"]}.get(slot, [])
    lines += ["align:" if methods else "align: {}   # SFT alone: methods need preferences or thumbs"]
    room, usual = positions(read_json(Path(model) / "config.json")), EvaluateConfig().max_new_tokens
    answers = f"max_new_tokens: {room // 2}" if room is not None and room < 2 * usual else ""
    for method in methods:
        short = f", {answers}" if answers else ""
        lines.append(f"  {method}: {{{rates['align']}{short if method == 'ppo' else passes}{more}}}")
    lines += ["evaluate:", "  # Decides which model is called best: see that it measures what you want."]
    lines += [f"  judge: {judge}", *([f"  {answers}"] if answers else [])]
    return "\n".join(lines) + "\n"


def _length(report: dict[str, Any]) -> int | None:
    """`max_length` for the longest row, where its tokens were counted: a multiple of 64."""
    lengths = report.get("lengths")
    if not lengths or lengths["unit"] != "tokens":
        return None
    return max(64, 64 * math.ceil(lengths["longest"] / 64))


def _rates(parameters: int | None) -> tuple[str, dict[str, str]]:
    """What is said of the model's size, and the settings by stage: small models learn at higher rates, and large ones
    by adapters, at their default rates.
    """
    if parameters is None or parameters >= 300e6:
        known = "not known here" if parameters is None else f"{parameters / 1e9:.1f} billion parameters"
        return f"The model: {known}. It is trained by adapters.", dict.fromkeys(("sft", "reward", "align"), "lora: {}")
    known = f"The model: {parameters / 1e6:.3g} million parameters, all of which are trained."
    rates = ("5e-4", "3e-4", "1e-4") if parameters < 50e6 else ("1e-4", "1e-4", "2e-5")
    stages = ("sft", "reward", "align")
    return known, {stage: f"learning_rate: {rate}" for stage, rate in zip(stages, rates, strict=True)}
