"""Implementations of :class:`djdist._job_store.JobStore`."""
