"""The worker: makes keys and finishes their jobs, and never raises."""

from djdist.worker.group import Workplace, one_at_a_time
from djdist.worker.making import is_making
from djdist.worker.parcel import Parcel, leave

__all__ = ["Parcel", "Workplace", "is_making", "leave", "one_at_a_time"]
