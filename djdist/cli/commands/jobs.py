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
    app,
    examples,
    number,
    print_json,
)


@app.command(
    cls=Command,
    epilog=examples(
        f"djdist errors {TABLE} --traceback",
        f"djdist errors {TABLE} \"error_message LIKE 'OSError%'\" --json",
    ),
)
def errors(
    name: Name,
    restrictions: Restrictions = None,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where they were raised.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the last 1,000 errors by their message, with the keys.

    RESTRICTION is about jobs: their keys, error_message, host, completed_time …
    """
    from djdist.cli.choosing import jobs_seen, one_table
    from djdist.cli.printing import print_errors
    from djdist.jobs.history import last_errors

    jobs = jobs_seen(one_table(name), restrictions)
    found = last_errors(jobs)
    total = len(jobs.errors) if len(found) else 0
    print_errors(found if traceback else found.drop(columns="traceback"), total, as_json=as_json)


@app.command(
    cls=Command,
    epilog=examples(f"djdist retry {TABLE}", f"djdist retry {TABLE} \"error_message LIKE 'OSError%'\""),
)
def retry(name: Name, restrictions: Restrictions = None, as_json: AsJson = False) -> None:
    """Put errors back to pending, so that the next run tries them again.

    RESTRICTION is about jobs: their keys, error_message, host, completed_time …
    """
    from djdist.cli.choosing import one_table, restricted

    table = one_table(name)
    restricted(table.jobs, restrictions)
    count = table.jobs.retry(*restrictions or ())
    if as_json:
        print_json({"table": table.__name__, "retried": count})
    else:
        typer.echo(f"{number(count, 'error')} {'is' if count == 1 else 'are'} pending again")


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
