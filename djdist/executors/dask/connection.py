"""The way to a Dask cluster: the client that is there, or a cluster of one's own."""

from contextlib import ExitStack, closing, suppress

import dask
import distributed

from djdist._executor import default_slots
from djdist.errors import ClusterError, OptionError
from djdist.executors.dask.cluster import own_cluster

PATIENT_WITH_WORKERS = {"distributed.deploy.lost-worker-timeout": "1000 days"}
"""Else a cluster on this machine drops a worker that is being restarted so long after an earlier restart."""


class Connection:
    """Leads to the cluster of a client, of an address, of this process, or else to one that it starts.

    Attributes
    ----------
    client : distributed.Client
        Once it was opened, the cluster's.
    """

    client: distributed.Client

    def __init__(self, cluster: distributed.Client | str | None) -> None:
        self._cluster = cluster
        self._started = ExitStack()

    def __str__(self) -> str:
        return str(self._cluster or getattr(self, "client", None) or "auto")

    def open(self) -> None:
        """Find the cluster, or start one."""
        joined = self.joined()
        if joined is None or isinstance(joined.cluster, distributed.LocalCluster):
            self._started.enter_context(dask.config.set(PATIENT_WITH_WORKERS))
        self.client = joined or self._started_client()

    def close(self) -> None:
        """End the cluster that was started."""
        self._started.close()

    @property
    def lasts(self) -> bool:
        """Whether there is a cluster that was not started here."""
        return bool(self._cluster or default_client() or configured_address())

    def joined(self) -> distributed.Client | None:
        """Return the client of the cluster that is there, None where one has to be started."""
        client = self._cluster or default_client() or configured_address()
        if isinstance(client, distributed.Client):
            return _blocking(client)
        try:
            return client_at(client) if client else None
        except (OSError, ValueError, distributed.TimeoutError) as error:
            raise ClusterError(
                f"Can't reach the Dask scheduler at {client}: {error}. "
                "Check the address, or leave it out to start a cluster on this machine."
            ) from error

    def _started_client(self) -> distributed.Client:
        cluster = self._started.enter_context(own_cluster(default_slots()))
        return self._started.enter_context(closing(distributed.Client(cluster, set_as_default=False)))


_clients: dict[str, distributed.Client] = {}


def client_at(address: str) -> distributed.Client:
    """Return this process's client of a scheduler, which is kept for handles of runs and for later calls."""
    if address not in _clients or _clients[address].status != "running":
        _clients[address] = distributed.Client(address, set_as_default=False)
    return _clients[address]


def _blocking(client: distributed.Client) -> distributed.Client:
    if client._asynchronous:
        raise OptionError(
            f"{client!r} is asynchronous, and populate() waits for its answers: make a client without "
            "asynchronous=True, or give the scheduler's address, executor=djdist.DaskExecutor(address)."
        )
    return client


def default_client() -> distributed.Client | None:
    """Return the client of this process or, in a task, that of the cluster that runs it."""
    for find in (distributed.default_client, _client_of_task):
        with suppress(ValueError):
            found: distributed.Client = find()
            return found
    return None


def _client_of_task() -> distributed.Client:
    distributed.get_worker()
    return distributed.get_client()


def configured_address() -> str | None:
    address: str | None = dask.config.get("scheduler-address", None)
    return address
