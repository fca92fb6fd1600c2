"""The documentation can be built, its links lead somewhere, and it leaves out no public name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import djdist

pytest.importorskip("myst_nb", reason="pip install --group docs")

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "docs", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert built.returncode == 0, built.stderr
    return folder


class Page(HTMLParser):
    """What a page links to, and where it can be linked to."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.links += [values[name] or "" for name in ("href", "src") if name in values]
        self.anchors |= {values[name] or "" for name in ("id", "name") if name in values}


def broken(site: Path) -> Iterator[str]:
    pages = {file: Page(file) for file in site.rglob("*.html") if "_static" not in file.parts}
    for file, page in pages.items():
        for link in map(urlsplit, page.links):
            if link.scheme or link.netloc:
                continue
            target = (file.parent / unquote(link.path)).resolve() if link.path else file
            anchors = pages[target].anchors if target in pages else set()
            if not target.exists() or (link.fragment and unquote(link.fragment) not in {*anchors, "top"}):
                yield f"{file.relative_to(site)}: {link.geturl()}"


def test_links_within_the_site_lead_somewhere(site: Path) -> None:
    assert not [*broken(site)]


def test_links_into_the_repository_lead_to_files() -> None:
    named = {path for page in PAGES for path in re.findall(r"\]\(source:([^)#]+)", page.read_text())}
    assert named
    assert not [path for path in named if not (ROOT / path).exists()]


def test_all_public_names_are_in_the_reference(site: Path) -> None:
    api = Page(site / "reference" / "api.html").anchors | Page(site / "reference" / "settings.html").anchors
    assert {f"djdist.{name}" for name in djdist.__all__ if name != "config"} <= api
    assert {f"djdist.config.{name}" for name in type(djdist.config).model_fields} <= api


@pytest.mark.parametrize(
    ("page", "written"),
    [
        ("command-line", {"populate", "--timeout-seconds", "djdist wait 396303eb"}),
        ("logs", {"…(…) was lost, … of …: …", "… is over: …"}),
        ("metrics", {"ray_djdist_jobs_finished_total", "ray_djdist_make_seconds"}),
        ("options", {"*restrictions", "retry_on"}),
    ],
)
def test_what_the_code_knows_is_written_down(site: Path, page: str, written: set[str]) -> None:
    text = re.sub("<[^>]+>", "", (site / "reference" / f"{page}.html").read_text())
    assert not [each for each in written if each not in text]


def test_the_files_on_the_way_of_a_key_exist() -> None:
    way = (ROOT / "docs" / "explanation" / "how-a-key-travels.md").read_text()
    named = re.findall(r"`(djdist/[\w/.]+)`", way)
    assert named
    assert not [path for path in named if not (ROOT / path).exists()]
