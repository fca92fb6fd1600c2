"""A way to a server that is far: what goes through arrives so much later, as on a long cable.

It is a process of its own, so that it takes no time from those whose connections it carries.
"""

from __future__ import annotations

import asyncio
import selectors
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

READ_BYTES = 65536


@contextmanager
def delayed(host: str, port: int, round_trip_seconds: float) -> Iterator[int]:
    """Give the port of a way to a server that answers after so long a round trip at the soonest."""
    command = [sys.executable, __file__, host, str(port), str(round_trip_seconds / 2)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


async def carry(host: str, port: int, seconds: float) -> None:
    """Take connections until standard input ends, and pass on what comes from either side after so long."""

    async def pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while data := await source.read(READ_BYTES):
            loop.call_later(seconds, sink.write, data)
        loop.call_later(seconds, sink.close)

    async def connect(near: asyncio.StreamReader, to_near: asyncio.StreamWriter) -> None:
        far, to_far = await asyncio.open_connection(host, port)
        await asyncio.gather(pass_on(near, to_far), pass_on(far, to_near), return_exceptions=True)

    server = await asyncio.start_server(connect, "127.0.0.1")
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    # the other selectors wake up at whole milliseconds
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    loop.run_until_complete(carry(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
