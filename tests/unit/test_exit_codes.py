"""Which errors the same command may outlast, so that a service tries it again."""

from __future__ import annotations

import pytest

from djdist.database.errors import RIGHTS
from djdist.errors import ClusterError, DatabaseError, OptionError, WorkerSetupError

pytest.importorskip("typer", reason="pip install 'djdist[cli]'")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (DatabaseError("Lost connection to the database"), True),
        (ClusterError("Can't reach the Dask scheduler"), True),
        (DatabaseError(f"ada can't insert. {RIGHTS}"), False),
        (DatabaseError("refuses the login: (using password: YES)"), False),
        (OptionError("There is no module"), False),
        (WorkerSetupError("The workers can't load it"), False),
        (ValueError(), False),
    ],
)
def test_what_is_away_may_be_there_later(error: Exception, expected: bool) -> None:
    from djdist.cli.app import is_unreachable

    assert is_unreachable(error) == expected
