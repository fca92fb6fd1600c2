from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datajoint as dj
import pytest

import djdist
from djdist import _activation as activation


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    activation._check_datajoint.cache_clear()
    yield
    activation._check_datajoint.cache_clear()
    djdist.disable()


def commit_elsewhere(
    self: Any, key: Any, jobs: Any, suppress_errors: Any, return_exception_objects: Any, make_kwargs: Any
) -> None:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("owner", "name", "other"),
    [
        (dj.AutoPopulate, "_populate1", lambda self, key: None),
        (dj.AutoPopulate, "_populate1", commit_elsewhere),
        (dj.jobs, "_get_job_version", lambda: ""),
        (dj.Connection, "start_transaction", None),
    ],
)
def test_a_datajoint_that_works_otherwise_is_refused(
    owner: Any, name: str, other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, other)
    with pytest.raises(djdist.IncompatibleDataJointError, match=f"{name} of DataJoint {dj.__version__}"):
        djdist.enable()
    assert vars(dj.AutoPopulate)["populate"] is activation._native["populate"]


def test_this_datajoint_is_known() -> None:
    djdist.enable()
