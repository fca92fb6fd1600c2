"""A whole pipeline in one run makes the same rows, and the same errors, as native runs table after table."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

import djdist
from acceptance.test_handovers import address_of
from lab import whole
from lab.watching import SECONDS, counts, pid_of_ray_actor, wait_until

Script = Callable[..., "subprocess.Popen[str]"]
Errors = list[tuple[str, str, str]]
Options = dict[str, Any]

OPTIONS: Any = {"reserve_jobs": True, "suppress_errors": True, "make_kwargs": whole.MAKE_KWARGS}
PARALLEL = OPTIONS | {"processes": 2}


@pytest.fixture
def declared(
    connection: Any, new_schema_name: Callable[[], str], modules_folder: Path
) -> Callable[..., ModuleType]:
    """Declares the pipeline in new schemas each time."""

    def declare(**options: Any) -> ModuleType:
        results, raw = new_schema_name(), new_schema_name()  # dropped in this order
        return whole.declare(raw, results, modules_folder, **options)

    return declare


@pytest.fixture
def sessions() -> int:
    """How many sessions each subject has."""
    return 3


@pytest.fixture
def pipeline(declared: Callable[..., ModuleType], sessions: int) -> ModuleType:
    pipeline = declared()
    whole.fill(pipeline, sessions=sessions)
    return pipeline


@pytest.fixture
def native(declared: Callable[..., ModuleType], sessions: int) -> ModuleType:
    """The same pipeline, populated by plain DataJoint table after table."""
    pipeline = declared(longest_seconds=0)
    whole.fill(pipeline, sessions=sessions)
    pipeline.errors = populate_natively(pipeline, whole.MAKE_KWARGS)  # type: ignore[attr-defined]
    return pipeline


def populate_natively(pipeline: ModuleType, make_kwargs: Options) -> Errors:
    djdist.disable()
    errors = []
    for name in whole.TABLES:
        table, kwargs = getattr(pipeline, name), make_kwargs.get(name, {})
        made = table.populate(reserve_jobs=True, suppress_errors=True, make_kwargs=kwargs)
        errors += [(name, str(key), message) for key, message in made["error_list"]]
    djdist.enable()
    return sorted(errors)


def left(pipeline: ModuleType) -> dict[str, dict[str, int]]:
    """Count the jobs that are left, without tables that have none."""
    found = {name: counts(getattr(pipeline, name)) for name in whole.TABLES}
    return {name: count for name, count in found.items() if count}


def reserved(pipeline: ModuleType) -> int:
    return sum(count.get("reserved", 0) for count in left(pipeline).values())


def assert_equal(pipeline: ModuleType, native: ModuleType) -> None:
    rows, expected = whole.rows(pipeline), whole.rows(native)
    assert {name for name in expected if rows[name] != expected[name]} == set()
    assert left(pipeline) == left(native)


@pytest.mark.parametrize(
    ("together", "sessions"), [(1, 3), pytest.param("auto", whole.SESSIONS_TO_SHARE, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("reserve_jobs", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.long_on("processes-True")
def test_a_run_makes_what_native_runs_table_after_table_make(
    pipeline: ModuleType, native: ModuleType, executor: Any, reserve_jobs: bool, together: Any
) -> None:
    options = OPTIONS | {"reserve_jobs": reserve_jobs, "keys_per_transaction": together}
    result = djdist.populate(pipeline, executor=executor, **options)
    errors = sorted((table, str(key), message) for table, key, message in result["error_list"])
    assert errors == native.errors
    assert {name for name, *_ in errors} == {"Recording", "Match"}
    assert whole.rows(pipeline) == whole.rows(native)
    if reserve_jobs:
        assert_equal(pipeline, native)


POPULATE = """
import {module} as whole

print(djdist.populate(whole, reserve_jobs=True, suppress_errors=True, make_kwargs={kwargs}, {options}))
"""


def call(pipeline: ModuleType, options: str = "processes=2") -> str:
    return POPULATE.format(module=pipeline.__name__, kwargs=whole.MAKE_KWARGS, options=options)


@pytest.mark.on("processes")
@pytest.mark.long
def test_two_runs_of_one_pipeline_share_it(pipeline: ModuleType, native: ModuleType, script: Script) -> None:
    other = script(call(pipeline))
    djdist.populate(pipeline, **PARALLEL)
    output, error = other.communicate(timeout=SECONDS)
    assert "success_count" in output, error
    assert_equal(pipeline, native)


NATIVE = """
import {module} as whole

