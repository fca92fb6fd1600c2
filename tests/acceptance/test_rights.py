"""The rights that docs/ names are enough, and what is missing is said before a job is touched."""

from __future__ import annotations

import importlib
import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import datajoint as dj
import pytest

import djdist
import lab as pipelines
from servers import Server

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "database-rights.md"
PASSWORD = "of an account with few rights"
EVERY_ROLE = ("driver", "worker")
LogIn = Callable[[str], ModuleType]
AsWorkers = Callable[[str], None]


def grants(backend: str) -> list[tuple[str, str]]:
    """Read which rights the page gives to whom."""
    mysql, postgresql = re.findall(r"```sql\n(.*?)```", PAGE.read_text(), re.DOTALL)
    lines = {"mysql": mysql, "postgresql": postgresql}[backend].splitlines()
    return [(what, whom) for what, whom in (line.rstrip(";").split(" TO ") for line in lines)]


@dataclass
class Accounts:
    """Creates accounts that have the rights of the page's roles on `Stats` and `Fragile`."""

    server: Server
    schema: str
    admin: Any
    made: list[str] = field(default_factory=list)

    def create(self, *roles: str) -> str:
        name = f"djdist_{uuid.uuid4().hex[:8]}"
        self.made.append(self._quoted(name))
        how = {"mysql": "USER {} IDENTIFIED BY '{}'", "postgresql": "ROLE {} LOGIN PASSWORD '{}'"}
        self._do("CREATE " + how[self.server.backend].format(self._quoted(name), PASSWORD))
        for what, whom in grants(self.server.backend):
            if any(role in whom for role in roles):
                self._do(f"{self._here(what)} TO {self._quoted(name)}")
                if "stats" in what and "item" not in what:
                    self._do(f"{self._here(what.replace('stats', 'fragile'))} TO {self._quoted(name)}")
        return name

    def revoke(self, right: str, table: str, name: str) -> None:
        self._do(f"REVOKE {right} ON {self._full_name(table)} FROM {self._quoted(name)}")

    def grant(self, right: str, table: str, name: str) -> None:
        self._do(f"GRANT {right} ON {self._full_name(table)} TO {self._quoted(name)}")

    def drop(self) -> None:
        for account in self.made:
            if self.server.backend == "postgresql":
                self._do(f"DROP OWNED BY {account}")
            self._do(f"DROP {'USER' if self.server.backend == 'mysql' else 'ROLE'} {account}")

    def _here(self, sql: str) -> str:
        return sql.replace("`lab`", f"`{self.schema}`").replace('"lab"', f'"{self.schema}"')

    def _full_name(self, table: str) -> str:
        return str(self.admin.adapter.make_full_table_name(self.schema, table))

    def _quoted(self, name: str) -> str:
        return f"'{name}'@'%'" if self.server.backend == "mysql" else f'"{name}"'

    def _do(self, sql: str) -> None:
        self.admin.query(sql.replace("%", "%%") if self.server.backend == "mysql" else sql)


@pytest.fixture
def accounts(lab: ModuleType, server: Server) -> Iterator[Accounts]:
    """Accounts on a filled pipeline whose jobs tables are declared."""
    pipelines.fill(lab)
    assert len(lab.Stats.jobs) == len(lab.Fragile.jobs) == 0
    with server.connect() as admin:
        accounts = Accounts(server, lab.SCHEMA, admin)
        yield accounts
        accounts.drop()


@pytest.fixture
def log_in(lab: ModuleType, connection: Any) -> LogIn:
    """Makes an account that of this process, and gives the pipeline as the account sees it."""

    def log_in(name: str) -> ModuleType:
        connection.conn_info.update(user=name, passwd=PASSWORD)
        connection.connect()
        assert name in connection.get_user()
        pipelines.forget(lab)
        return importlib.import_module(lab.__name__)

    return log_in


@pytest.fixture
def as_workers(server: Server, monkeypatch: pytest.MonkeyPatch) -> AsWorkers:
    """Makes an account the one of all processes that are started from now on."""

    def as_workers(name: str) -> None:
        settings = {
            "DJ_BACKEND": server.backend,
            "DJ_HOST": server.host,
            "DJ_PORT": str(server.port),
            "DJ_USER": name,
            "DJ_PASS": PASSWORD,
            "DJ_USE_TLS": str(server.use_tls).lower(),
            **({"DJ_DATABASE_NAME": server.database_name} if server.database_name else {}),
        }
        for variable, value in settings.items():
            monkeypatch.setenv(variable, value)
        monkeypatch.setattr(djdist.config, "ship_credentials", False)

    return as_workers


