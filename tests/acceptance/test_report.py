"""What people look at: ``Table.jobs`` in a notebook, and ``djdist.report()`` as picture and page."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import datajoint as dj
import pytest

import djdist
import lab as pipelines
from conftest import unavailable
from djdist.jobs.html import WIDEST_PIXELS
from djdist.jobs.table import Jobs
from lab.others import ALIVE, DEAD, NATIVE, change
from lab.watching import SECONDS
from servers import Server

PNG = b"\x89PNG"


@pytest.fixture
def keeping() -> Iterator[None]:
    """Keep the jobs that are made, as users who want reports do."""
    with dj.config.override(jobs__keep_completed=True):
        yield


class TestJobsInANotebook:
    def test_counts_errors_and_runs_are_shown(self, lab: ModuleType, keeping: None) -> None:
        pipelines.fill(lab, subjects=3, sessions=10)
        lab.Fragile.jobs.refresh()
        lab.Fragile.populate("subject_id < 3", reserve_jobs=True, suppress_errors=True)
        change(lab.Fragile.jobs, "subject_id = 3", status="reserved", user="anna@rig", connection_id=ALIVE)
        change(lab.Fragile.jobs, "subject_id = 3 AND session_date > '2026-01-04'", connection_id=DEAD)
        change(lab.Fragile.jobs, "subject_id = 3 AND session_date > '2026-01-07'", connection_id=NATIVE)
        change(lab.Fragile.jobs, f"connection_id = {DEAD}", reserved_time="2026-01-01")
        html = lab.Fragile.jobs._repr_html_()
        assert "Fragile: 16 of 30 keys made" in html
        counts = lab.Fragile.jobs.progress()
        for status in ("pending", "reserved", "error", "ignore"):
            assert f">{status}</td>" in html
            assert f">{counts[status]}</td>" in html
        assert ">4 ×</td>" in html
        assert "ValueError: bad n …" in html
        assert html.count("anna@rig") == 3
        assert html.count("alive: heard of") == html.count("dead: last heard of") == 1
        assert html.count("plain DataJoint") == 1

    def test_what_was_made_counts_though_its_jobs_are_gone(self, lab: ModuleType) -> None:
        pipelines.fill(lab)
        lab.Square.populate(reserve_jobs=True)
        assert len(lab.Square.jobs) == 0
        html = lab.Square.jobs._repr_html_()
        assert "Square: 6 of 6 keys made" in html
        assert f"width: {WIDEST_PIXELS}px" in html

    def test_what_it_shows_is_escaped_and_shortened(self, lab: ModuleType) -> None:
        pipelines.fill(lab, subjects=2, sessions=5)
        jobs = lab.Fragile.jobs
        jobs.refresh()
        for day in range(1, 6):
            message = f"<script>alert('{'abcdefgh'[day]}')</script> {'long ' * 300}"
            key = f"session_date = '2026-01-0{day}'"
            change(jobs, key, status="error", error_message=message, completed_time="2026-01-01")
        change(jobs, "subject_id = 2", status="reserved", user="<b>anna", connection_id=ALIVE)
        html = jobs._repr_html_()
        assert "&lt;script&gt;" in html
        assert "&lt;b&gt;anna" in html
        assert "<script" not in html
        assert "<b>" not in html
        assert len(html) < 10_000

    def test_what_ran_out_of_memory_is_shown_until_it_is_made(self, lab: ModuleType) -> None:
        pipelines.fill(lab)
        lab.Square.jobs.refresh()
        note = "ran out of memory with 2 GiB; it runs again with 4 GiB"
        change(lab.Square.jobs, "subject_id = 1", error_message=note)
        html = lab.Square.jobs._repr_html_()
        assert html.count(note) == 1
        assert ">3 ×</td>" in html
        lab.Square.populate(reserve_jobs=True)
        assert note not in lab.Square.jobs._repr_html_()

    def test_a_part_of_them_is_shown_as_rows(self, lab: ModuleType) -> None:
        pipelines.fill(lab)
        lab.Fragile.populate(reserve_jobs=True, suppress_errors=True)
        for part in (lab.Fragile.jobs.errors, lab.Fragile.jobs.proj("status")):
            assert "2026-01-02" in part._repr_html_()

    def test_their_rows_are_escaped_too(self, lab: ModuleType, connection: Any) -> None:
        pipelines.fill(lab, subjects=2, sessions=5)
        jobs = lab.Fragile.jobs
        jobs.refresh()
        change(jobs, "subject_id = 2", status="error", error_message="<script>alert(1)</script>")
        messages = jobs.errors.proj("error_message")
        with connection._config.override(display__limit=2):
            for part in (jobs.errors, jobs & "subject_id = 2", messages):
                html = part._repr_html_()
                assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 2
                assert "<script" not in html
                assert "Total: 5" in html
        assert "&lt;blob&gt;" in jobs.errors._repr_html_()

    def test_it_neither_raises_nor_writes(
        self, lab: ModuleType, connection: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        jobs = lab.Square.jobs
        assert "Square: 0 of 0 keys made" in jobs._repr_html_()
        jobs.drop()
        assert "There is no jobs table" in jobs._repr_html_()
        assert not jobs.is_declared
        monkeypatch.delattr(connection, "_conn")
        assert "They can&#x27;t be shown now" in jobs._repr_html_()


class TestReport:
    @pytest.mark.on("local")
    def test_a_page_in_a_browser(self, lab: ModuleType, keeping: None, browser: Any, tmp_path: Path) -> None:
        pipelines.fill(lab, subjects=3, sessions=10)
        lab.AnyKey.insert(lab.AnyKey.rows)
        for table in (lab.Fragile, lab.Square, lab.FromAnyKey):
            table.populate(reserve_jobs=True, suppress_errors=True)
        change(lab.Fragile.jobs, "status = 'error' AND subject_id = 1", error_message="<b>bad</b> & worse")
        change(lab.Square.jobs, "subject_id = 3 AND session_date = '2026-01-10'", duration=3600)
        change(lab.FromAnyKey.jobs, "tiny = -1", duration=1800)
        file = tmp_path / "report.html"
        assert djdist.report(lab.Fragile, lab.Square, lab.FromAnyKey, file=file) == file
        browser.get(file.as_uri())
        assert browser.get_log("browser") == []
        assert browser.title == "3 tables: 56 made, 6 failed"
        assert browser.execute_script("return document.images[0].naturalWidth") > 1000
        counts, slowest, causes = (element.text for element in browser.find_elements("tag name", "table"))
        assert "Fragile 24 0 0 6 0" in counts
        assert "Square subject_id=3, session_date=2026-01-10 3,600.000" in slowest
        assert f"choice=right{', uid=00112233-4455-6677-8899-aabbccddeeff' * lab.HAS_UUID_KEYS}" in slowest
        assert "Fragile: ValueError: bad n … 4" in causes
        assert "Fragile: <b>bad</b> & worse 2" in causes

    def test_a_picture_shows_when_and_where(self, lab: ModuleType, keeping: None, tmp_path: Path) -> None:
        pipelines.fill(lab, subjects=2, sessions=3)
        lab.Logged.populate(reserve_jobs=True, make_kwargs={"seconds": 0.05})
        change(lab.Logged.jobs, "subject_id = 2", host="far away")
        shown = texts(djdist.report(lab.Logged))
        assert "Logged: 6 made, 0 failed" in shown
        assert "2 hosts, at most 2 at once" in shown
        assert "far away" in shown
        assert "subject_id=1, session_date=2026-01-03" in shown
        shown = texts(djdist.report(lab.Logged.jobs & "subject_id = 1"))
        assert "Logged: 3 made, 0 failed" in shown
        file = djdist.report(lab.Logged, file=str(tmp_path / "report.PNG"))
        assert file.read_bytes().startswith(PNG)

    def test_memory_is_shown_beside_what_was_asked_for(
        self, lab: ModuleType, keeping: None, tmp_path: Path
    ) -> None:
        pipelines.fill(lab)
        needs = djdist.Needs(memory="1GiB")
        djdist.populate(lab.Square, reserve_jobs=True, needs=needs)
        lab.Reading.populate(reserve_jobs=True)
        assert re.search(r"Square: memory 0\.\d+ of 1 GiB", texts(djdist.report(lab.Square)))
        shown = texts(djdist.report(lab.Square, lab.Reading))
        assert shown.count("of 1 GiB") == 1
        page = djdist.report(lab.Square, lab.Reading, file=tmp_path / "report.html").read_text()
        assert "Memory in GiB" in page
        assert "Reading" not in page.partition("Memory in GiB")[2].partition("</table>")[0]

    def test_a_job_ends_when_its_make_does(self, lab: ModuleType, keeping: None) -> None:
        pipelines.fill(lab, subjects=1, sessions=1)
        lab.Logged.populate(reserve_jobs=True, make_kwargs={"seconds": 0.2})
        job = lab.Logged.jobs.fetch1()
        assert job["duration"] >= 0.2
        assert job["completed_time"] >= lab.Logged.fetch1("started") + timedelta(seconds=0.19)

    def test_it_says_what_was_not_kept(
        self, connection: Any, new_schema_name: Callable[[], str], modules_folder: Path
    ) -> None:
        with dj.config.override(jobs__add_job_metadata=True):
            lab = pipelines.declare(new_schema_name(), modules_folder)
        plain = pipelines.declare(new_schema_name(), modules_folder)
        for module in (lab, plain):
            pipelines.fill(module)
        lab.Reading.populate(lab.Session & "n > 2")
        plain.Square.populate(reserve_jobs=True)
        shown = texts(djdist.report(plain.Square, lab.Reading, lab.Fragile))
        assert "Square: when 6 of 6 keys were made is not known." in shown
        assert "Reading: on which host and in which process a key was made is not known." in shown
        assert "Fragile:" not in shown
        assert "set dj.config.jobs.keep_completed = True" in shown
        assert "3 tables: 10 made, 0 failed" in shown
        assert "unknown hosts" in shown
        assert not Jobs(lab.Reading()).is_declared

    @pytest.mark.long
    def test_of_a_module_and_of_a_schema_it_draws_what_needs_what(
        self, lab: ModuleType, keeping: None
    ) -> None:
        pipelines.fill(lab)
        lab.Reading.populate(reserve_jobs=True)
        drawn = [texts(djdist.report(target)) for target in (lab, lab.schema, [lab.Reading, lab.Square])]
        for shown in drawn[:2]:
            assert "Reading\n6 made\n" in shown
        assert (
            len(djdist.progress(lab.schema))
            == len(djdist.progress(lab))
            == len(djdist.progress(lab, lab.schema))
        )

    def test_nothing_to_draw(self, lab: ModuleType) -> None:
        assert "Square: 0 made, 0 failed" in texts(djdist.report(lab.Square))

    @pytest.mark.long
    @pytest.mark.on("local")
    def test_a_notebook_shows_the_picture_once(self, lab: ModuleType, server: Server, tmp_path: Path) -> None:
        nbformat = pytest.importorskip("nbformat")
        nbclient = pytest.importorskip("nbclient")
        from acceptance.conftest import PREAMBLE

        pipelines.fill(lab)
        code = [PREAMBLE.format(server=server) + f"from {lab.__name__} import Fragile", "Fragile.jobs"]
        code += ["Fragile.populate(reserve_jobs=True, suppress_errors=True)", "djdist.report(Fragile)"]
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in code])
        nbclient.NotebookClient(notebook, kernel_name="python3", timeout=SECONDS).execute()
        _, jobs, _, report = ([out.get("data", {}) for out in cell.outputs] for cell in notebook.cells)
        assert ["Fragile: 0 of 6 keys made" in data["text/html"] for data in jobs] == [True]
        assert ["image/png" in data for data in report] == [True]

    @pytest.mark.long
    def test_100_000_jobs(self, lab: ModuleType, browser: Any, tmp_path: Path) -> None:
        pipelines.fill(lab)
        lab.Square.populate()
        lab.Square.jobs.insert(many_jobs(100_000))
        change(lab.Square.jobs, "subject_id <= 50", status="pending")
        html = lab.Square.jobs._repr_html_()
        bars = re.findall(r">(\w+)</td><td[^>]*>([\d,]+)</td><td[^>]*><span", html)
        assert bars == [("made", "6"), ("pending", "1,000"), ("error", "1,980")]
        assert "The last 1,000 errors" in html
        file = djdist.report(lab.Square.jobs & "subject_id > 0", file=tmp_path / "report.html")
        browser.get(file.as_uri())
        assert browser.get_log("browser") == []
        assert browser.title == "Square: 97,020 made, 1,980 failed, 1,000 pending"
        assert browser.execute_script("return document.images[0].naturalWidth") > 1000


@pytest.mark.on("local")
class TestRefusals:
    def test_of_files(self, lab: ModuleType, tmp_path: Path) -> None:
        with pytest.raises(djdist.OptionError, match=r"must end in \.html or \.png"):
            djdist.report(lab.Square, file="report.pdf")
        with pytest.raises(djdist.OptionError, match="there is no such folder"):
            djdist.report(lab.Square, file=tmp_path / "missing" / "report.png")

    def test_of_tables(self, lab: ModuleType) -> None:
        with pytest.raises(djdist.OptionError, match=r"needs a module or a table: djdist\.report"):
            djdist.report()
        with pytest.raises(djdist.OptionError, match=r"Session is not a dj\.Computed or dj\.Imported table"):
            djdist.report(lab.Session)
        with pytest.raises(djdist.OptionError, match="restrict its jobs instead"):
            djdist.report(lab.Square & "subject_id = 1")

    def test_without_matplotlib(self, lab: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(sys.modules, "djdist.monitoring.report_figure", raising=False)
        for module in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(djdist.MissingLibraryError, match=r"needs matplotlib: pip install \"matplotlib>="):
            djdist.report(lab.Square)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A Chromium without a window; ``get_log("browser")`` gives the errors of its console."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    places = shutil.which("chromium"), shutil.which("chromedriver")
    if None in places:
        unavailable("no Chromium here with its driver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = places[0]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in FLAGS.split():
        options.add_argument(flag)
    chromium = webdriver.Chrome(options, webdriver.ChromeService(places[1]))
    yield chromium
    chromium.quit()


FLAGS = """
--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --disable-sync --no-first-run
--disable-background-networking --disable-component-update
"""


def texts(figure: Any) -> str:
    """Give all that is written in a figure."""
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))


def many_jobs(number: int) -> Iterator[dict[str, Any]]:
    """Give jobs that eight processes made in turn, of which every fiftieth failed."""
    began = datetime(2026, 1, 1, 22)
    for n in range(number):
        failed = n % 50 == 0
        yield {
            "subject_id": n // 20 + 1,
            "session_date": pipelines.FIRST_DATE + timedelta(days=n % 20),
            "status": "error" if failed else "success",
            "priority": 5,
            "completed_time": began + timedelta(seconds=n / 10),
            "duration": None if failed else 0.3 + 0.4 * (n % 7) / 7,
            "error_message": f"ValueError: bad n {n}" if failed else "",
            "host": f"node{n % 2}",
            "pid": 100 + n % 8,
        }
