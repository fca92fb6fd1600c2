"""The worker: makes keys and finishes their jobs, and never raises."""

from djdist.worker.group import Workplace
from djdist.worker.parcel import Parcel, leave

__all__ = ["Parcel", "Workplace", "leave"]
