"""Make one mistake at a time in a copy of the project, and see which of them no test notices.

`make mutants` runs all, about an hour on 2 cores; `python -m tests.mutants dpo ppo` those whose file has such a word in
its path. Prints each survivor and exits with 1 where there is one.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tests.mutants.listed import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
PARTS = ("flows", "stages", "schemas", "deploy", "tests", "pyproject.toml", "Makefile")
PARTS += ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")  # which tests read


def copy(folder: Path) -> Path:
    """The project's files, to be broken."""
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / part)
    return folder


def is_noticed(mutant: Mutant, folder: Path) -> bool:
    """Whether a test of the mutant's fails in a copy of the project that has the mistake."""
    path = folder / mutant.file
    whole = path.read_text()
    path.write_text(mutant.applied(whole))
    # pytest writes no byte code: a file changed twice within a second would be taken for the one before.
    env = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    env["MUTANT"] = mutant.file  # tests/conftest.py would let it be written
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutant.tests]
    try:
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=1200)
    finally:
        path.write_text(whole)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{mutant}: pytest could not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="words in the paths of the files to break; default all")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if not options.words or any(word in m.file for word in options.words)]
    survivors: list[Mutant] = []
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(options.jobs) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(options.jobs):
            copies.put(copy(Path(temporary) / str(number)))

        def one(mutant: Mutant) -> bool:
            folder = copies.get()
            try:
                return is_noticed(mutant, folder)
            finally:
                copies.put(folder)

        for number, (mutant, noticed) in enumerate(zip(chosen, pool.map(one, chosen), strict=True), 1):
            print(f"{number:4}/{len(chosen)}  {'noticed ' if noticed else 'SURVIVED'}  {mutant}", flush=True)
            if not noticed:
                survivors.append(mutant)
    print(f"{len(chosen)} mistakes, {len(chosen) - len(survivors)} noticed, {len(survivors)} not.")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
