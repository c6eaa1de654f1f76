"""A GGUF file for llama.cpp and Ollama, made by llama.cpp's own converter.

Its names of tensors could be mapped here in a page, but not its tokenizers: the converter knows a tokenizer by a digest
of what it makes of a text, from a list that grows with each new model, and llama.cpp splits text by the name found so.
A file with a wrong or a missing name loads, and answers worse without a word.
"""

import os
import subprocess
import sys
from pathlib import Path

from schemas.errors import refuse
from schemas.text import one_line

SCRIPT = "convert_hf_to_gguf.py"


def check(checkout: Path, adapter: bool) -> None:
    """Raises StageError where the folder is not a checkout of llama.cpp, or an adapter alone is to be converted."""
    if adapter:
        message = "an adapter alone becomes no GGUF model."
        raise refuse("--gguf", checkout, message, "leave out --adapter: the whole model has it merged", kind="export")
    if not (checkout / SCRIPT).is_file():
        message = f"there is no {SCRIPT} in it: llama.cpp's converter makes the file, and is not on PyPI."
        fix = (
            "git clone --depth 1 https://github.com/ggml-org/llama.cpp, and give that folder; or export without --gguf"
        )
        fix += f" and call `python llama.cpp/{SCRIPT} FOLDER` yourself"
        raise refuse("--gguf", checkout, message, fix, kind="export")


def convert(checkout: Path, folder: Path) -> Path:
    """Let the converter write NAME.gguf into an exported folder NAME, in the weights' own precision; returns the file.

    Raises:
        StageError: it failed, with its last line.
    """
    out = folder / f"{folder.name}.gguf"
    script = (checkout / SCRIPT).absolute()
    # It imports what lies beside it, which our processes otherwise forbid.
    free = {name: value for name, value in os.environ.items() if name not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    command = [sys.executable, str(script), str(folder.absolute()), "--outfile", str(out.absolute())]
    done = subprocess.run(command, cwd=checkout, env=free, capture_output=True, text=True)
    if done.returncode != 0 or not out.is_file():
        out.unlink(missing_ok=True)
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it said nothing")
        message = f"llama.cpp's converter failed: {one_line(last, 300)}."
        fix = f"the export is in {folder} without it; a newer llama.cpp may know this model's tokenizer"
        raise refuse("--gguf", checkout, message, fix, kind="export")
    return out
