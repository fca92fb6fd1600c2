"""Dask: an executor, in a folder of what changes for reasons of its own."""

from djdist.executors.dask.executor import DaskExecutor

__all__ = ["DaskExecutor"]
