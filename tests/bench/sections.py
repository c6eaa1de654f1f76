"""Where the time goes: functions of the engine, each wrapped by a clock that stops while an inner one runs."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator

from stages.align import ppo
from stages.engine.models import logprobs, policy
from stages.engine.training import offline


class Sections:
    """Seconds by section. A section inside another is taken off the outer one."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.running: list[str] = []
        self.since = 0.0

    def switch(self, now: float) -> None:
        if self.running:
            self.seconds[self.running[-1]] += now - self.since
        self.since = now

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its time counted under `name`; without gradient, under a name that says so."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.switch(time.perf_counter())
            inference = name.endswith("forward") and not torch.is_grad_enabled()
            self.running.append(f"{name}, no gradient" if inference else name)
            try:
                return call(*args, **kwargs)
            finally:
                self.switch(time.perf_counter())
                self.running.pop()

        return wrapper

    def taken(self) -> dict[str, float]:
        """What was counted since the last call."""
        found, self.seconds = dict(self.seconds), defaultdict(float)
        return found


def watch() -> Sections:
    """Put clocks on the engine's parts, in this process."""
    sections = Sections()
    head = logprobs._LinearLogps
    parts: list[tuple[Any, str, str]] = [
        (policy._Trunk, "hidden", "trunk, forward"),
        (head, "apply", "head, forward"),
        (torch.Tensor, "backward", "trunk, backward"),
        (torch.optim.AdamW, "step", "optimizer"),
        (Accelerator, "clip_grad_norm_", "optimizer"),
        (offline, "collate", "data"),
        (ppo, "collate", "data"),
        (ppo, "sample", "sampling"),
    ]
    for owner, name, section in parts:
        setattr(owner, name, sections.timed(section, getattr(owner, name)))
    head.backward = staticmethod(sections.timed("head, backward", head.backward))  # type: ignore[assignment]
    return sections
