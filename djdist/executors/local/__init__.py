"""This machine: an executor, in a folder of what changes for reasons of its own."""

from djdist.executors.local.executor import LocalExecutor

__all__ = ["LocalExecutor"]
