"""``Table.jobs`` as users see it while djdist is enabled."""

from collections.abc import Callable, Iterable
from contextlib import closing
from functools import reduce
from operator import and_
from types import ModuleType
from typing import Any

import datajoint as dj

from djdist.database.errors import is_being_declared
from djdist.errors import OptionError
from djdist.job_stores.jobs_table.conditions import COLUMNS
from djdist.job_stores.jobs_table.refreshing import Refreshing
from djdist.job_stores.jobs_table.store import JobsTable
from djdist.jobs.history import snapshot
from djdist.jobs.html import jobs_html, notice_html, rows_html
from djdist.pipeline.checks import check_has_schema, check_is_auto_populated, check_priority
from djdist.pipeline.jobs_table import condition_sql, declared_type, jobs_table_spec
from djdist.pipeline.rights import check_key_is_seen
from djdist.pipeline.tables import tables_of
from djdist.pipeline.targets import tables_meant


class Jobs(dj.Job):
    """The jobs table of an auto-populated table.

    It is DataJoint's ``~~table_name`` with its whole algebra; native workers may share
    it. Only ``refresh()`` is done otherwise: in one statement, however many the keys.
    """

    def _get_fk_derived_pk_attrs(self) -> list[tuple[str, str]]:
        """Declare each key attribute as where it comes from.

        What PostgreSQL reports of some types (enum, datetime, bool, float64) DataJoint can't read.
        """
        check_key_is_seen(self.target, self.target)
        attributes = self.target.heading
        reported = super()._get_fk_derived_pk_attrs()
        return [(name, declared_type(self.target, attributes[name]) or type_) for name, type_ in reported]

    def _repr_html_(self) -> str:
        """Show a notebook how the jobs stand; a part of them is shown as rows, as DataJoint does it."""
        table = type(self.target).__name__
        try:
            if not self.is_declared:
                return notice_html(table, "There is no jobs table: populate(reserve_jobs=True) declares it.")
            if self.restriction or not {*COLUMNS} <= {*self.heading.names}:
                return self._rows_html()
            return jobs_html(table, snapshot(self), *self.target.progress())
        except Exception as error:
            return notice_html(table, f"They can't be shown now: {error}")

    def _rows_html(self) -> str:
        """Show a part of the jobs as DataJoint does, which escapes nothing: an error may hold HTML."""
        display = self.connection._config.display
        shown = {name: name in self.primary_key for name in self.heading.names}
        rows = self.proj(*self.heading.non_blobs).to_dicts(limit=display.limit + 1)
        total = len(self) if display.show_tuple_count else None
        return rows_html(shown, rows[: display.limit], has_more=len(rows) > display.limit, total=total)

    def refresh(
        self,
        *restrictions: Any,
        delay: float = 0,
        priority: int | None = None,
        stale_timeout: float | None = None,
        orphan_timeout: float | None = None,
    ) -> dict[str, int]:
        """Bring the jobs up to date: add new keys, remove vanished ones, free dead reservations.

        Parameters
        ----------
        *restrictions
            Which keys of the key source to add.
        delay : float, optional
            Seconds until new jobs become due, by the database's clock. Default 0.
        priority : int, optional
            Priority of new jobs, the smaller the more urgent. Default:
            ``dj.config.jobs.default_priority``.
        stale_timeout : float, optional
            Seconds after which a job whose key has left the key source is removed; 0
            keeps them. Default: ``dj.config.jobs.stale_timeout``.
        orphan_timeout : float, optional
            Seconds after which a reservation of a native worker goes back to pending.
            Those of djdist go back by themselves when their lease runs out.

        Returns
        -------
        dict
            How many jobs were ``added``, ``removed``, ``orphaned`` and ``re_pended``.

        Raises
        ------
        OptionError
            The priority does not fit the jobs table.
        DatabaseError
            The database can't be reached.
        """
        options = refreshing(
            self, priority=priority, delay=delay, stale_timeout=stale_timeout, orphan_timeout=orphan_timeout
        )
        declare(self)
        with closing(JobsTable(jobs_table_spec(self, restrictions), refreshing=options)) as store:
            return store.refresh()

    def rescue(self) -> int:
        """Put what runs hold that died, with their lease run out, back to pending at once.

        Each run and each ``refresh()`` does it too.

        Returns
        -------
        int
            How many jobs.

        Raises
        ------
        DatabaseError
            The database can't be reached.
        """
        return self._changed(JobsTable.rescue)

    def retry(self, *restrictions: Any) -> int:
        """Put errors back to pending, with their priority, in one statement.

        Parameters
        ----------
        *restrictions
            Which of them, as in ``jobs.errors & restriction``. Default: all.

        Returns
        -------
        int
            How many.

        Raises
        ------
        DatabaseError
            The database can't be reached.
        """
        return self._changed(lambda store: store.retry(self._condition(restrictions)))

    def ignore_where(self, *restrictions: Any) -> int:
        """Leave pending jobs and errors out of all runs, in one statement.

        Unlike ``ignore(key)``, it leaves alone jobs that somebody has reserved, and adds none.

        Parameters
        ----------
        *restrictions
            Which of them, as in ``jobs & restriction``; at least one.

        Returns
        -------
        int
            How many.

        Raises
        ------
        OptionError
            There is no restriction.
        DatabaseError
            The database can't be reached.
        """
        if not restrictions:
            raise OptionError('ignore_where() needs a restriction: jobs.ignore_where("subject_id = 3")')
        return self._changed(lambda store: store.ignore(self._condition(restrictions)))

    def _changed(self, change: Callable[[JobsTable], int]) -> int:
        if not self.is_declared:
            return 0
        with closing(JobsTable(jobs_table_spec(self))) as store:
            return change(store)

    def _condition(self, restrictions: tuple[Any, ...]) -> str:
        return condition_sql(reduce(and_, restrictions, self & "TRUE"))