def rows(server: Server, table: Any) -> list[dict[str, Any]]:
    """Read a table as an account that may."""
    with server.connect() as admin:
        found: list[dict[str, Any]] = dj.FreeTable(admin, table.full_table_name).to_dicts()
    return found


class TestEnough:
    def test_for_a_driver_and_workers_of_their_own(
        self,
        accounts: Accounts,
        log_in: LogIn,
        as_workers: AsWorkers,
    ) -> None:
        driver, worker = accounts.create("driver"), accounts.create("worker")
        lab = log_in(driver)
        as_workers(worker)
        options = {"reserve_jobs": True, "suppress_errors": True}
        with djdist.LocalExecutor(processes=2) as executor:
            assert lab.Stats.populate(executor=executor, **options)["success_count"] == 6
            assert len(lab.Stats.Item()) == 18
            made = lab.Fragile.populate(executor=executor, **options)
            assert (made["success_count"], len(made["error_list"])) == (5, 1)
            (error,) = lab.Fragile.jobs.errors.to_dicts()
            assert error["error_message"] == "ValueError: bad n 5"
            assert error["user"].startswith(driver)
            dj.FreeTable(accounts.admin, lab.Fix.full_table_name).insert1(
                {name: error[name] for name in lab.Fix.primary_key}
            )
            assert lab.Fragile.jobs.retry() == 1
            assert lab.Fragile.populate(executor=executor, **options) == {
                "success_count": 1,
                "error_list": [],
            }
        assert len(lab.Fragile.jobs) == 0

    def test_for_workers_that_keep_completed_jobs_and_may_delete_none(
        self,
        accounts: Accounts,
        log_in: LogIn,
        as_workers: AsWorkers,
    ) -> None:
        lab = log_in(accounts.create("driver"))
        worker = accounts.create("worker")
        accounts.revoke("DELETE", "~~stats", worker)
        as_workers(worker)
        with dj.config.override(jobs__keep_completed=True), djdist.LocalExecutor(processes=2) as executor:
            assert lab.Stats.populate(reserve_jobs=True, executor=executor)["success_count"] == 6
        assert len(lab.Stats.jobs.completed) == 6

    def test_for_one_account_of_both_roles(self, accounts: Accounts, log_in: LogIn, executor: Any) -> None:
        lab = log_in(accounts.create(*EVERY_ROLE))
        options = {"reserve_jobs": True, "suppress_errors": True, "executor": executor}
        assert lab.Stats.populate(lab.Session & "n < 4", **options)["success_count"] == 3
        assert lab.Stats.populate(**options)["success_count"] == 3
        assert len(lab.Fragile.populate(**options)["error_list"]) == 1
        assert lab.Fragile.jobs.retry("error_message LIKE 'ValueError%'") == 1

    @pytest.mark.long
    @pytest.mark.on("dask")
    def test_for_a_caller_that_only_watches_where_the_driver_is_on_the_cluster(
        self,
        accounts: Accounts,
        log_in: LogIn,
        as_workers: AsWorkers,
    ) -> None:
        distributed = pytest.importorskip("distributed")
        lab = log_in(accounts.create("watcher"))
        as_workers(accounts.create(*EVERY_ROLE))
        with (
            distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
            distributed.Client(cluster, set_as_default=False) as client,
        ):
            assert lab.Stats.populate(reserve_jobs=True, executor=client)["success_count"] == 6
        assert len(lab.Stats.Item()) == 18

    def test_for_a_watcher_who_changes_nothing(
        self, lab: ModuleType, server: Server, accounts: Accounts, log_in: LogIn
    ) -> None:
        lab.Fragile.populate(lab.Session & "n > 3", reserve_jobs=True, suppress_errors=True)
        lab.Fragile.jobs.refresh()
        before = rows(server, lab.Fragile.jobs)
        lab = log_in(accounts.create("watcher"))
        assert lab.Fragile.progress() == (4, 6)
        counts = lab.Fragile.jobs.progress()
        assert (counts["pending"], counts["error"], counts["total"]) == (3, 1, 4)
        assert lab.Fragile.jobs.errors.to_dicts()[0]["error_stack"].endswith("ValueError: bad n 5\n")
        for refresh in (True, False):
            with pytest.raises(djdist.WorkerSetupError, match="needs UPDATE on its jobs table"):
                lab.Fragile.populate(reserve_jobs=True, refresh=refresh)
        for change in (lab.Fragile.jobs.refresh, lab.Fragile.jobs.retry):
            with pytest.raises(djdist.DatabaseError, match=r"denied(.|\n)*A driver needs SELECT, INSERT"):
                change()
        assert rows(server, lab.Fragile.jobs) == before
        assert len(lab.Fragile()) == 2