djdist.disable()
while True:
    for name in {tables}:
        table, kwargs = getattr(whole, name), {kwargs}.get(name, {{}})
        table.populate(reserve_jobs=True, suppress_errors=True, make_kwargs=kwargs)
"""


@pytest.mark.long
@pytest.mark.on("processes")
@pytest.mark.parametrize("tables", [("Recording",), whole.STREAMED])
def test_native_workers_share_its_tables(
    pipeline: ModuleType, native: ModuleType, script: Script, tables: tuple[str, ...]
) -> None:
    script(NATIVE.format(module=pipeline.__name__, tables=tables, kwargs=whole.MAKE_KWARGS))
    wait_until(lambda: len(pipeline.Recording()), "the native worker")
    djdist.populate(pipeline, **PARALLEL)
    assert_equal(pipeline, native)


@pytest.mark.long
@pytest.mark.on("local")
def test_max_calls_hold_for_all_tables_and_the_next_call_goes_on(
    pipeline: ModuleType, native: ModuleType
) -> None:
    made = [djdist.populate(pipeline, max_calls=50, **OPTIONS)["success_count"] for _ in range(3)]
    assert all(count <= 50 for count in made)
    djdist.populate(pipeline, **OPTIONS)
    assert_equal(pipeline, native)


@pytest.mark.long
@pytest.mark.on("processes")
def test_what_failed_is_made_after_its_errors_are_deleted(pipeline: ModuleType, native: ModuleType) -> None:
    lenient = {"Recording": whole.MAKE_KWARGS["Recording"] | {"strict": False}}
    djdist.populate(pipeline, **PARALLEL)
    for name in ("Recording", "Match"):
        for each in (pipeline, native):
            getattr(each, name).jobs.errors.delete()
    djdist.populate(pipeline, **PARALLEL | {"make_kwargs": lenient})
    populate_natively(native, lenient)
    assert len(pipeline.Recording()) == len(pipeline.Session())
    assert_equal(pipeline, native)


@pytest.mark.long
@pytest.mark.on("processes")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_interrupted_leaves_nothing_reserved(
    pipeline: ModuleType, native: ModuleType, script: Script, number: signal.Signals
) -> None:
    process = script(call(pipeline))
    wait_until(lambda: len(pipeline.Filtered()) > 2, "some keys downstream")
    process.send_signal(number)
    output, error = process.communicate(timeout=SECONDS)
    assert process.returncode != 0
    assert "success_count" not in output, error
    assert reserved(pipeline) == 0
    djdist.populate(pipeline, **OPTIONS)
    assert_equal(pipeline, native)


@pytest.mark.long
@pytest.mark.parametrize("executor", ["ray", "dask"])
def test_a_detached_run_that_is_stopped_leaves_the_rest(
    request: pytest.FixtureRequest, pipeline: ModuleType, native: ModuleType, executor: Any
) -> None:
    address_of(request, executor)
    run = djdist.populate(pipeline, executor=executor, detach=True, **OPTIONS)
    wait_until(lambda: len(pipeline.Recording()) > 2, "some keys")
    run.stop()
    run.wait()
    assert reserved(pipeline) == 0
    djdist.populate(pipeline, executor=executor, **OPTIONS)
    assert_equal(pipeline, native)


@pytest.mark.long
@pytest.mark.parametrize("reserve_jobs", [True, False])
def test_a_detached_run_goes_on_without_its_driver(
    ray_cluster: Any, pipeline: ModuleType, native: ModuleType, reserve_jobs: bool
) -> None:
    executor: Any = "ray"
    options = OPTIONS | {"reserve_jobs": reserve_jobs}
    run = djdist.populate(pipeline, executor=executor, detach=True, **options)
    wait_until(lambda: len(pipeline.Filtered()) > 2, "some keys downstream")
    psutil.Process(pid_of_ray_actor("DriverHost")).kill()
    errors = sorted((table, str(key), message) for table, key, message in run.wait()["error_list"])
    assert whole.rows(pipeline) == whole.rows(native)
    if reserve_jobs:  # those before the loss are in the jobs table only
        assert {*errors} <= {*native.errors}
        assert_equal(pipeline, native)
    else:
        assert errors == native.errors


@pytest.mark.long
@pytest.mark.parametrize("executor", ["ray", "dask"])
def test_a_detached_run_goes_on_without_its_caller(
    request: pytest.FixtureRequest,
    pipeline: ModuleType,
    native: ModuleType,
    script: Script,
    executor: Any,
) -> None:
    caller = script(call(pipeline, f"detach=True, executor={executor!r}"), **address_of(request, executor))
    _, error = caller.communicate(timeout=SECONDS)
    assert caller.returncode == 0, error
    (run,) = [run for run in djdist.runs(executor) if pipeline.Recording.database in run.info.schema]
    result = run.wait()
    assert sorted((table, str(key), message) for table, key, message in result["error_list"]) == native.errors
    assert [*result["tables"]] == [*whole.TABLES]
    assert_equal(pipeline, native)


FEED = """
import time
import {module} as whole

