"""The page in a real browser: keys, mouse and touch, a reload, two people, texts that are not markup, two widths."""

import json
import os
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stages.commands.rank.interview import serve
from stages.commands.rank.server import Server
from tests.support.pictures import CHROMIUM
from tests.support.ranking import FRUIT, session, told, write

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on this machine: apt-get install chromium"),
]

WAIT = 60_000  # milliseconds, on a busy machine
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title = 2</script>\u202e\x1b[2J<b>bold</b>'
ROWS = [
    FRUIT,
    {
        "prompt": [{"role": "system", "content": HOSTILE}, {"role": "user", "content": "Q?"}],
        "responses": [HOSTILE, "B"],
    },
    {"prompt": "Name four numbers.\n" * 30, "responses": ["One. " * 60, "Two.", "Three. " * 40, "Four."]},
]


@contextmanager
def serving(file: Path, *options: str) -> Iterator[str]:
    """The address of a page that `alignflow rank` serves; it has ended by itself on the way out."""
    command = [sys.executable, "-m", "flows.cli", "rank", str(file), "--no-open", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = " "
            while line and not line.startswith("open"):
                line = process.stdout.readline()
            yield line.split()[1]
            assert process.wait(20) == 0 and "next      alignflow validate" in process.stdout.read()
        finally:
            process.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def opened(browser: Any, address: str, width: int, scheme: str) -> Any:
    """A page of a fresh browser; what its console says, and any other server that it asks, is in `page.complaints`."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, has_touch=width < 500)
    page = context.new_page()
    page.set_default_timeout(WAIT)
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda asked: asked.url.startswith(address.split("#")[0]) or page.complaints.append(asked.url))
    page.goto(address)
    page.wait_for_selector(".card")
    return page


def keys(page: Any, *pressed: str) -> None:
    for key in pressed:
        page.keyboard.press(key)


def at(page: Any, number: int) -> None:
    """Wait until an item is on the screen."""
    page.locator("#count", has_text=f"{number} of").wait_for()


def placed(page: Any) -> list[list[str]]:
    """The ranking on the screen: the answers' keys by their groups."""
    groups = "groups => groups.map(group => [...group.querySelectorAll('.handle b')].map(key => key.textContent))"
    return page.locator(".group").evaluate_all(groups)


def drag(page: Any, key: str, target: str) -> None:
    """Drag an answer by its number onto the middle of what a selector finds."""
    handle = page.locator(".handle", has_text=key).first.bounding_box()
    page.mouse.move(handle["x"] + 15, handle["y"] + 20)
    page.mouse.down()
    page.mouse.move(handle["x"] + 40, handle["y"] + 60, steps=3)
    goal = page.locator(target).bounding_box()
    page.mouse.move(goal["x"] + goal["width"] / 2, goal["y"] + goal["height"] / 2, steps=6)
    page.mouse.up()


def pictured(page: Any, name: str) -> None:
    """A picture, where somebody wants to look (PICTURES names a folder); and nothing sticks out sideways."""
    if folder := os.environ.get("PICTURES"):
        page.screenshot(path=Path(folder) / f"{name}.png")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_two_people_rank_with_keys_and_mouse_and_one_goes_on_after_a_reload(browser: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", ROWS)
    output = ["--output", str(tmp_path / "ranked.jsonl")]
    with serving(file, "--annotator", "anna", *output) as address:
        page = opened(browser, address, 1440, "light")
        assert "#" not in page.url  # the token is in no history
        keys(page, "2", "3")
        drag(page, "1", "[data-drop='gap 1'].gap")
        assert placed(page) == [["2"], ["1"], ["3"]]
        drag(page, "3", "[data-drop='group 0']")
        pictured(page, "ranking-1440-light")
        assert placed(page) == [["2", "3"], ["1"]]
        keys(page, "u", "u", "u", "u", "=")  # nothing is placed, so that there is nothing to be equal to
        assert placed(page) == []
        keys(page, "2", "=", "1", "3", "n")
        page.keyboard.type("nice 1")
        page.reload()
        page.wait_for_selector(".card")
        assert placed(page) == [["2", "1"], ["3"]] and page.input_value("#note") == "nice 1"
        keys(page, "Enter")
        at(page, 2)
        page.reload()
        at(page, 2)
        texts = page.locator("#ask .text").all_text_contents()
        assert texts.count(HOSTILE.replace("\u202e", "\ufffd").replace("\x1b", "\ufffd")) == 2
        assert page.locator("img, b b, #ask script").count() == 0 and page.title() == "alignflow: judge answers"
        page.locator(".card", has_text="B").last.click()
        page.locator(".card .text").first.click()
        keys(page, "Enter")
        at(page, 3)
        keys(page, "s")
        page.wait_for_selector("#end h1")
        page.get_by_role("button", name="Back to the last one").click()
        came = time.monotonic()
        at(page, 3)
        keys(page, "4", "3", "2", "Enter")
        page.wait_for_selector("#end h1")
        looked = time.monotonic() - came
        assert page.text_content("#end h1") == "All 3 items are judged."
        keys(page, "Enter")
        page.wait_for_selector("#end pre")
        assert "wrote     3 rows" in page.text_content("#end pre") and page.complaints == []
    with serving(file, "--annotator", "ben", *output) as address:
        page = opened(browser, address, 390, "dark")
        assert page.text_content("#count") == "1 of 3"  # what anna said is not to be seen
        for key in ("3", "1"):
            page.locator(".handle", has_text=key).first.tap()
        pictured(page, "ranking-390-dark")
        page.get_by_role("button", name="Next").tap()
        at(page, 2)
        page.get_by_role("button", name="Skip").tap()
        at(page, 3)
        page.locator("#prompt").evaluate("prompt => { prompt.scrollTop = 40; }")
        keys(page, "1")
        assert page.locator("#prompt").evaluate("prompt => prompt.scrollTop") == 40  # who reads on is not thrown back
        pictured(page, "long-390-dark")
        page.get_by_role("button", name="Finish").tap()
        page.wait_for_selector("#end pre")
        assert "agreement on the 1 items that several judged" in page.text_content("#end pre")
        assert page.complaints == []
    anna = session(file)
    anna.verdicts.file = tmp_path / "ranked.verdicts.jsonl"
    first, second, third, bens, skipped = told(anna)
    assert first.verdict == [[first.shown[1], first.shown[0]], [first.shown[2]]] and first.note == "nice 1"
    assert len(second.verdict) == 2 and third.verdict == [[third.shown[place]] for place in (3, 2, 1, 0)]
    assert third.seconds <= looked + 0.1  # its own time, without the others'
    assert bens.verdict == [[bens.shown[2]], [bens.shown[0]], [bens.shown[1]]] and skipped.verdict is None
    rows = [json.loads(line) for line in (tmp_path / "ranked.jsonl").read_text().splitlines()]
    assert [sorted(row.keys() & {"order", "comparisons"}) for row in rows] == [["comparisons"], ["order"], ["order"]]


def test_a_browser_is_led_to_the_page_by_a_file_of_its_own(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its command line, which every user of the machine can read, holds no token."""
    server = Server(session(write(tmp_path / "rows.jsonl", ROWS)), 0, list)
    seen: dict[str, Any] = {}

    def opens(uri: str) -> None:
        seen["uri"], seen["mode"] = uri, Path(uri.removeprefix("file://")).parent.stat().st_mode & 0o777
        threading.Thread(target=server.serve_forever).start()  # a real browser would come when `serve` has got there
        monkeypatch.setattr(server, "serve_forever", lambda **_: None)
        page = browser.new_page()
        page.set_default_timeout(WAIT)
        page.goto(uri)
        page.wait_for_selector(".card")
        seen["url"] = page.url
        page.close()
        server.shutdown()

    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(webbrowser, "open", opens)
    serve(server, opens=True)
    assert server.token not in seen["uri"] and seen["mode"] == 0o700
    assert seen["url"] == server.address.split("#")[0]
    assert not Path(seen["uri"].removeprefix("file://")).exists()


@pytest.mark.parametrize(("form", "verdict"), [("pairs", [[1], [0]]), ("thumbs", "down")])
def test_pairs_and_thumbs(browser: Any, form: Any, verdict: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", ROWS)
    with serving(file, "--annotator", "anna", "--form", form) as address:
        page = opened(browser, address, 1440, "dark")
        keys(page, "2")
        pictured(page, f"{form}-1440-dark")
        keys(page, "Enter")
        at(page, 2)
        page.set_viewport_size({"width": 390, "height": 844})
        pictured(page, f"{form}-390-dark")
        page.get_by_role("button", name="Finish").click()
        page.wait_for_selector("#end pre")
        assert page.complaints == []
    person = session(file, form=form)
    person.verdicts.file = tmp_path / f"rows.{form}.verdicts.jsonl"
    (saved,) = told(person)
    shown = [[saved.shown[place] for place in group] for group in verdict] if form == "pairs" else verdict
    assert saved.verdict == shown
