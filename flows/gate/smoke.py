"""Whether a newly chosen champion answers as it will be served: loaded by MLflow, in a process of its own.

The gate looks at answers that our own sampler drew. What it cannot see is a folder that others cannot load, a chat
template that plain transformers reads otherwise, or an end that generation_config.json does not name.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from schemas.commands import SmokeCommand
from schemas.environment import PARENT
from schemas.promotion import Check, Decision, PromoteConfig
from schemas.stage import Artifact
from schemas.text import one_line
from stages import tracking

log = logging.getLogger("alignflow")

COMMAND = [sys.executable, "-P", "-m", "stages.commands.smoke"]


def checked(
    decision: Decision, config: PromoteConfig, model: Artifact, data: Artifact, max_new_tokens: int, run_id: str | None
) -> Decision:
    """The decision, with a check more where it promotes and the config asks for smoke: what fails rejects.

    data: the folder whose held-out prompts are asked. run_id: of stage `promote`, which is told the result.
    """
    if not (config.smoke and decision.promote):
        return decision
    began = time.monotonic()
    check = _answered(config, model, data, max_new_tokens)
    log.info("%s %s", "pass: " if check.passed else "FAIL: ", check)
    if run_id:
        tracking.client().set_tag(run_id, "smoke", f"{check}; {time.monotonic() - began:.0f} s")
    return decision.model_copy(update={"checks": [*decision.checks, check], "promote": check.passed})


def _answered(config: PromoteConfig, model: Artifact, data: Artifact, max_new_tokens: int) -> Check:
    """The share of answers that are something; none of it where nothing ends, or the process does not."""
    command = SmokeCommand(model=model.uri, data=tracking.fetch(data), max_new_tokens=max_new_tokens)
    with tempfile.TemporaryDirectory() as folder:
        request = Path(folder) / "request.json"
        request.write_text(command.model_dump_json())
        try:
            done = subprocess.run(
                [*COMMAND, str(request)],
                env={**os.environ, PARENT: str(os.getpid())},
                capture_output=True,
                text=True,
                timeout=60 * config.smoke_minutes,
            )
        except subprocess.TimeoutExpired:
            return _check(0.0, f"no answers within {config.smoke_minutes:g} minutes (promote.smoke_minutes)")
    if done.returncode != 0 or not done.stdout.strip():
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it said nothing")
        return _check(0.0, f"exit code {done.returncode}: {one_line(last, 300)}")
    counts = json.loads(done.stdout.splitlines()[-1])
    asked, empty, ended = counts["answers"], counts["empty"], counts["ended"]
    told = f"as MLflow serves it: {asked} answers, {empty} empty, {ended} ended by themselves"
    return _check((asked - empty) / asked if asked and ended else 0.0, told)


def _check(value: float, meaning: str) -> Check:
    return Check(metric="smoke", value=value, relation=">=", bound=1.0, meaning=meaning, passed=value >= 1.0)
