"""Fetches what `gpu.sh` needs beside torch, transformers, peft, accelerate and safetensors, to be carried there.

    python -m tests.bench.wheels [FOLDER]     default: build/wheels

The versions are those of constraints.txt, the wheels those for this Python on this platform; nothing but `pip download`
is run. To put TRL beside our figures add its wheel, and those of `datasets`, to the folder.
"""

import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
THERE = ("torch", "transformers", "peft", "accelerate", "safetensors")
NEEDED = ("polars", "polars-runtime-32", "pandera", "typing-inspect", "mypy_extensions", "typeguard")
"""What else is imported; the largest by far is polars' runtime, which reads the tables of rows."""


def there() -> set[str]:
    """Names of what the machine brings: `THERE`, and what that requires."""
    found: set[str] = set()
    left = list(THERE)
    while left:
        name = left.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        try:
            needs = [Requirement(text) for text in requires(name) or []]
        except PackageNotFoundError:  # another platform's
            continue
        left += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def main(arguments: Sequence[str]) -> int:
    folder = Path(arguments[0]) if arguments else ROOT / "build" / "wheels"
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    wanted = [f"{name}=={pins[name]}" for name in NEEDED]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest"]
    subprocess.run([*command, str(folder), *wanted], check=True)
    for wheel in sorted(folder.glob("*.whl")):
        print(f"{wheel.stat().st_size / 1e6:6.1f} MB  {wheel.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
