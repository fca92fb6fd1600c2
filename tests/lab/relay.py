"""A way to a server that tests can cut, silence and mend."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


class Relay:
    """Passes connections on to a server until it is cut."""

    def __init__(self, host: str, port: int, at: str = "127.0.0.1") -> None:
        self._server = (host, port)
        self._listener = socket.create_server((at, 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self._passing = threading.Event()
        self._passing.set()
        self._out = False
        self._loses = b""
        self._losses_left = 0
        self.refused = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def refuse(self) -> None:
        """Let no new connection through; those that are open stay."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def cut(self) -> None:
        """Let no new connection through and end those that are open."""
        self.refuse()
        self._end_all()

    def go_out(self) -> None:
        """Be away like a server that restarts: end all connections, and each new one at once."""
        self._out = True
        self._end_all()

    def come_back(self) -> None:
        self._out = False

    def fall_silent(self) -> None:
        """Keep all connections open, take new ones, and pass nothing on, not even that one has ended."""
        self._passing.clear()

    def forget(self) -> None:
        """Pass nothing on any more of the connections that are open, as a firewall that forgot them."""
        self._passing.clear()
        self._passing = threading.Event()
        self._passing.set()

    def speak_again(self) -> None:
        self._passing.set()

    def lose_commits(self, after: bytes, times: int = 1) -> None:
        """Lose the server's answers to the next COMMITs of transactions whose last statement holds this.

        The server gets such a COMMIT; the client gets the end of its connection.
        """
        self._loses, self._losses_left = after, times

    @property
    def has_lost_all(self) -> bool:
        """Tell whether it has lost as many answers as it should."""
        return bool(self._loses) and not self._losses_left

    def loses_answer(self, statement: bytes, before: bytes) -> bool:
        """Tell whether the answer to a statement is to be lost."""
        lost = self._losses_left > 0 and b"COMMIT" in statement and self._loses in before + statement
        self._losses_left -= lost
        return lost

    def _end_all(self) -> None:
        while self._open:
            end = self._open.pop()
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if self._out:
                    self.refused += 1
                    near.close()
                    continue
                far = socket.create_connection(self._server)
                self._open += [near, far]
                talk = _Talk(self)
                for source, sink, passes in ((near, far, talk.asks), (far, near, talk.answers)):
                    arguments = (source, sink, passes, self._passing)
                    threading.Thread(target=_pump, args=arguments, daemon=True).start()


class _Talk:
    """One connection: knows whether the answer to its last statement is to be lost."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._last = b""
        self._is_lost = False

    def asks(self, data: bytes) -> bool:
        self._is_lost = self._relay.loses_answer(data, self._last)
        self._last = data
        return True

    def answers(self, data: bytes) -> bool:
        return not self._is_lost


def _pump(
    source: socket.socket, sink: socket.socket, passes: Callable[[bytes], bool], passing: threading.Event
) -> None:
    with suppress(OSError):
        while (data := source.recv(65536)) and passes(data):
            passing.wait()
            sink.sendall(data)
    passing.wait()
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


@contextmanager
def relayed(host: str, port: int, at: str = "127.0.0.1") -> Iterator[Relay]:
    relay = Relay(host, port, at)
    try:
        yield relay
    finally:
        relay.cut()


@contextmanager
def lost_packets(address: str) -> Iterator[None]:
    """Lose all packets to an address of the loopback meanwhile, as root on Linux."""
    route = ["blackhole", f"{address}/32", "table", "local"]
    subprocess.run(["ip", "route", "add", *route], check=True)
    try:
        yield
    finally:
        subprocess.run(["ip", "route", "delete", *route], check=True)
