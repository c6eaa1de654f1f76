"""Data that arrives: a file with new content becomes the event `alignflow.data.changed`, by which the automation
`alignflow data changed` starts a retraining.

The digests of what was told are in `arrivals.json` of the home, so that nothing is told twice.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from prefect.settings import PREFECT_API_URL

from flows.results import announce
from flows.servers import automations, checks
from schemas.environment import ROOTS, roots
from schemas.errors import refuse
from schemas.text import as_setting, one_line
from stages import tracking
from stages.runtime import workspace

log = logging.getLogger("alignflow")

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv")
AUTOMATION = "alignflow data changed"
"""Of deploy/automations.yaml: it starts the retraining."""
STABLE_SECONDS = 10.0
"""A file whose size and time of change stay the same for so long is whole."""
LOOK_SECONDS = 2.0
"""Between two looks into the folder."""


def arrived(path: Path, part: str = "preference") -> str | None:
    """Tell of the file or folder at a path if its content is another one than last time; its sha256, None for the same.

    `part`: which of `data` in the config it is.

    Raises:
        StageError: no Prefect server is set or takes the event, or there is nothing at the path.
    """
    path = path.expanduser().resolve()
    if not PREFECT_API_URL.value():
        raise refuse("PREFECT_API_URL", "", "no Prefect server is set.", checks.START, kind="server")
    listening = automations.read(AUTOMATION)
    if listening is None or not listening.enabled:  # the event would be told once, and to nobody
        message = f"nothing on the Prefect server listens for data: it has no automation {AUTOMATION!r} that is on."
        raise refuse("PATH", path, message, "alignflow deploy", kind="server")
    sha256, file = tracking.digest(path), workspace.home() / "arrivals.json"
    with workspace.lock(workspace.home() / "arrivals.lock"):
        try:
            known: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
        except ValueError as error:
            fix = "remove it: data is then told once more"
            raise refuse("arrivals.json", file, f"it cannot be read: {error}.", fix, kind="file") from error
        if known.get(str(path)) == sha256:
            return None
        about = {"path": str(path), "sha256": sha256, "setting": f"data.{part}.path={as_setting(str(path))}"}
        finding = f"{path} has new content, sha256 {sha256[:12]}."
        if not announce.emit("data.changed", str(path), finding, kind="data", **about):
            message = "the Prefect server has not taken the event."
            raise refuse(
                "PREFECT_API_URL", tracking.without_passwords(str(PREFECT_API_URL.value())), message, "try again"
            )
        workspace.write_whole(file, json.dumps(known | {str(path): sha256}, indent=2))
    return sha256


class FolderWatch:
    """Tells of the data files in a folder once they are whole. To be called often; it looks every other second."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises StageError where it is no folder, or one that the workers started here may not read."""
        self.folder, self.clock = folder.expanduser().resolve(), clock
        if not self.folder.is_dir():
            raise refuse("--watch", folder, "it is not a folder.", "give the folder that data files are put into")
        allowed = roots() or [Path.cwd()]
        if not any(self.folder.is_relative_to(root) for root in allowed):
            fix = f"add it to {ROOTS}, which names the folders that workers may read"
            message = f"workers read files below {', '.join(map(str, allowed))} only."
            raise refuse("--watch", self.folder, message, fix)
        self._next = clock()
        self._seen: dict[Path, tuple[tuple[int, int], float]] = {}
        """File -> its size and time of change, and since when they have been so."""
        self._told: dict[Path, tuple[int, int]] = {}

    def __call__(self) -> None:
        """Look, if it is time to. What goes wrong is a warning, and tried again."""
        now = self.clock()
        if now < self._next:
            return
        self._next = now + LOOK_SECONDS
        for file, stamp in self._files():
            before, since = self._seen.get(file, (None, now))
            if stamp != before:
                self._seen[file] = (stamp, now)
            elif now - since >= STABLE_SECONDS and self._told.get(file) != stamp:
                try:
                    if (sha256 := arrived(file)) is not None:
                        log.warning("%s has arrived, sha256 %s", file, sha256[:12])
                    self._told[file] = stamp
                except Exception as error:  # whatever the server does: the servers here must not end by it
                    log.warning("%s: %s", one_line(file, 200), one_line(error, 500))
                    self._seen[file] = (stamp, now)

    def _files(self) -> Iterator[tuple[Path, tuple[int, int]]]:
        """Data files, with size and time of change; hidden ones are not yet whole, as rsync and others have it."""
        try:
            for file in sorted(self.folder.iterdir()):
                if file.name.endswith(ENDINGS) and not file.name.startswith(".") and file.is_file():
                    about = file.stat()
                    yield file, (about.st_size, about.st_mtime_ns)
        except OSError as error:
            log.warning("%s cannot be looked at: %s", self.folder, one_line(error, 200))
