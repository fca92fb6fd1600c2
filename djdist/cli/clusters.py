"""Which executor the options of a command mean, and the runs on it."""

import shlex
from typing import Any

import djdist
from djdist.errors import OptionError
from djdist.executors import executor_class

FLAGS = {
    "address": "--address",
    "num_cpus": "--num-cpus",
    "num_gpus": "--num-gpus",
    "memory": "--memory",
    "resources": "--resource",
}
ON_DASK = ("address", "resources")


def executor_of(name: str | None, address: str | None, **needs: Any) -> Any:
    """Return what ``executor=`` takes; ``needs`` are what one key needs, None where it wasn't said.

    Raises
    ------
    OptionError
        The executor doesn't take one of them.
    """
    given = {option: value for option, value in {"address": address, **needs}.items() if value is not None}
    if not given:
        return name
    chosen = name or djdist.config.executor
    for option in given:
        _check_takes(chosen, option)
    executor: Any = executor_class(chosen)
    return executor(given.pop("address", None), **given)


def _check_takes(executor: Any, option: str) -> None:
    takers = ("ray", "dask") if option in ON_DASK else ("ray",)
    if executor not in takers:
        wanted = " or ".join(f"--executor {taker}" for taker in takers)
        raise OptionError(f"{FLAGS[option]} goes with {wanted}, not with {executor!r}.")


def resources_of(given: list[str] | None) -> dict[str, float] | None:
    """Read resources, each as NAME=N.

    Raises
    ------
    OptionError
        One is written otherwise.
    """
    if not given:
        return None
    try:
        pairs = [resource.rsplit("=", 1) for resource in given]
        return {name: float(number) for name, number in pairs}
    except ValueError as error:
        raise OptionError(f"--resource {' '.join(given)!r} must be NAME=N, such as camera=1.") from error


def run_of(run_id: str, executor: Any) -> "djdist.Run":
    """Find a run by its id.

    Raises
    ------
    OptionError
        It isn't there.
    """
    found = {run.info.id: run for run in djdist.runs(executor)}
    if run_id not in found:
        there = f"there are {', '.join(found)}" if found else "there are none"
        raise OptionError(f"There is no run {run_id!r} on the cluster; {there}. `djdist runs` lists them.")
    return found[run_id]


def flags_of(name: str | None, address: str | None) -> str:
    """Write the options that find the same cluster again."""
    chosen = {"--executor": name or djdist.config.executor, "--address": address}
    return " ".join(
        f"{flag} {shlex.quote(value)}" for flag, value in chosen.items() if isinstance(value, str)
    )
