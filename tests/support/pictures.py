"""`make pictures`: the README's pictures, from the report of the last demo run. Debian's chromium draws the page."""

import shutil
import sys
from pathlib import Path

from flows.results.lookup import comparison

CHROMIUM = shutil.which("chromium")
PICTURES = Path(__file__).resolve().parents[2] / "deploy" / "pictures"
WIDTH, MARGIN = 1120, 9  # pixels; the next answers begin 10 below


def draw(report: Path, out: Path) -> None:
    """Copy the picture of reward and KL that is beside a report, and take one of the page's first answers."""
    from PIL import Image  # late, as what follows: whoever wants only CHROMIUM may lack it
    from playwright.sync_api import FloatRect, sync_playwright

    shutil.copy(report / "reward_kl.png", out)
    with sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 900}, device_scale_factor=1.5, color_scheme="light")
        page.goto((report / "report.html").as_uri())
        answers = page.locator("#answers ~ details")
        top, bottom = page.locator("#answers").bounding_box(), answers.nth(1).bounding_box()
        assert top is not None and bottom is not None
        start, end = top["y"] - MARGIN, bottom["y"] + bottom["height"] + MARGIN
        clip = FloatRect(x=0, y=start, width=WIDTH, height=end - start)
        page.screenshot(path=out / "report.png", full_page=True, clip=clip)
        browser.close()
    # Few colours, a fraction of the bytes: a clone brings them along.
    Image.open(out / "report.png").convert("RGB").quantize(64).save(out / "report.png", optimize=True)


if __name__ == "__main__":
    if CHROMIUM is None:
        sys.exit("pictures: chromium is not on this machine. Fix: apt-get install chromium")
    draw(comparison("demo").folder, PICTURES)
