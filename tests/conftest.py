from __future__ import annotations

import os
import signal
import sys
import tempfile
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, cast
from zlib import crc32

import datajoint as dj
import hypothesis
import pytest

import lab as pipelines
import servers
import strays

TESTS = Path(__file__).parent


def unavailable(reason: str) -> NoReturn:
    """Skip; where everything is required (in CI), fail."""
    if os.environ.get("DJDIST_TEST_REQUIRE_ALL", "0") not in {"", "0"} or os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def thorough(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--thorough"))


@dataclass
class SharedSchema:
    """The pipeline's schema of a server, which one test after the other finds empty."""

    server: servers.Server
    folder: Path
    name: str = ""
    tables: set[str] = field(default_factory=set)

    def declared(self) -> ModuleType:
        if self.name:
            return pipelines.declared_before(self.name)
        self.name = f"djdist_{uuid.uuid4().hex[:8]}"
        lab = pipelines.declare(self.name, self.folder)
        self.tables = self.server.tables(self.name)
        return lab

    def empty(self) -> None:
        name, self.name = self.name, ""  # the next test gets another one, unless this one gets empty
        try:
            self.server.empty_schema(name, self.tables)
            self.name = name
        except LookupError:
            self.server.drop_schema(name)

    def drop(self) -> None:
        if self.name:
            self.server.drop_schema(self.name)
        self.name = ""


@pytest.fixture(scope="session")
def shared_schemas() -> dict[int, SharedSchema]:
    """The pipeline's schema on each server that a test has met."""
    return {}


@pytest.fixture(scope="session", params=["mysql", "postgresql", "real-mysql", "new-mariadb"])
def server(
    request: pytest.FixtureRequest, shared_schemas: dict[int, SharedSchema]
) -> Iterator[servers.Server]:
    """Each database in turn: a test that takes it runs once on each, a few also on others' servers."""
    kind = cast("servers.Kind", request.param)
    with ExitStack() as stack:
        try:
            started = stack.enter_context(servers.running(kind))
        except servers.UnavailableError as reason:
            if kind in FEW_ON:
                pytest.skip(str(reason))
            unavailable(str(reason))
        yield started
        if schema := shared_schemas.pop(id(started), None):
            schema.drop()


@pytest.fixture
def connection(server: servers.Server) -> Iterator[Any]:
    """The process's DataJoint connection, on this server, with the settings put back afterwards."""
    settings = {name: getattr(dj.config, name) for name in ("database", "jobs", "stores")}
    with dj.config.override(**settings, safemode=False):
        connection = server.configure()
        yield connection
        connection.close()


@pytest.fixture
def new_schema_name(server: servers.Server) -> Iterator[Callable[[], str]]:
    """Gives names of schemas that don't exist yet, and drops those schemas at the end."""
    names: list[str] = []

    def new_name() -> str:
        names.append(f"djdist_{uuid.uuid4().hex[:8]}")
        return names[-1]

    yield new_name
    for name in names:
        server.drop_schema(name)


@pytest.fixture
def schema_name(new_schema_name: Callable[[], str]) -> str:
    return new_schema_name()


@pytest.fixture
def lab(
    connection: Any, server: servers.Server, shared_schemas: dict[int, SharedSchema], modules_folder: Path
) -> Iterator[ModuleType]:
    """The test pipeline, empty; all workers can import `lab.Square` and so on."""
    schema = shared_schemas.setdefault(id(server), SharedSchema(server, modules_folder))
    module = schema.declared()
    yield module
    pipelines.forget(module)
    schema.empty()


@pytest.fixture(scope="session")
def modules_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder whose modules this process and all processes that it starts can import."""
    folder = tmp_path_factory.mktemp("modules")
    paths = [str(folder), str(TESTS), str(TESTS.parent)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*paths, *sys.path])
        patch.setenv("PYTHONPATH", os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]))
        yield folder


@pytest.fixture(scope="session")
def ray_cluster(modules_folder: Path) -> Iterator[Any]:
    """A Ray cluster of two CPUs, and two GPUs by name, that this process is connected to."""
    try:
        import ray
    except ImportError as error:
        unavailable(f"{error}: pip install 'djdist[ray]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_agent_register_timeout_ms", "60000")  # or none starts on a busy machine
    # Ray puts sockets there, whose paths must stay short
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        from djdist.executors.ray.connection import init  # which tries again where a busy machine is too slow

        init(
            "local",
            num_cpus=2,
            num_gpus=2,
            include_dashboard=False,
            object_store_memory=200_000_000,
            namespace="djdist-tests",
            _system_config={"metrics_report_interval_ms": 1000},
            _temp_dir=folder,
        )
        yield ray
        ray.shutdown()


@pytest.fixture(scope="session")
def dask_client(modules_folder: Path) -> Iterator[Any]:
    """A client of a Dask cluster of two workers with one thread each."""
    try:
        import dask
        import distributed
    except ImportError as error:
        unavailable(f"{error}: pip install 'djdist[dask]'")
    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "1000 days"}),  # tests kill workers often
        tempfile.TemporaryDirectory(prefix="dask-", ignore_cleanup_errors=True) as folder,
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            dashboard_address=":0",
            local_directory=folder,
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.fixture(autouse=True)
def pythons_own_handler() -> Iterator[None]:
    """Python's handler of SIGINT: a background job of a shell ignores it, dask_jobqueue replaces it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pytest_configure(config: pytest.Config) -> None:
    examples = 400 if config.getoption("--thorough") else 40
    hypothesis.settings.register_profile("djdist", max_examples=examples, deadline=None)
    hypothesis.settings.load_profile("djdist")
    strays.mark_children()


@pytest.hookimpl(trylast=True)  # after the last fixtures are gone
def pytest_sessionfinish(session: pytest.Session) -> None:
    if left := strays.end_strays():
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED
        sys.stderr.write(
            "\nThe tests left these processes running, they were killed:\n" + "\n".join(left) + "\n"
        )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="each database with each executor in every test")
    parser.addoption("--fast", action="store_true", help="units and contracts without databases and clusters")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the long tests, pair databases and executors off, and let most run on one such pair only."""
    wanted = _belongs_to_short_run
    if config.getoption("--thorough"):
        wanted = _belongs_to_thorough_run
    elif config.getoption("--fast"):
        wanted = _belongs_to_fast_run
    chosen = [item for item in items if wanted(item)]
    if not config.getoption("--thorough"):
        chosen = _on_one_database(chosen)
    kept = {*chosen}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = sorted(chosen, key=_neighbourhood)


def _on_one_database(items: list[pytest.Item]) -> list[pytest.Item]:
    """Let a test that is not about databases run on one of them; its name decides which."""
    databases: defaultdict[str, set[str]] = defaultdict(set)
    for item in items:
        if not _on_all(item):
            databases[_test(item)].add(_database(item))
    chosen = {test: sorted(found)[crc32(test.encode()) % len(found)] for test, found in databases.items()}
    return [item for item in items if _on_all(item) or _database(item) == chosen[_test(item)]]


def _test(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def _database(item: pytest.Item) -> str:
    return str(_parameters(item).get("server", ""))


def _neighbourhood(item: pytest.Item) -> int:
    """Keep a server's tests together, which starts anew when it is met again, and a cluster's beside them.

    Of two processes that share the tests in this order the one meets Dask and the other Ray.
    """
    executors = _executors(item)
    database = _database(item) or (PAIRS[executors[0]] if executors else "")
    return NEIGHBOURHOODS.index(database)


def _on_all(item: pytest.Item) -> bool:
    is_about_databases = item.path.parent.name != "acceptance" or item.path.name in ABOUT_DATABASES
    return is_about_databases or _database(item) in FEW_ON


def _belongs_to_thorough_run(item: pytest.Item) -> bool:
    few = FEW_ON.get(_parameters(item).get("server", ""))
    return few is None or (item.path.name in few and {"ray", "dask"}.isdisjoint(_executors(item)))


def _belongs_to_short_run(item: pytest.Item) -> bool:
    if not _belongs_to_thorough_run(item):
        return False
    if item.path.name in LONG or item.get_closest_marker("long"):
        return False
    if any(mark.args[0] in item.name for mark in item.iter_markers("long_on")):
        return False
    server, executors = _parameters(item).get("server"), _executors(item)
    if server in FEW_ON:
        is_named = not SHORT_ON[server].isdisjoint(_test(item).split("::"))
        return is_named and (not executors or "local" in executors)
    if server is None or not executors:
        return True
    return bool(server == PAIRS[executors[0]])


def _belongs_to_fast_run(item: pytest.Item) -> bool:
    if item.path.name == "test_executors.py":
        executor = _parameters(item).get("case")
        return executor is not None and not executor.processes
    return item.path.parent.name in {"unit", "contract"} and "server" not in getattr(item, "fixturenames", ())


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}


def _executors(item: pytest.Item) -> list[str]:
    named = [str(value).removeprefix("executor=").strip("'") for value in _parameters(item).values()]
    named += [mark.args[0] for mark in item.iter_markers("on")]
    fixtures = getattr(item, "fixturenames", ())
    named += [executor for executor, cluster in CLUSTERS.items() if cluster in fixtures]
    return [name for name in named if name in PAIRS]


LONG = {"test_failures.py", "test_interrupts.py"}
ABOUT_DATABASES = {
    "test_costs.py",
    "test_lost_answers.py",
    "test_pipeline_equality.py",
    "test_plans.py",
    "test_results.py",
    "test_sessions.py",
}
"""Tests of these files run on each database."""

FEW_ON = {
    "real-mysql": {
        "test_job_stores.py",
        "test_pipeline_equality.py",
        "test_plans.py",
        "test_results.py",
        "test_retries.py",
        "test_sessions.py",
        "test_shared_transactions.py",
    },
    "new-mariadb": {
        "test_job_stores.py",
        "test_results.py",
        "test_sessions.py",
        "test_shared_transactions.py",
    },
}
"""The files that run on these servers, too."""

SHORT_ON = {
    "real-mysql": {
        "TestJobsTable",
        "TestHeldByOthers",
        "TestTablesOfARun",
        "TestLease",
        "test_what_fails_at_first_is_made_in_the_same_call",
        "test_results_are_those_of_native_populate",
    },
    "new-mariadb": {
        "TestLease",
        "test_a_make_that_outlasts_a_renewal_ends",
        "test_jobs_that_were_renewed_in_the_meantime_are_finished",
        "test_a_key_that_others_made_in_the_meantime_is_theirs",
    },
}
"""What the short run tries there: classes and tests."""

PAIRS = {"local": "postgresql", "processes": "mysql", "ray": "postgresql", "dask": "mysql"}
CLUSTERS = {"ray": "ray_cluster", "dask": "dask_client"}
NEIGHBOURHOODS = ["mysql", "new-mariadb", "", "real-mysql", "postgresql"]
