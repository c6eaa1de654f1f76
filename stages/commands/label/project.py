"""Label Studio over its API: a project is made of a file's tasks, and what people said in it is fetched.

Four requests by httpx. Its SDK would bring OpenCV, NLTK and lxml along, and pins versions that are not ours.
"""

import os
from pathlib import Path
from typing import Any

import httpx

from schemas.errors import StageError, refuse
from schemas.text import one_line

KEY = "LABEL_STUDIO_API_KEY"
"""Environment variable with the access token of a person (*Account & Settings*), as Label Studio's own SDK reads it."""
SECONDS = 120.0
AT_ONCE = 200
"""Tasks that are sent with one request."""


class Server:
    """A Label Studio that lets us in."""

    def __init__(self, url: str) -> None:
        """Raises StageError where there is no token, or no Label Studio that takes it."""
        self.url, key = url.rstrip("/"), os.environ.get(KEY, "").strip()
        if not self.url.startswith(("http://", "https://")):
            raise refuse("--url", url, "this is no address of a server.", "write http://HOST:PORT")
        if not key:
            raise refuse(KEY, "", "there is no access token.", f"copy it from {self.url}/user/account, and set it")
        self.http = httpx.Client(base_url=self.url, timeout=SECONDS)
        if key.count(".") == 2:  # a personal access token: a JWT that is traded for one of five minutes
            key = str(self.asked("POST", "/api/token/refresh/", json={"refresh": key}).get("access"))
            self.http.headers["Authorization"] = f"Bearer {key}"
        else:
            self.http.headers["Authorization"] = f"Token {key}"

    def asked(self, method: str, path: str, **more: Any) -> Any:
        """What it answers. Raises StageError: it refuses, or is no Label Studio, or cannot be reached."""
        try:
            answer = self.http.request(method, path, **more)
            answer.raise_for_status()
            return answer.json()
        except httpx.HTTPStatusError as error:
            status, said = error.response.status_code, one_line(error.response.text, 200)
            if status in (401, 403):
                fix = f"copy the token anew from {self.url}/user/account"
                raise refuse(
                    KEY, "(not shown)", f"{self.url} does not let it in ({status}).", fix, kind="server"
                ) from None
            raise self._failed(f"it answers {status}: {said}", "check address and project") from None
        except (httpx.HTTPError, ValueError) as error:  # ValueError: this is no JSON
            raise self._failed(one_line(error, 200), "check that Label Studio runs there") from None

    def _failed(self, why: str, fix: str) -> StageError:
        return refuse("--url", self.url, f"{why}.", fix, kind="server", status="failed")

    def make(self, title: str, config: str, tasks: list[dict[str, Any]]) -> int:
        """A new project with these tasks; its number. Where the tasks are not taken, the project is removed again."""
        number = int(self.asked("POST", "/api/projects/", json={"title": title[:50], "label_config": config})["id"])
        try:
            for first in range(0, len(tasks), AT_ONCE):
                self.asked("POST", f"/api/projects/{number}/import", json=tasks[first : first + AT_ONCE])
        except StageError:
            self.http.request("DELETE", f"/api/projects/{number}/")
            raise
        return number

    def judged(self, project: Path) -> list[Any]:
        """The tasks of a project, as its JSON export has them. Raises StageError where there are none."""
        if not str(project).isdecimal():
            fix = f"it is in the address of its page, {self.url}/projects/NUMBER"
            raise refuse("FILE", project, "with --url this is the number of a project.", fix)
        tasks = self.asked("GET", f"/api/projects/{project}/export", params={"exportType": "JSON"})
        if not isinstance(tasks, list) or not tasks:
            raise refuse("FILE", project, "nobody has judged anything there.", "submit some tasks", kind="empty_file")
        return sorted(tasks, key=lambda task: task["id"])