def refreshing(
    table: dj.Table,
    *,
    priority: int | None = None,
    delay: float = 0,
    stale_timeout: float | None = None,
    orphan_timeout: float | None = None,
) -> Refreshing:
    """Fill up what a refresh was given from the settings of ``dj.config.jobs``."""
    settings = table.connection._config.jobs
    priority = settings.default_priority if priority is None else priority
    check_priority(table, priority)
    return Refreshing(
        priority=int(priority),
        delay_seconds=delay,
        stale_seconds=settings.stale_timeout if stale_timeout is None else stale_timeout,
        orphan_seconds=orphan_timeout or 0,
    )


def jobs_of(table: Any) -> Jobs:
    """Return a table's jobs, with the jobs table declared if it isn't yet.

    One object serves all uses of a class, restricted or not, because making one asks the database much.
    """
    jobs = _jobs.get(type(table))
    if jobs is None or jobs.connection is not table.connection or jobs.database != table.database:
        jobs = _jobs[type(table)] = Jobs(type(table)())
    declare(jobs)
    return jobs


def jobs_to_look_at(table: Any) -> dj.Job:
    """Return a table's jobs without declaring the jobs table; a part of some jobs is given as it is.

    Raises
    ------
    OptionError
        It is no table that has jobs, or a part of one.
    """
    if isinstance(table, dj.Job):
        return table
    table = table() if isinstance(table, type) else table
    check_is_auto_populated(table)
    check_has_schema(table)
    if table.restriction:
        raise OptionError(
            f"{type(table).__name__} is restricted: give the table, or restrict its jobs instead, such as "
            "Table.jobs & \"completed_time > '2026-11-01'\""
        )
    return Jobs(table)


def all_jobs_to_look_at(targets: Iterable[Any]) -> list[dj.Job]:
    """Return the jobs of all auto-populated tables of modules, schemas and lists, each table's once.

    Raises
    ------
    OptionError
        One of them has no such table.
    """
    tables = (table for target in targets for table in _tables_meant(target))
    found = [jobs_to_look_at(table) for table in tables]
    return [*{jobs.full_table_name: jobs for jobs in reversed(found)}.values()][::-1]


def _tables_meant(target: Any) -> list[Any]:
    if isinstance(target, ModuleType):
        return tables_of(target)
    if isinstance(target, list | tuple | set):
        return [table for one in target for table in _tables_meant(one)]
    return tables_meant(target) if isinstance(target, dj.Schema) else [target]


def declare(jobs: dj.Job) -> None:
    """Declare a jobs table that isn't there yet, while others may do the same."""
    if _is_declared(jobs):
        return
    try:
        jobs.declare()  # where another one is at it, this waits for it
    except Exception:
        if not _is_declared(jobs):
            raise


def _is_declared(jobs: dj.Job) -> bool:
    try:
        return bool(jobs.is_declared)
    except Exception as error:
        if is_being_declared(error):
            return False
        raise


_jobs: dict[type, Jobs] = {}
