"""What surrounds the code says the same as the code: versions, workflows, what is released."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

import djdist

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def jobs(workflow: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(workflow.read_text())["jobs"]
    return found


def steps(workflow: Path) -> list[dict[str, Any]]:
    return [step for job in jobs(workflow).values() for step in job["steps"]]


def test_one_version_is_cited_and_in_the_changelog() -> None:
    citation = read("CITATION.cff")
    released = re.findall(r"^## \[([\d.]+)\]\S* - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == (djdist.__version__, str(citation["date-released"]))
    assert citation["version"] == djdist.__version__


def test_each_python_that_is_promised_is_tested() -> None:
    promised = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert promised == jobs(ROOT / ".github/workflows/tests.yml")["test"]["strategy"]["matrix"]["python"]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_are_pinned_limited_and_make_what_there_is(workflow: Path) -> None:
    assert yaml.safe_load(workflow.read_text())["permissions"] == {"contents": "read"}
    assert all("timeout-minutes" in job for job in jobs(workflow).values())
    assert all(
        re.search(r"@(v\d+|release/v\d+|[0-9a-f]{40})$", step["uses"])
        for step in steps(workflow)
        if "uses" in step
    )
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    made = [step["run"].split()[1] for step in steps(workflow) if step.get("run", "").startswith("make ")]
    assert {*made} <= {*targets}


@pytest.mark.parametrize("form", ["bug", "feature"])
def test_forms_ask_each_question_once(form: str) -> None:
    fields = [
        field for field in read(f".github/ISSUE_TEMPLATE/{form}.yml")["body"] if field["type"] != "markdown"
    ]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)


def test_the_sdist_holds_what_git_does() -> None:
    sdist = pytest.importorskip("hatchling.builders.sdist")
    pytest.importorskip("hatch_fancy_pypi_readme")
    if not (ROOT / ".git").exists():
        pytest.skip("not in a clone")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    included = {file.distribution_path for file in sdist.SdistBuilder(str(ROOT)).recurse_included_files()}
    assert {*listed.split()} <= included
