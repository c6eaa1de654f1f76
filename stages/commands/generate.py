"""`alignflow generate`: a model writes several answers to each prompt of a file, without MLflow."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from schemas.config import GenerateConfig, ValidateParams
from schemas.errors import EXIT_CODES, StageError, refuse
from stages.engine.data.codec import Codec
from stages.engine.models.loading import load_policy
from stages.engine.scoring.judges import Judge, RewardJudge, RuleJudge, SentimentJudge
from stages.generate import HOW_TO_RANK, Messages, Progress, answer, label, score, summary, write
from stages.validate import formats, readers
from stages.validate.cells import BadRow


def parser() -> argparse.ArgumentParser:
    text = "Sample answers to prompts from a model, for a judge or for people to rank."
    made = argparse.ArgumentParser("alignflow generate", description=text)
    made.add_argument("--model", type=Path, required=True, help="a model folder")
    made.add_argument("--prompts", required=True, help="a file with prompts: JSONL, JSONL.gz, JSON, Parquet or CSV")
    made.add_argument("--answers", type=int, default=4, help="answers per prompt")
    made.add_argument("--out", type=Path, required=True, help="the JSONL file to write; must not exist yet")
    made.add_argument("--max-new-tokens", type=int, default=64, help="tokens of an answer at most")
    made.add_argument("--temperature", type=float, default=1.0)
    made.add_argument("--limit", type=int, default=None, help="use only the first N prompts")
    made.add_argument("--seed", type=int, default=0)
    judges = "none (people rank), rule, sentiment, or a reward model's folder"
    made.add_argument("--judge", default="none", help=judges)
    made.add_argument("--noise", type=float, default=0.0, help="temperature of Bradley-Terry label noise")
    made.add_argument("--json", action="store_true", help="print the counts as one JSON object")
    return made


def judge_named(name: str) -> Judge | None:
    """The judge of the command line."""
    if name == "none":
        return None
    if name in ("rule", "sentiment"):
        return RuleJudge() if name == "rule" else SentimentJudge("--judge")
    return RewardJudge(Path(name))


def prompts_of(path: str, limit: int | None) -> list[Messages]:
    """The prompts of a user's file, as messages, each once. Raises StageError at the first row that holds none."""
    found: dict[str, Messages] = {}
    for number, record in enumerate(readers.records(ValidateParams(path=path, kind="prompt", limit=limit))):
        try:
            if record.row is None:
                raise BadRow("row", record.reason)
            turns = formats.parse("prompt", record.row)["prompt"]
        except BadRow as problem:
            fix = "`alignflow validate --kind prompt` cleans a file"
            message = f"row {number} holds no prompt: {problem}"
            raise refuse("--prompts", path, message, fix, kind="bad_data") from problem
        prompt = [{"role": role, "content": content} for role, content in turns]
        found.setdefault(json.dumps(prompt), prompt)
    if not found:
        raise refuse("--prompts", path, "the file holds no prompts", None, kind="empty_file")
    return list(found.values())


def on_stderr() -> Progress:
    """Progress: on a terminal one line that counts up, elsewhere a line every few seconds."""
    terminal = sys.stderr.isatty()
    told = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if done == total or now - told >= (0.1 if terminal else 10):
            told = now
            start, end = ("\r", "\n" if done == total else "") if terminal else ("", "\n")
            print(f"{start}answers {done}/{total}", end=end, file=sys.stderr, flush=True)

    return progress


def alone(arguments: argparse.Namespace) -> dict[str, float]:
    """Answer a file's prompts and write the rows; returns the counts. Overwrites nothing: raises StageError instead."""
    names = ("answers", "max_new_tokens", "temperature", "noise", "limit")
    config = GenerateConfig(judge=None, **{name: getattr(arguments, name) for name in names})
    out: Path = arguments.out
    if out.exists():
        fix = "name another file, or move this one away: it may hold people's rankings"
        raise refuse("--out", out, "the file exists already.", fix, kind="file_exists")
    began = time.monotonic()
    judge = judge_named(arguments.judge)
    prompts = prompts_of(arguments.prompts, config.limit)
    policy = load_policy(arguments.model, trainable=False)
    items, tokens = answer(policy, Codec.load(arguments.model), prompts, config, arguments.seed, on_stderr())
    items = score(items, judge)
    write([label(item, config.noise, arguments.seed) for item in items], out)
    if judge is None:
        out.with_suffix(".README.txt").write_text(HOW_TO_RANK.replace("rows.jsonl", out.name))
    return summary(items, tokens, time.monotonic() - began)


def told(arguments: argparse.Namespace, counts: dict[str, float]) -> str:
    """What was written, and what comes next."""
    made = f"{counts['generate/answers']:.0f} answers to {counts['generate/prompts']:.0f} prompts in {arguments.out}"
    if arguments.judge == "none":
        return f"{made}; fill in `order` on every line, best first"
    return f"{made}, {'compared' if arguments.noise else 'scored'} by {arguments.judge}"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what was written, or with --json the counts; returns the exit code."""
    arguments = parser().parse_args(argv)
    try:
        counts = alone(arguments)
        print(json.dumps(counts) if arguments.json else told(arguments, counts))
    except StageError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODES[error.status]
    except ValidationError as error:
        problems = [f"--{'-'.join(str(part) for part in e['loc'])} {e['input']}: {e['msg']}" for e in error.errors()]
        print(f"error: {'; '.join(problems).replace('_', '-')}", file=sys.stderr)
        return EXIT_CODES["refused"]
    return 0


if __name__ == "__main__":
    sys.exit(main())
