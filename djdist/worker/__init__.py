"""The worker: makes keys and finishes their jobs, and never raises."""

from djdist.worker.group import WorkerContext, one_at_a_time
from djdist.worker.make_session import is_making
from djdist.worker.pace import Pace
from djdist.worker.task import WorkerTask, give_back_and_exit

__all__ = ["Pace", "WorkerContext", "WorkerTask", "give_back_and_exit", "is_making", "one_at_a_time"]
