"""`make label-studio`: a round trip through a real Label Studio, judged on its own pages in Debian's chromium.

It runs from an environment of its own, since it pins other versions than ours. `--record FOLDER` keeps what it exports,
which the tests read (tests/stages/label/recorded).
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from tests.support.pictures import CHROMIUM

EMAIL, PASSWORD, TOKEN = "anna@example.com", "only-on-this-machine", "0123456789abcdef0123456789abcdef01234567"
ROWS = [
    {"prompt": "Name a fruit.", "responses": ["An apple.", "Bread.", "A pear."], "source": 7},
    {"prompt": "Name a tree.", "responses": ["Oak.", "<b>I will not.</b>"]},
]
START_SECONDS = 300


def server(program: Path, folder: Path, port: int) -> "subprocess.Popen[bytes]":
    """Label Studio on 127.0.0.1, with one user."""
    quiet = {"COLLECT_ANALYTICS": "false", "SENTRY_DSN": "", "FRONTEND_SENTRY_DSN": "", "LATEST_VERSION_CHECK": "false"}
    own = {
        "HOME": str(folder),
        "LABEL_STUDIO_BASE_DATA_DIR": str(folder),
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
    }
    command = [program, "start", "--no-browser", "--port", str(port), "--internal-host", "127.0.0.1"]
    command += ["--username", EMAIL, "--password", PASSWORD, "--user-token", TOKEN]
    environment = {**os.environ, **quiet, **own}
    environment.pop("PYTHONPATH", None)
    log = (folder / "server.log").open("wb")
    return subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def wait_for(address: str, process: "subprocess.Popen[bytes]") -> None:
    for _ in range(START_SECONDS):
        try:
            if httpx.get(f"{address}/health", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        if process.poll() is not None:
            break
        time.sleep(1)
    sys.exit("label-studio: it did not start; see server.log")


def judge(page: Any, address: str, project: int, tasks: list[dict[str, Any]], form: str) -> None:
    """A person's clicks: the first task gets another first answer, the second a tie or what stands first, and so on."""
    for number, task in enumerate(tasks):
        page.goto(f"{address}/projects/{project}/data?task={task['id']}")
        page.get_by_text(task["data"]["answers"][0]["body"], exact=True).last.wait_for(timeout=60_000)
        page.wait_for_timeout(1000)
        if form == "ranking" and number == 0:  # the last answer is dragged to the top
            first, last = (page.get_by_text(task["data"]["answers"][at]["body"], exact=True).last for at in (0, -1))
            start, end = last.bounding_box(), first.bounding_box()
            page.mouse.move(start["x"] + 5, start["y"] + 5)
            page.mouse.down()
            page.mouse.move(start["x"] + 5, start["y"] - 20, steps=10)
            page.mouse.move(end["x"] + 5, end["y"] - 40, steps=25)
            page.wait_for_timeout(500)
            page.mouse.up()
            page.wait_for_timeout(800)
        elif form == "pairs" and number == 1:
            page.get_by_text("Equally good").first.click()
        elif form == "pairs" and number != 2:  # of the third nothing is chosen
            page.get_by_text(task["data"]["answers"][1 if number == 0 else 0]["body"], exact=True).last.click()
        page.wait_for_timeout(400)
        page.get_by_role("button", name="Submit").click()
        page.wait_for_timeout(2500)


def round_trip(address: str, folder: Path, form: str, page: Any) -> Path:
    """Export from us, judge there, export from there; returns that file."""
    (folder / "to_rank.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = [sys.executable, "-m", "flows.cli", "label", "export", folder / "to_rank.jsonl", "--to", "label-studio"]
    done = subprocess.run([*command, "--form", form, "--url", address], check=True, text=True, stdout=subprocess.PIPE)
    number = int(done.stdout.split("project ")[1].partition(":")[0])
    asks = httpx.Client(base_url=address, headers={"Authorization": f"Token {TOKEN}"}, timeout=60)
    tasks = asks.get(f"/api/tasks?project={number}&page_size=100").raise_for_status().json()["tasks"]
    judge(page, address, number, sorted(tasks, key=lambda task: task["id"]), form)
    command = [sys.executable, "-m", "flows.cli", "label", "import", str(number), "--from", "label-studio"]
    subprocess.run([*command, "--url", address, "--out", folder / f"{form}.fetched.jsonl"], check=True)
    export = asks.get(f"/api/projects/{number}/export", params={"exportType": "JSON"}).raise_for_status()
    file = folder / f"{form}.json"
    file.write_text(json.dumps(sorted(export.json(), key=lambda task: task["id"]), indent=1))
    return file


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("program", type=Path)
    options.add_argument("folder", type=Path)
    options.add_argument("--record", type=Path)
    given = options.parse_args()
    if CHROMIUM is None:
        sys.exit("label-studio: chromium is not on this machine. Fix: apt-get install chromium")
    from playwright.sync_api import sync_playwright  # late: whoever has no chromium may lack it

    shutil.rmtree(given.folder, ignore_errors=True)
    given.folder.mkdir(parents=True)
    folder = given.folder.resolve()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    os.environ["LABEL_STUDIO_API_KEY"] = TOKEN
    process = server(given.program.resolve(), folder, port)
    try:
        wait_for(address, process)
        with sync_playwright() as engine:
            browser = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport={"width": 1400, "height": 1000})
            page.goto(f"{address}/user/login/")
            page.fill("input[name=email]", EMAIL)
            page.fill("input[name=password]", PASSWORD)
            page.press("input[name=password]", "Enter")
            page.wait_for_timeout(3000)
            for form in ("ranking", "pairs"):
                file = round_trip(address, folder, form, page)
                rows = file.with_suffix(".jsonl")
                command = [sys.executable, "-m", "flows.cli", "label", "import", file, "--from", "label-studio"]
                subprocess.run([*command, "--out", rows], check=True)
                assert rows.read_text() == (folder / f"{form}.fetched.jsonl").read_text()
                print(rows.read_text())
                if given.record:
                    shutil.copy(file, given.record / f"label-studio-{form}.json")
            browser.close()
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
