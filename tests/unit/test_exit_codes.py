"""Which errors the same command may outlast, so that a service tries it again."""

from __future__ import annotations

import pickle

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
        (WorkerSetupError("Connection refused", may_pass=True), True),
        (ValueError(), False),
    ],
)
def test_what_is_away_may_be_there_later(error: Exception, expected: bool) -> None:
    from djdist.cli.app import may_pass

    assert may_pass(error) == expected
    assert may_pass(pickle.loads(pickle.dumps(error))) == expected  # as from a driver on a cluster
