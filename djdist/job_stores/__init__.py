"""Implementations of :class:`djdist.job_store.JobStore`."""