for subject in range(3):
    whole.Subject.insert1({{"subject_id": subject}})
    for session in range(4):
        n = subject * 4 + session + 1
        whole.Session.insert1({{"subject_id": subject, "session": session, "n": n}})
        whole.Checked.insert(whole.Recording - whole.Checked, ignore_extra_fields=True)
    while len(whole.Recording()) + len(whole.Recording.jobs.errors) < n:
        time.sleep(0.05)
whole.Checked.insert(whole.Recording - whole.Checked, ignore_extra_fields=True)
"""


@pytest.mark.long_on("ray")
@pytest.mark.long_on("dask")
@pytest.mark.parametrize("executor", ["processes", "ray", "dask"])
def test_a_run_that_watches_makes_what_others_insert_all_the_time(
    request: pytest.FixtureRequest, declared: Callable[..., ModuleType], script: Script, executor: str
) -> None:
    options = "processes=2" if executor == "processes" else f"executor={executor!r}"
    environment = address_of(request, executor) if executor != "processes" else {}
    pipeline, native = declared(), declared(longest_seconds=0)
    watching = script(call(pipeline, f"watch=True, poll_seconds=0.5, {options}"), **environment)
    feeding = script(FEED.format(module=pipeline.__name__))
    _, error = feeding.communicate(timeout=SECONDS)
    assert feeding.returncode == 0, error
    for name in ("Subject", "Session"):
        getattr(native, name).insert(getattr(pipeline, name)())
    populate_natively(native, whole.MAKE_KWARGS)
    native.Checked.insert(native.Recording(), ignore_extra_fields=True)
    populate_natively(native, whole.MAKE_KWARGS)
    expected = number_of_rows(native)
    wait_until(lambda: watching.poll() is not None or number_of_rows(pipeline) == expected, "all rows")
    watching.send_signal(signal.SIGTERM)
    _, error = watching.communicate(timeout=SECONDS)
    assert (watching.returncode, reserved(pipeline)) == (1, 0), error
    rows, of_native = whole.rows(pipeline), whole.rows(native)
    assert all(rows[name] == of_native[name] for name in whole.STREAMED)


def number_of_rows(pipeline: ModuleType) -> dict[str, int]:
    return {name: len(getattr(pipeline, name)()) for name in whole.TABLES}


COMMAND = """
import sys
from djdist.__main__ import main

sys.argv = ["djdist", "populate", {module!r}, "--watch", "--poll-seconds", "0.5"]
main()
"""


@pytest.mark.long
@pytest.mark.on("processes")
def test_the_command_that_watches_is_ended_by_sigterm(
    pipeline: ModuleType, declared: Callable[..., ModuleType], script: Script
) -> None:
    native = declared(longest_seconds=0)
    whole.fill(native)
    process = script(COMMAND.format(module=pipeline.__name__))
    populate_natively(native, {})  # the command has no keyword arguments for make() either
    expected = number_of_rows(native)
    wait_until(lambda: number_of_rows(pipeline) == expected, "all rows")
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=SECONDS)
    assert (process.returncode, reserved(pipeline)) == (143, 0), error


MANY = """
import {module} as whole

options = {{"reserve_jobs": True, "watch": True, "poll_seconds": 0.5, "processes": 2}}
djdist.populate([whole.Recording, whole.Shape], **options)
"""


@pytest.mark.long
@pytest.mark.on("processes")
@pytest.mark.timeout(600)
def test_a_run_that_watches_keeps_its_size(declared: Callable[..., ModuleType], script: Script) -> None:
    pipeline = declared(longest_seconds=0)
    watching = psutil.Process(script(MANY.format(module=pipeline.__name__)).pid)
    pipeline.Subject.insert1({"subject_id": 0})

    def size_after(first: int, keys: int) -> int:
        sessions = range(first, first + keys // 4)
        pipeline.Session.insert({"subject_id": 0, "session": n, "n": 5 * n + 1} for n in sessions)
        wait_until(lambda: len(pipeline.Shape()) == 3 * (sessions[-1] + 1), "all rows", 3 * SECONDS)
        return int(watching.memory_info().rss)

    size = size_after(0, 1000)
    assert size_after(250, 3000) < size + 8 * 2**20
