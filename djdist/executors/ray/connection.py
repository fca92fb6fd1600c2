"""This process's connection to Ray: found, or made and ended with the last call that uses it."""

import logging
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from djdist.errors import ClusterError, OptionError
from djdist.executors.ray.modules import SENT_ALONG

logger = logging.getLogger(__name__)

PORT_SECONDS = 5.0
TOO_SLOW = "timed out during startup"
CLIENT_PORT = 10001


@dataclass
class _Joined:
    """A connection to Ray that djdist made, which ends with the last of the calls that use it."""

    address: str | None
    sent_along: dict[str, Any]
    job: str
    calls: int = 0


_connections: list[_Joined] = []
connecting = threading.RLock()


class Connection:
    """How an executor comes to its cluster.

    Parameters
    ----------
    address : str or None
        Where it is, as ``ray.init`` takes it.
    sent_along : dict
        The parts of a runtime environment that travel as this process connects.
    """

    def __init__(self, address: str | None, sent_along: dict[str, Any]) -> None:
        self.address = address
        self._sent_along = sent_along
        self._joined: _Joined | None = None

    @property
    def leads_anywhere(self) -> bool:
        """Whether any connection that this process has will do."""
        return self.address is None and not self._sent_along

    def join(self) -> None:
        """Use the connection of this process, or make one."""
        with connecting:  # Ray fails where two threads join at once
            if not ray.is_initialized():
                self._connect()
            else:
                self._check()
            self._joined = _joined_here()
            if self._joined:
                self._joined.calls += 1

    def _connect(self) -> None:
        try:
            address = self.address or os.environ.get("RAY_ADDRESS")
            _knock(address or "")
            _ask_for_token(address)
            sent_along: Any = {"runtime_env": self._sent_along} if self._sent_along else {}
            init(address, log_to_driver=False, logging_level=logging.WARNING, **sent_along)
            _hide_token()
        except Exception as error:  # Ray raises this class itself where a node takes too long to start
            raise ClusterError(
                f"Can't join the Ray cluster at {self.address or 'RAY_ADDRESS or this machine'}: {error}. "
                "Check the address with `ray status`, or leave it out to start a cluster on this machine. "
                "If the cluster wants a token, RAY_AUTH_MODE=token must be set before Ray is imported, "
                "and the token be in ~/.ray/auth_token."
            ) from error
        _connections[:] = [_Joined(self.address, self._sent_along, _job())]

    def _check(self) -> None:
        """Check that this process is connected to the cluster that was asked for."""
        joined = _joined_here()
        if self.address not in (None, "auto", joined and joined.address) and not _leads_here(self.address):
            raise OptionError(
                f"This process is connected to the Ray cluster at {gcs_address()}, not through "
                f"{self.address}: leave the address out to use that one, or call ray.shutdown() first."
            )
        if self._sent_along and not (joined and joined.sent_along == self._sent_along):
            raise OptionError(
                f"This process is connected to Ray already, and Ray sends {', '.join(self._sent_along)} "
                f"only when it connects: write ray.init(…, runtime_env={self._sent_along!r}) there, "
                "and leave it out of RayExecutor; or let RayExecutor connect, before anything else does."
            )

    def leave(self, before_it_ends: Callable[[], None]) -> None:
        """End the connection, if djdist made it and no other call uses it."""
        with connecting:
            joined, self._joined = self._joined, None
            if joined:
                joined.calls -= 1
            if joined and not joined.calls and joined is _joined_here():
                before_it_ends()
                ray.shutdown()


def _joined_here() -> _Joined | None:
    """Return the connection of this process, if djdist made it."""
    return next((joined for joined in _connections if joined.job == _job()), None)


def _job() -> str:
    job: str = ray.get_runtime_context().get_job_id() if ray.is_initialized() else ""
    return job


def gcs_address() -> str:
    address: str = ray.get_runtime_context().gcs_address
    return address


def is_sent_along(part: str, value: Any) -> bool:
    """Return whether a part of a runtime environment is on this machine, and not at a URI."""
    values = value if isinstance(value, list) else [value]
    return part in SENT_ALONG and not all("://" in str(value) for value in values)


def _knock(address: str) -> None:
    """Check that something listens there: Ray itself tries for a minute and a half, and fills the log."""
    if found := _host_and_port(address):
        socket.create_connection(found, timeout=PORT_SECONDS).close()


def _host_and_port(address: str) -> tuple[str, int] | None:
    scheme, _, place = address.rpartition("://")
    host, _, port = place.rpartition(":")
    if scheme not in ("", "ray") or not (port.isdigit() or scheme):
        return None
    return (host.strip("[]"), int(port)) if port.isdigit() else (place, CLIENT_PORT)


def _ask_for_token(address: str | None) -> None:
    """Make a cluster that starts here ask for a token, as Ray does by itself from 2.59 on.

    Without a token each account of the machine could run code in it.
    """
    if _version() >= (2, 59) or "RAY_AUTH_MODE" in os.environ or address not in (None, "local"):
        return
    found = ray._private.services.canonicalize_bootstrap_address(address)  # type: ignore[arg-type]
    if not found:
        os.environ["RAY_AUTH_MODE"] = "token"
        ray._raylet.Config.initialize("")  # type: ignore[attr-defined]


def _version() -> tuple[int, ...]:
    return tuple(map(int, ray.__version__.split(".")[:2]))


def init(address: str | None, **options: Any) -> None:
    """Join a cluster or start one, once more where it starts too slowly, as from a disk that is cold."""
    try:
        ray.init(address, **options)
    except Exception as error:  # Ray has no class of its own for it
        if TOO_SLOW not in str(error):
            raise
        logger.warning("Ray took longer to start than it waits for that, so it is started once more")
        ray.shutdown()
        ray.init(address, **options)


def _hide_token() -> None:
    """Make the token unreadable for others: Ray writes it as the umask has it."""
    with suppress(OSError):
        (Path.home() / ".ray" / "auth_token").chmod(0o600)


def _leads_here(address: str) -> bool:
    """Return whether an address is that of the cluster to which this process is connected."""
    client = ray.util.client.ray.get_context().client_worker  # type: ignore[no-untyped-call]
    ours = f"ray://{client._conn_str}" if client and "://" in address else gcs_address()
    return ("://" in address) == ("://" in ours) and _resolved(address) == _resolved(ours)


def _resolved(address: str) -> tuple[str, int] | None:
    host, port = _host_and_port(address) or ("", 0)
    here = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    with suppress(OSError):
        found = socket.gethostbyname(host)
        return here if found.startswith("127.") else found, port
    return None