class TestMissing:
    def test_of_a_worker_is_named_before_a_job_is_touched(
        self, lab: ModuleType, server: Server, accounts: Accounts, log_in: LogIn, executor: Any
    ) -> None:
        lab.Stats.jobs.refresh()
        before = rows(server, lab.Stats.jobs)
        account = accounts.create(*EVERY_ROLE)
        lab = log_in(account)
        for right, table, place in [
            ("UPDATE", "~~stats", "its jobs table"),
            ("DELETE", "~~stats", "its jobs table"),
            ("INSERT", "__stats", lab.Stats.full_table_name),
            ("INSERT", "__stats__item", lab.Stats.Item.full_table_name),
        ]:
            accounts.revoke(right, table, account)
            with pytest.raises(
                djdist.WorkerSetupError, match=f"needs {right} on {place}: .*denied"
            ) as raised:
                lab.Stats.populate(reserve_jobs=True, suppress_errors=True, executor=executor)
            assert '"Database rights"' in str(raised.value)
            assert rows(server, lab.Stats.jobs) == before
            accounts.grant(right, table, account)
        assert lab.Stats.populate(reserve_jobs=True, executor=executor)["success_count"] == 6

    def test_of_a_driver_is_one_clear_error(
        self, lab: ModuleType, accounts: Accounts, log_in: LogIn, as_workers: AsWorkers
    ) -> None:
        vanished = {"subject_id": 9, "session_date": "2026-01-01", "status": "error", "priority": 5}
        dj.FreeTable(accounts.admin, lab.Stats.jobs.full_table_name).insert1(vanished)
        driver = accounts.create("driver")
        lab = log_in(driver)
        as_workers(accounts.create("worker"))
        with djdist.LocalExecutor(processes=2) as executor:
            for right in ("INSERT", "DELETE", "UPDATE"):
                accounts.revoke(right, "~~stats", driver)
                with pytest.raises(
                    djdist.DatabaseError, match=r"denied(.|\n)*needs SELECT, INSERT, UPDATE and"
                ):
                    lab.Stats.populate(reserve_jobs=True, suppress_errors=True, executor=executor)
                accounts.grant(right, "~~stats", driver)
                assert not lab.Stats.jobs.reserved
            assert len(lab.Stats()) == 0
            assert lab.Stats.populate(reserve_jobs=True, executor=executor)["success_count"] == 6

    @pytest.mark.long
    def test_does_not_come_from_an_account_that_was_sent_earlier(
        self, lab: ModuleType, accounts: Accounts, as_workers: AsWorkers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        as_workers(accounts.create("watcher"))
        with djdist.LocalExecutor(processes=2) as executor:
            monkeypatch.setattr(djdist.config, "ship_credentials", True)
            assert lab.Stats.populate(reserve_jobs=True, executor=executor, max_calls=4)["success_count"] == 4
            monkeypatch.setattr(djdist.config, "ship_credentials", False)
            with pytest.raises(djdist.WorkerSetupError, match="needs UPDATE on its jobs table"):
                lab.Stats.populate(reserve_jobs=True, executor=executor)

    def test_of_an_account_that_sees_nothing_is_one_clear_error(
        self, lab: ModuleType, accounts: Accounts, as_workers: AsWorkers
    ) -> None:
        as_workers(accounts.create())
        with pytest.raises(djdist.WorkerSetupError, match=r"could not be created\. Check permissions"):
            lab.Stats.populate(reserve_jobs=True, processes=2)
        assert len(lab.Stats.jobs) == 0

    @pytest.mark.parametrize("reserve_jobs", [True, False])
    def test_what_hides_primary_keys_is_said_instead_of_made_wrong(
        self,
        server: Server,
        accounts: Accounts,
        log_in: LogIn,
        reserve_jobs: bool,
    ) -> None:
        if server.backend == "mysql":
            pytest.skip("SELECT shows them there")
        for table in ("__stats", "session"):
            account = accounts.create("watcher")
            accounts.revoke("REFERENCES", table, account)
            lab = log_in(account)
            with pytest.raises(
                djdist.DatabaseError, match=r"can't see the primary key of .* GRANT REFERENCES"
            ):
                lab.Stats.populate(reserve_jobs=reserve_jobs)
