"""`alignflow label --url`: a project on a running Label Studio, of which a server on this machine stands in.

`make label-studio` does the same with a real one.
"""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from schemas.commands import LabelCommand
from schemas.errors import StageError
from stages.commands.label import __main__ as label
from stages.commands.label import label_studio, project
from tests.stages.label.test_label import recorded, rows
from tests.support import ranking, web

TOKEN = "0123456789abcdef0123456789abcdef01234567"
ANSWERS = [{"prompt": f"Say {i}.", "responses": ["one", "two", "three"]} for i in range(5)]


class Studio:
    """What the server knows: projects with their tasks, and which token it takes."""

    def __init__(self) -> None:
        self.url = ""
        self.lets_in = f"Token {TOKEN}"
        self.projects: dict[int, list[Any]] = {}
        self.configs: list[str] = []
        self.takes_tasks = True


def _handler(studio: Studio) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None: ...

        def answer(self, status: int, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def handle_any(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"null")
            parts = self.path.partition("?")[0].strip("/").split("/")
            if self.path == "/api/token/refresh/":
                self.answer(200, {"access": f"of {body['refresh']}"})
            elif self.headers.get("Authorization") != studio.lets_in:
                self.answer(401, {"detail": "Invalid token."})
            elif parts == ["api", "projects"]:
                studio.configs.append(body["label_config"])
                number = len(studio.projects) + 7
                studio.projects[number] = []
                self.answer(201, {"id": number, "title": body["title"]})
            elif self.command == "DELETE":
                del studio.projects[int(parts[2])]
                self.answer(204, None)
            elif parts[-1] == "import":
                studio.projects[int(parts[2])] += body if studio.takes_tasks else []
                self.answer(201 if studio.takes_tasks else 400, {"task_count": len(body)})
            elif parts[-1] == "export" and int(parts[2]) in studio.projects:
                self.answer(200, studio.projects[int(parts[2])])
            else:
                self.answer(404, {"detail": "Not found."})

        do_GET = do_POST = do_DELETE = handle_any

    return Handler


@pytest.fixture
def studio(monkeypatch: pytest.MonkeyPatch) -> Iterator[Studio]:
    made = Studio()
    monkeypatch.setenv(project.KEY, TOKEN)
    with web.serving(_handler(made)) as made.url:
        yield made


def command(action: str, file: Path | str, studio: Studio, **values: Any) -> LabelCommand:
    return LabelCommand.model_validate({"action": action, "file": str(file), "url": studio.url, **values})


def test_a_project_has_the_tasks_that_a_file_would_have(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(project, "AT_ONCE", 2)
    file = ranking.write(tmp_path / "to_rank.jsonl", ANSWERS)
    lines = label.sent(command("export", file, studio))
    label.sent(LabelCommand(action="export", file=file, out=tmp_path / "files"))
    assert studio.projects == {7: json.loads((tmp_path / "files" / "tasks.json").read_text())}
    assert len(studio.projects[7]) == 5 and studio.configs == [label_studio.CONFIGS["ranking"]]
    assert lines == [
        f"made      5 tasks in project 7: {studio.url}/projects/7/data",
        f"next      alignflow label import 7 --from label-studio --url {studio.url}",
    ]


def test_what_people_said_there_gives_the_rows_that_its_file_gives(studio: Studio, tmp_path: Path) -> None:
    exported = recorded("label-studio-ranking.json")
    studio.projects[12] = exported[::-1]  # in another order
    out = tmp_path / "fetched.jsonl"
    label.received(command("import", "12", studio, out=str(out)))
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert made == rows(tmp_path, "label-studio-ranking.json", "label-studio") != []


def test_a_personal_access_token_is_traded_for_one_of_minutes(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(project.KEY, "a.b.c")
    studio.lets_in = "Bearer of a.b.c"
    label.sent(command("export", ranking.write(tmp_path / "a.jsonl", ANSWERS), studio))
    assert len(studio.projects[7]) == 5


def test_a_project_whose_tasks_are_refused_does_not_stay(studio: Studio, tmp_path: Path) -> None:
    studio.takes_tasks = False
    with pytest.raises(StageError, match="it answers 400"):
        label.sent(command("export", ranking.write(tmp_path / "a.jsonl", ANSWERS), studio))
    assert studio.projects == {} and len(studio.configs) == 1


@pytest.mark.parametrize(
    ("values", "key", "message"),
    [
        ({"file": "project"}, TOKEN, "FILE = project: with --url this is the number of a project"),
        ({"file": "99"}, TOKEN, "it answers 404"),
        ({"file": "8"}, TOKEN, "nobody has judged anything there"),
        ({"source": "argilla"}, TOKEN, "only files are read from argilla"),
        ({"url": "localhost:8080"}, TOKEN, "--url = localhost:8080: this is no address"),
        ({"url": "http://127.0.0.1:9"}, TOKEN, "Fix: check that Label Studio runs there"),
        ({}, "", "there is no access token"),
        ({}, "wrong-token", "does not let it in"),
        ({"action": "export", "out": "x"}, TOKEN, "with --url no files are written"),
    ],
)
def test_what_cannot_be_is_refused(
    values: dict[str, str], key: str, message: str, studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(project.KEY, key)
    studio.projects[8] = []
    asked = LabelCommand.model_validate({"action": "import", "file": "12", "url": studio.url, **values})
    with pytest.raises(StageError) as refused:
        (label.sent if asked.action == "export" else label.received)(asked)
    assert message in str(refused.value) and "wrong-token" not in str(refused.value)
    assert not list(tmp_path.iterdir())
