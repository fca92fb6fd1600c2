"""Work on its way through the driver, which has no use for what it imports."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field

from djdist.job import Job, Report


@dataclass(frozen=True)
class PickledWork:
    """Work that is unpickled only where it is done."""

    pickled: bytes = field(repr=False)

    def __call__(self, jobs: Sequence[Job]) -> Report:
        """Make a group of jobs on a worker."""
        report: Report = pickle.loads(self.pickled)(jobs)
        return report
