"""The worker: makes keys and finishes their jobs, and never raises."""

from djdist.worker.group import Workplace
from djdist.worker.making import load_early
from djdist.worker.parcel import Parcel, leave

__all__ = ["Parcel", "Workplace", "leave", "load_early"]
