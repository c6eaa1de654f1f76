"""The automations of deploy/automations.yaml on the Prefect server: made, or brought up to date, by their names."""

from importlib.resources import files
from pathlib import Path

import yaml
from prefect.automations import Automation


def automations_file() -> Path:
    """The file that comes with alignflow."""
    return Path(str(files("deploy"))) / "automations.yaml"


def apply(path: Path | None = None) -> list[str]:
    """Create or update the automations of a file; their names. Idempotent."""
    names = []
    for raw in yaml.safe_load((path or automations_file()).read_text(encoding="utf-8"))["automations"]:
        wanted = Automation(**raw)
        existing = read(wanted.name)
        if existing is None:
            wanted.create()
        else:
            existing.model_copy(
                update={field: getattr(wanted, field) for field in Automation.model_fields if field != "id"}
            ).update()
        names.append(wanted.name)
    return names


def read(name: str) -> Automation | None:
    """The server's automation of that name."""
    try:
        return Automation.read(name=name)  # type: ignore[return-value]
    except ValueError:
        return None
