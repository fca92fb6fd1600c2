"""Whether a worker can make a table's keys at all, seen before any job is touched."""

import platform
from typing import Any

from djdist._job import Report
from djdist.database.errors import RIGHTS, is_denial
from djdist.database.job_statements import JobStatements
from djdist.errors import WorkerSetupError
from djdist.pipeline.rights import lacking_right

CURES = (
    "Install the pipeline's package on every node, or send it along "
    '(Ray: RayExecutor(runtime_env={"working_dir": "."}), Dask: client.upload_file(...)), '
    "or pickle it by value: cloudpickle.register_pickle_by_value(module)."
)
ENVIRONMENT = (
    "What its modules need besides code, such as environment variables and files, must be on every node too "
    '(Ray: RayExecutor(runtime_env={"env_vars": {...}}), Dask: start the workers with it).'
)


def trial(table: Any, statements: JobStatements | None) -> Report:
    """Check whether this worker may do what each job of a table will need."""
    lacking = lacking_right(table, statements) if statements else ""
    return Report(setup_error=f"{_place(type(table).__name__)}: {lacking}" if lacking else "")


def setup_error(name: str, error: Exception) -> str:
    """Say what kept this worker from loading a table or from connecting, and what cures it."""
    place = f"{_place(name)}: {type(error).__name__}: {error}"
    cure = _cure(error.__cause__ if isinstance(error, WorkerSetupError) and error.__cause__ else error)
    return f"{place}\n{cure}" if cure else place


def _cure(error: BaseException) -> str:
    if isinstance(error, (ImportError, AttributeError)):
        return CURES
    if is_denial(error):
        return RIGHTS
    return ENVIRONMENT if isinstance(error, (LookupError, OSError)) else ""


def _place(name: str) -> str:
    return f"A worker on {platform.node()} can't make {name}"
