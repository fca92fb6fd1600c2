"""The notebooks do what their text promises, and their committed outputs are fit to be read."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from lab.notebooks import FOLDER, executed, said

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")

NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
LARGEST_BYTES = 150_000
LARGEST_IMAGE_BYTES = 60_000


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to run notebooks in, and commands and Ray clusters of their own."""
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    # Ray puts sockets there, whose paths must stay short
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as ray_folder:
        monkeypatch.setenv("RAY_TMPDIR", ray_folder)
        yield tmp_path


def outputs_of(name: str, folder: Path, instead: Mapping[str, str] | None = None) -> list[str]:
    """Execute a notebook in a folder, and give what each cell of code showed as text.

    What is committed has to say the same, but for numbers, times and names of the machine.
    """
    notebook, committed = executed(name, folder, instead), nbformat.read(FOLDER / name, as_version=4)
    assert said(notebook) == said(committed), "write the notebooks again: make notebooks"
    return [shown(cell) for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell: Any) -> str:
    data = [{"text/plain": output.get("text", ""), **output.get("data", {})} for output in cell.outputs]
    return "".join(f"{kind} {content}\n" for part in data for kind, content in part.items())


@pytest.mark.long
def test_the_first_run(folder: Path, thorough: bool) -> None:
    outputs = outputs_of("1-first-run.ipynb", folder, {} if thorough else {"range(25_000)": "range(1_000)"})
    together = "\n".join(outputs)
    assert "times as fast" in together
    assert "Tuning: 40 of 40 keys made" in together
    assert together.count("image/png") == 2
    assert "{'success_count': 0, 'error_list': []}" in outputs[-2]
    assert "40 of 40 neurons made, 0 errors left" in outputs[-1]


@pytest.mark.long
def test_on_ray(folder: Path) -> None:
    outputs = outputs_of("2-ray.ipynb", folder)
    together = "\n".join(outputs)
    assert "3 ×</td>" in together
    assert "ValueError: lam &lt; 0" in together
    assert "keys_per_second" in together
    assert "3 keys are pending again" in together
    assert "{'success_count': 3, 'error_list': []}" in together
    assert "60 of 60 neurons made, 0 errors left" in outputs[-1]


@pytest.mark.long
def test_on_dask(folder: Path) -> None:
    outputs = outputs_of("3-dask.ipynb", folder)
    together = "\n".join(outputs)
    assert "Dask's pages: http://127.0.0.1:" in together
    assert "{'success_count': 5, 'error_list': []}" in together
    assert "{'success_count': 45, 'error_list': []}" in together
    assert "50 of 50 neurons made, 0 errors left" in outputs[-1]


@pytest.mark.long
def test_a_cluster_session(folder: Path) -> None:
    outputs = outputs_of("4-cluster-session.ipynb", folder)
    (look,) = [output for output in outputs if "success_count" in output]
    assert "<Tuning of cluster_session by postgres" in look
    assert "(detached)" in look
    (begun,) = [output for output in outputs if "(detached)" in output and output != look]
    assert "running" in begun
    assert "0 running" not in begun
    assert "keys_per_second" in "\n".join(outputs)
    assert "{'success_count': 40, 'error_list': []}" in look
    assert (folder / "report.html").stat().st_size > LARGEST_IMAGE_BYTES
    assert "40 of 40 neurons made, 0 errors left" in outputs[-1]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_is_committed_is_small_and_clean(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert len(text) < LARGEST_BYTES
    notebook = nbformat.reads(text, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    told = "\n".join(
        f"{output.get('text', '')}{output.get('data', {}).get('text/html', '')}" for output in outputs
    )
    assert not [
        word for word in ("WARNING", "Warning", "Traceback", "/home", "/tmp", "/root") if word in told
    ]
    images = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert images
    assert max(map(len, images)) < LARGEST_IMAGE_BYTES
