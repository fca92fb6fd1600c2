"""``djdist errors``, ``retry``, ``ignore``, ``refresh`` and ``rescue``: jobs of tables."""

from typing import Annotated

import typer

from djdist.cli.app import (
    TABLE,
    AsJson,
    Command,
    Name,
    NameOrModule,
    Names,
    Restrictions,
    Targets,
    app,
    examples,
    number,
    print_json,
)


@app.command(
    cls=Command,
    epilog=examples(
        "djdist errors my_pipeline",
        f"djdist errors {TABLE} --traceback",
        f"djdist errors {TABLE} \"error_message LIKE 'OSError%'\" --json",
    ),
)
def errors(
    name: Targets,
    restrictions: Restrictions = None,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where they were raised.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the last 1,000 errors by their message, with the keys.

    RESTRICTION is about jobs: their keys, error_message, host, completed_time …
    """
    from djdist.cli.choosing import jobs_meant, jobs_seen
    from djdist.cli.printing import print_errors
    from djdist.jobs.history import last_errors, names_of

    meant, conditions = jobs_meant(name, restrictions)
    seen = [jobs_seen(jobs, conditions) for jobs in meant]
    found = dict(zip(names_of(seen), map(last_errors, seen), strict=True))
    total = sum(len(jobs.errors) for jobs in seen if jobs.is_declared)
    print_errors(found, total, tracebacks=traceback, as_json=as_json)


@app.command(
    cls=Command,
    epilog=examples("djdist retry my_pipeline", f"djdist retry {TABLE} \"error_message LIKE 'OSError%'\""),
)
def retry(name: Targets, restrictions: Restrictions = None, as_json: AsJson = False) -> None:
    """Put errors back to pending, so that the next run tries them again.

    RESTRICTION is about jobs: their keys, error_message, host, completed_time …
    """
    from djdist.cli.choosing import jobs_meant, jobs_seen
    from djdist.jobs.history import names_of

    meant, conditions = jobs_meant(name, restrictions)
    for jobs in meant:
        jobs_seen(jobs, conditions)  # all of them are checked first
    counts = dict(zip(names_of(meant), (jobs.retry(*conditions) for jobs in meant), strict=True))
    if as_json:
        records = [{"table": table, "retried": count} for table, count in counts.items()]
        print_json(records[0] if len(records) == 1 else records)
        return
    of_tables = ", ".join(f"{count:,} of {table}" for table, count in counts.items() if count)
    of_tables = f": {of_tables}" if of_tables and len(counts) > 1 else ""
    total = sum(counts.values())
    typer.echo(f"{number(total, 'error')} {'is' if total == 1 else 'are'} pending again{of_tables}")


@app.command(cls=Command, epilog=examples(f"djdist ignore {TABLE} 'subject_id = 3'"))
def ignore(
    name: Name,
    restrictions: Annotated[list[str], typer.Argument(metavar="RESTRICTION", help="Which jobs, in SQL.")],
    as_json: AsJson = False,
) -> None:
    """Exclude pending jobs and errors from all runs; `djdist refresh` first makes jobs of new keys.

    RESTRICTION is about jobs: their keys, error_message, host, completed_time …
    """
    from djdist.cli.choosing import one_table, restricted

    table = one_table(name)
    restricted(table.jobs, restrictions)
    count = table.jobs.ignore_where(*restrictions)
    if as_json:
        print_json({"table": table.__name__, "ignored": count})
    else:
        typer.echo(f"{number(count, 'job')} {'is' if count == 1 else 'are'} ignored from now on")


@app.command(
    cls=Command, epilog=examples("djdist refresh my_pipeline", f"djdist refresh {TABLE} --priority 1")
)
def refresh(
    name: NameOrModule,
    restrictions: Restrictions = None,
    priority: Annotated[
        int | None, typer.Option(help="Priority of new jobs; smaller is more urgent.")
    ] = None,
    delay: Annotated[float, typer.Option(help="Seconds until new jobs become due.")] = 0,
    orphan_timeout: Annotated[
        float | None,
        typer.Option(help="Release what workers of plain DataJoint have held for more than N seconds."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bring jobs up to date: add new keys, remove vanished ones, release what dead runs hold."""
    from djdist.cli.choosing import all_tables, check

    options = {"priority": priority, "delay": delay, "orphan_timeout": orphan_timeout}
    records = []
    for table in all_tables([name]):
        check(table, restrictions or ())
        counts = table.jobs.refresh(*restrictions or (), **options)
        records.append({"table": table.__name__, **counts})
        if not as_json:
            told = ", ".join(f"{count:,} {what}" for what, count in counts.items())
            typer.echo(f"{table.__name__}: {told}")
    if as_json:
        print_json(records)


@app.command(cls=Command, epilog=examples("djdist rescue my_pipeline"))
def rescue(names: Names, as_json: AsJson = False) -> None:
    """Release now what dead runs hold; every run also does so by itself."""
    from djdist.cli.choosing import all_tables
    from djdist.jobs.table import jobs_to_look_at

    records = [
        {"table": table.__name__, "rescued": jobs_to_look_at(table).rescue()} for table in all_tables(names)
    ]
    if as_json:
        print_json(records)
        return
    for record in records:
        typer.echo(f"{record['table']}: {number(record['rescued'], 'job')} rescued")
