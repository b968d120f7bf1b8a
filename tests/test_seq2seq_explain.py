"""The attention page: self-contained, safe with any text, and interactive in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from fused_attn.seq2seq.commands.explain import page
from fused_attn.seq2seq.inference.prediction import Prediction

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

SOURCE = ("고양이", "</script><b>", "שלום", "&amp;")
WEIGHTS = torch.tensor([[0.75, 0.25, 0.0, 0.0], [0.0, 0.125, 0.5, 0.375]])
FOUND = Prediction(
    SOURCE,
    ("le", "<!-- chat"),
    "le <!-- chat",
    score=-0.5,
    ranking_score=-0.25,
    alignment=WEIGHTS,
    others=(
        Prediction(SOURCE, ("un",), "un", -2.0, ranking_score=-1.0, alignment=WEIGHTS[:1]),
        Prediction(SOURCE, (), "", -9.0, ranking_score=-9.0),
    ),
)


def data_of(text: str) -> dict[str, object]:
    found = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


def test_the_page_holds_what_was_found() -> None:
    assert data_of(page(FOUND)) == {
        "source": list(SOURCE),
        "hypotheses": [
            {"target": ["le", "<!-- chat"], "score": -0.25, "log_prob": -0.5,
             "weights": WEIGHTS.tolist()},
            {"target": ["un"], "score": -1.0, "log_prob": -2.0, "weights": WEIGHTS[:1].tolist()},
            {"target": [], "score": -9.0, "log_prob": -9.0, "weights": None},
        ],
    }  # fmt: skip


def test_the_page_needs_nothing_from_elsewhere() -> None:
    """Tokens stay text: none of them creates an element."""
    tags: list[str] = []

    class Collector(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append(tag)
            assert not {"src", "href"} & {name for name, _ in attrs}

    text = page(FOUND)
    Collector().feed(text)
    assert "b" not in tags and tags.count("script") == 2
    assert "@import" not in text and "http" not in text


def rendered(tmp_path: Path, text: str, fragment: str = "") -> str:
    """The DOM of a page, as a browser renders it."""
    if BROWSER is None:
        pytest.skip("chromium is not installed")
    file = tmp_path / "page.html"
    file.write_text(text, encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"{file.as_uri()}{fragment}"]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    return done.stdout.decode()


def symbols(dom: str) -> list[tuple[str, str, str]]:
    """Text, shade and displayed weight of every token, in order."""
    pattern = r'<button class="symbol"[^>]*--weight: ([\d.]+)[^>]*>(.*?)<small>(.*?)</small>'
    return [(text, shade, number) for shade, text, number in re.findall(pattern, dom)]


ESCAPED = ["고양이", "&lt;/script&gt;&lt;b&gt;", "שלום", "&amp;amp;"]


def test_a_browser_shows_it(tmp_path: Path) -> None:
    dom = rendered(tmp_path, page(FOUND))
    assert [text for text, _, _ in symbols(dom)] == [*ESCAPED, "le", "&lt;!-- chat", "un"]
    assert all(shade == "0" and number == "" for _, shade, number in symbols(dom))
    assert "(empty)" in dom
    cells = re.findall(r'<td title[^>]*--weight: ([\d.]+);"', dom)
    assert [float(cell) for cell in cells] == WEIGHTS.flatten().tolist()


@pytest.mark.timeout(300)
def test_pointing_shades_what_was_read(tmp_path: Path) -> None:
    """By a link to a token, and with the pointer on a target token and on a source token."""
    text = page(FOUND)
    by_link = symbols(rendered(tmp_path, text, "#0,1"))
    assert [number for _, _, number in by_link] == ["0.00", "0.13", "0.50", "0.38", "", "", ""]
    assert [float(shade) for _, shade, _ in by_link[:4]] == WEIGHTS[1].tolist()

    def after(index: int) -> list[tuple[str, str, str]]:
        script = (
            f"<script>document.querySelectorAll('button.symbol')[{index}]"
            ".dispatchEvent(new PointerEvent('pointerenter'))</script>"
        )
        return symbols(rendered(tmp_path, text.replace("</body>", f"{script}</body>")))

    assert [number for _, _, number in after(4)] == ["0.75", "0.25", "0.00", "0.00", "", "", ""]
    assert [number for _, _, number in after(1)] == ["", "", "", "", "0.25", "0.13", ""]
    assert [number for _, _, number in after(6)] == ["0.75", "0.25", "0.00", "0.00", "", "", ""]
