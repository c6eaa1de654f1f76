"""Talk to a model in the terminal, or to two side by side.

Reads one message per line; /reset forgets the conversation, /quit (or the end of input) leaves. Each model has its own
history.
"""

import io
import json
import shutil
import sys
import textwrap
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TextIO

from jinja2 import TemplateError

from schemas.commands import ChatCommand
from schemas.errors import StageError, refuse
from schemas.text import one_line, show, visible
from stages import tracking
from stages.commands.entry import begin, refused
from stages.engine.data.codec import Codec
from stages.engine.models.loading import load_policy
from stages.engine.models.policy import Policy, context_length
from stages.engine.sampling import sample, seed_of

HELP = "One message per line. /reset forgets the conversation, /quit leaves."


@dataclass
class Talker:
    """A model and what was said with it so far."""

    name: str
    policy: Policy
    codec: Codec
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def answer(self, text: str, seed: int, command: ChatCommand) -> str:
        """The model's answer, which joins the history. Old turns are dropped when they no longer fit."""
        limit = context_length(self.policy.plain)
        max_new_tokens = command.max_new_tokens if limit is None else min(command.max_new_tokens, limit // 2)
        self.messages.append({"role": "user", "content": text})
        try:
            prompt = self._fitting_prompt(None if limit is None else limit - max_new_tokens)
        except (StageError, TemplateError) as error:
            self.messages.pop()
            if isinstance(error, StageError):
                raise
            fix = "/reset, or leave out --system"
            raise StageError(f"the chat template refuses it: {error}", kind="chat_template", fix=fix) from error
        ids = sample(
            self.policy,
            [prompt],
            max_new_tokens=max_new_tokens,
            temperature=command.temperature,
            seeds=[seed],
            stop_ids=self.codec.stop_ids,
            pad_id=self.codec.pad_id,
        )
        answer = self.codec.text(ids[0])
        self.messages.append({"role": "assistant", "content": answer})
        return answer

    def _fitting_prompt(self, room: int | None) -> list[int]:
        """Ids of the conversation; its oldest turns are forgotten until it has at most `room` tokens."""
        first = 0 if self.system is None else 1
        prompt = self.codec.prompt(self.messages)
        while room is not None and len(prompt) > room:
            if len(self.messages) - first < 3:
                message = f"the message has {len(prompt)} tokens; {room} fit"
                raise StageError(message, kind="too_long", fix="write a shorter message, or lower --max-new-tokens")
            del self.messages[first : first + 2]  # the oldest question and its answer
            prompt = self.codec.prompt(self.messages)
        return prompt


def load(uri: str, system: str | None, name: str | None = None) -> Talker:
    """The model that a person names; `name` is what to call it. Raises StageError when there is none."""
    folder = tracking.locate(uri)
    policy = load_policy(folder, trainable=False)
    policy.eval()
    codec = Codec.load(folder)
    if system is not None:
        try:
            codec.prompt([{"role": "system", "content": system}, {"role": "user", "content": "hello"}])
        except TemplateError as error:
            message, fix = f"the chat template of {one_line(uri)} refuses it: {error}.", "leave it out"
            raise refuse("--system", system, message, fix, kind="chat_template") from error
        if not codec.writes_system():
            message, fix = f"the chat template of {one_line(uri)} leaves it out.", "say it in the first message instead"
            raise refuse("--system", system, message, fix, kind="chat_template")
    return Talker(name or uri, policy, codec, system)


def converse(talkers: list[Talker], lines: TextIO, out: TextIO, command: ChatCommand) -> None:
    """Answer line by line until /quit or the end of input. As JSON: answers on `out`, what else is said on stderr."""
    shows_prompt = lines.isatty() and not command.as_json
    aside = sys.stderr if command.as_json else out
    turn = 0
    while True:
        if shows_prompt:
            print("> ", end="", flush=True, file=out)
        line = lines.readline()
        text = line.strip()
        if any("\ud800" <= character <= "\udfff" for character in text):
            problem = "this line is not UTF-8 text and was not sent. Fix: set the terminal to UTF-8"
            show(json.dumps({"message": None, "problem": problem}) if command.as_json else f"({problem})", out)
            continue
        if not line or text == "/quit":
            return
        if text == "/reset":
            for talker in talkers:
                talker.reset()
            show("(forgotten)", aside)
        elif text.startswith("/"):
            show(HELP, aside)
        elif text:
            show(reply(talkers, text, seed_of(command.seed, turn), command), out)
            turn += 1


def reply(talkers: list[Talker], text: str, seed: int, command: ChatCommand) -> str:
    """What is shown for one message: an answer, or two answers in columns; or the message and its answers as JSON."""
    answers, given = [], []
    for talker in talkers:
        try:
            answers.append(talker.answer(text, seed, command))
            given.append({"model": talker.name, "answer": answers[-1]})
        except StageError as error:
            answers.append(f"({error})")
            given.append({"model": talker.name, "answer": None, "problem": str(error)})
    if command.as_json:
        return json.dumps({"message": text, "answers": given})
    if len(answers) == 1:
        return answers[0]
    return side_by_side([talker.name for talker in talkers], answers, shutil.get_terminal_size().columns)


def side_by_side(names: list[str], texts: list[str], width: int) -> str:
    """Two texts in columns under their names."""
    column = max(20, (width - 3) // 2)
    columns: list[list[str]] = []
    for name, text in zip(map(one_line, names), texts, strict=True):
        lines = [part for line in visible(text).splitlines() or [""] for part in textwrap.wrap(line, column) or [""]]
        columns.append([name[-column:], "-" * min(column, len(name)), *lines])
    return "\n".join(f"{left:<{column}} | {right}".rstrip() for left, right in zip_longest(*columns, fillvalue=""))


def main(command: ChatCommand) -> int:
    """Returns the exit code: 0, or that of a model that cannot be used."""
    try:
        asked = [(command.model, command.name), (command.versus, command.versus_name)]
        talkers = [load(uri, command.system, name) for uri, name in asked if uri is not None]
        if isinstance(sys.stdin, io.TextIOWrapper):  # what is not UTF-8 is refused by the line
            sys.stdin.reconfigure(errors="surrogateescape")
        if sys.stdin.isatty():
            show(HELP, sys.stderr if command.as_json else None)
        converse(talkers, sys.stdin, sys.stdout, command)
    except StageError as error:
        return refused("alignflow chat", error)
    except KeyboardInterrupt:
        show()
    return 0


if __name__ == "__main__":
    begin(ChatCommand.model_validate, main)
