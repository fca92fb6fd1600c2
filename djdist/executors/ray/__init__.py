"""Ray: an executor, in a folder of what changes for reasons of its own."""

from djdist.executors.ray.executor import RayExecutor

__all__ = ["RayExecutor"]
