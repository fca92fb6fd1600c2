"""Speaks TLS for a PostgreSQL server, as that begins in its protocol, and refuses everything else."""

from __future__ import annotations

import select
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from servers import Server, Tls

TLS_REQUEST = struct.pack("!II", 8, 80877103)
GSS_REQUEST = struct.pack("!II", 8, 80877104)


@contextmanager
def tls_front(server: Server, tls: Tls) -> Iterator[int]:
    """Give the port at which the server is reached by TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls.certificate, tls.key)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_accept, args=(listener, server, context), daemon=True).start()
        yield listener.getsockname()[1]
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)


def _accept(listener: socket.socket, server: Server, context: ssl.SSLContext) -> None:
    with suppress(OSError):
        while True:
            client, _ = listener.accept()
            threading.Thread(target=_serve, args=(client, server, context), daemon=True).start()


def _serve(client: socket.socket, server: Server, context: ssl.SSLContext) -> None:
    with suppress(OSError), client:
        request = client.recv(8)
        if request == GSS_REQUEST:
            client.sendall(b"N")
            request = client.recv(8)
        if request != TLS_REQUEST:
            return
        client.sendall(b"S")
        with (
            context.wrap_socket(client, server_side=True) as near,
            socket.create_connection((server.host, server.port)) as far,
        ):
            _relay(near, far)


def _relay(near: ssl.SSLSocket, far: socket.socket) -> None:
    other = {near: far, far: near}
    while True:
        ready = [near] if near.pending() else select.select([near, far], [], [])[0]
        for source in ready:
            data = source.recv(65536)
            if not data:
                return
            other[source].sendall(data)
