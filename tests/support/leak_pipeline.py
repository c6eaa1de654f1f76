"""A tiny whole pipeline through the real command, with secrets and a sentence planted, that ends well and badly.

MLflow and Prefect ask for passwords here; the judge's endpoint throws the key back that it is sent.
"""

import base64
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from flows.servers import mlflow_prefect, supervisor
from tests.support import commands, forked_servers, models

WORD = "zanzibar"
"""Stands in every prompt and answer, and the model says it."""

SECRETS = {
    "HF_TOKEN": "hf_planted0000000000000000000000011",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTED000000012",
    "AWS_SECRET_ACCESS_KEY": "planted/aws/key/0000000000000000000013",
    "MY_JUDGES_KEY": "sk-planted-judge-000014",
    "MLFLOW_TRACKING_URI": "planted-tracking-15",
    "PREFECT_API_AUTH_STRING": "planted-prefect-16",
}
"""Variable -> the secret that stands in it."""


@dataclass(frozen=True)
class Run:
    """How a command ended, what it said, and every file of its home then."""

    code: int
    said: str
    files: Mapping[Path, bytes] = field(repr=False)

    def holding(self, text: str) -> list[Path]:
        """The files that a text stands in."""
        return [path for path, content in self.files.items() if text.encode() in content]


class Echo(BaseHTTPRequestHandler):
    """Refuses every question, and quotes the key."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        body = f"bad request with {self.headers['authorization']}".encode()
        self.send_response(400)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def encoded(user: str, secret: str) -> str:
    """A password as it travels in a header."""
    return base64.b64encode(f"{user}:{secret}".encode()).decode()


@contextmanager
def whole(folder: Path) -> Iterator[Callable[..., Run]]:
    """Calls `alignflow run` over one home, whose databases stand already, with `--set` options; ENDPOINT_URL in them is
    the endpoint's address.
    """
    home = folder / "home"
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:  # for the set-up alone
            patch.setenv("ALIGNFLOW_HOME", str(home))
            patch.setattr(models, "WORDS", [*models.WORDS[:-1], WORD])
            config = write(folder)
            server = mlflow_prefect.mlflow_server(supervisor.port(None, 0, "port"))
            stack.enter_context(forked_servers.running(server))
        judge = stack.enter_context(ThreadingHTTPServer((supervisor.HOST, 0), Echo))
        threading.Thread(target=judge.serve_forever, daemon=True).start()
        stack.callback(judge.shutdown)
        tracked = server.url.replace("://", f"://someone:{SECRETS['MLFLOW_TRACKING_URI']}@")
        login = f"admin:{SECRETS['PREFECT_API_AUTH_STRING']}"
        environment = {**os.environ, **SECRETS, "ALIGNFLOW_HOME": str(home), "MLFLOW_TRACKING_URI": tracked}
        environment |= {"PREFECT_API_AUTH_STRING": login, "PREFECT_SERVER_API_AUTH_STRING": login}
        environment["NO_PROXY"] = supervisor.HOST
        url = f"http://{supervisor.HOST}:{judge.server_address[1]}/v1"
        yield lambda *options: call(config, home, [one.replace("ENDPOINT_URL", url) for one in options], environment)


def write(folder: Path) -> Path:
    """Model, rows and config; two of the rows are bad, and both say the word."""
    model = models.model_folder(folder / "model")
    rows = [f'{{"prompt": "{WORD} {a} {b} {WORD}", "response": "yes {WORD} {a}"}}' for a in "abcdefgh" for b in "abcd"]
    rows += [f'{{"prompt": "{WORD} bad {WORD}', f'{{"prompt": "{WORD} red", "response": "{WORD} nul {WORD}\\u0000"}}']
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    one_step = {"max_steps": 1, "batch_size": 8, "max_length": 48}
    config = {
        "name": "whole",
        "model": {"path": str(model)},
        "data": {"sft": {"path": str(folder / "rows.jsonl"), "kind": "sft", "eval_fraction": 0.5, "max_length": 48}},
        "sft": one_step,
        "generate": {"answers": 2, "max_new_tokens": 12, "judge": "sentiment", "noise": 1.0},
        "reward": None,
        "align": {"dpo": one_step},
        "evaluate": {"judge": "sentiment", "min_prompts": 4, "max_new_tokens": 12, "bootstrap": 100},
        "parallel": 2,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


def call(config: Path, home: Path, options: list[str], environment: Mapping[str, str]) -> Run:
    done = commands.alignflow("run", config, *(f"--set={option}" for option in options), **environment)
    files = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    return Run(done.returncode, done.stdout + done.stderr, files)
