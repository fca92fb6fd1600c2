"""Hosts of a lab, to be reached by SSH: each has an address and processes of its own on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil

from lab.watching import wait_until

PROGRAMS = {
    "ip": "iproute2",
    "rsync": "rsync",
    "ssh": "openssh-client",
    "sshd": "openssh-server",
    "unshare": "util-linux",
}
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

SSHD = """
AuthorizedKeysFile {keys}/id_ed25519.pub
HostKey {keys}/host
LogLevel ERROR
PermitRootLogin prohibit-password
PidFile none
SetEnv {environment}
StrictModes no
UsePAM no
"""
HOST = """
set -e
hostname "$(basename {home})"
mkdir -p /run/sshd /tmp/ray
mount -t tmpfs tmpfs /tmp/ray
for file in hosts nsswitch.conf passwd; do mount --bind {home}/$file /etc/$file; done
until ip link set eth0 up 2> /dev/null; do sleep 0.1; done
ip link set lo up
ip address add {address}/24 dev eth0
ip route add default via {gateway}
exec {sshd} -D -e -f {home}/sshd_config
"""


def what_hosts_lack() -> str | None:
    """Say why this machine can't hold any, if it can't."""
    if sys.platform != "linux" or os.geteuid():
        return "only root on Linux can give hosts an address each"
    missing = [package for program, package in PROGRAMS.items() if not shutil.which(program, path=PATH)]
    return f"not on this machine: {', '.join(missing)}" if missing else None


@contextmanager
def hosts(folder: Path, count: int, environment: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Give this machine's address and those of so many hosts, which let in the key of `folder/.ssh`.

    They see this machine's files, but have a home each, and their own `/tmp/ray`.
    """
    with ExitStack() as stack:
        bridge, network = stack.enter_context(_network())
        gateway, addresses = f"{network}.254", [f"{network}.{number}" for number in range(1, count + 1)]
        _run("ip", "address", "add", f"{gateway}/24", "dev", bridge)
        _run("ip", "link", "set", bridge, "up")
        _make_keys(folder / ".ssh", addresses)
        names = {f"host{number}": address for number, address in enumerate(addresses, 1)}
        for name, address in names.items():
            home = _make_home(folder / name, folder / ".ssh", environment)
            _name_hosts(home, names)
            stack.enter_context(_host(home, address, gateway, bridge, cable=f"{bridge}{name}"))
        for address in addresses:
            wait_until(partial(_answers, folder / ".ssh", address), f"SSH on {address}")
        yield gateway, addresses


def _make_keys(folder: Path, addresses: Sequence[str]) -> None:
    folder.mkdir(mode=0o700)
    for name in ("id_ed25519", "host"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
    host_key = (folder / "host.pub").read_text()
    (folder / "known_hosts").write_text("".join(f"{address} {host_key}" for address in addresses))


def _make_home(home: Path, keys: Path, environment: dict[str, str]) -> Path:
    """Make a home where what `ray up` would install is there already."""
    uv = home / ".local" / "bin" / "uv"
    uv.parent.mkdir(parents=True)
    uv.write_text("#!/bin/sh\n")
    uv.chmod(0o700)
    (home / "env").symlink_to(sys.prefix)
    (home / "passwd").write_text(
        f"root:x:0:0:root:{home}:/bin/bash\nsshd:x:101:65534::/run/sshd:/bin/false\n"
    )
    variables = " ".join(f'"{name}={value}"' for name, value in environment.items())
    (home / "sshd_config").write_text(SSHD.format(keys=keys, environment=variables))
    return home


def _name_hosts(home: Path, names: dict[str, str]) -> None:
    """Let the hosts know each other by name. There is no name server: to ask it takes 20 s."""
    known = {"localhost": "127.0.0.1", **names}
    (home / "hosts").write_text("".join(f"{address} {name}\n" for name, address in known.items()))
    (home / "nsswitch.conf").write_text("group: files\nhosts: files\npasswd: files\n")


@contextmanager
def _network() -> Iterator[tuple[str, str]]:
    """Give a bridge of one's own and its network, of those for tests of networks by RFC 2544."""
    number = _add_bridge()
    try:
        yield f"djlab{number}", f"198.18.{number}"
    finally:
        _run("ip", "link", "delete", f"djlab{number}")


def _add_bridge() -> int:
    """Add the first bridge that nobody has: the kernel lets one process have a name."""
    for number in range(256):
        with suppress(subprocess.CalledProcessError):
            _run("ip", "link", "add", f"djlab{number}", "type", "bridge")
            return number
    raise OSError("no bridge can be added, or all 256 are taken")


@contextmanager
def _host(home: Path, address: str, gateway: str, bridge: str, cable: str) -> Iterator[None]:
    script = HOST.format(home=home, address=address, gateway=gateway, sshd=shutil.which("sshd", path=PATH))
    own = ["--mount", "--mount-proc", "--net", "--pid", "--uts", "--fork", "--kill-child"]
    process = subprocess.Popen(["unshare", *own, "bash", "-c", script], env={**os.environ, "PATH": PATH})
    try:
        here = os.readlink("/proc/self/ns/net")
        wait_until(lambda: os.readlink(f"/proc/{process.pid}/ns/net") != here, "the host's network")
        _run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(process.pid))
        _run("ip", "link", "set", cable, "master", bridge, "up")
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            for first in psutil.Process(process.pid).children():
                first.kill()  # and with it all that runs on the host, before its cable goes
        process.wait()
        with suppress(subprocess.CalledProcessError):  # it goes with the host, but later
            _run("ip", "link", "delete", cable)


def on_host(keys: Path, address: str) -> list[str]:
    """Give the words before a command that runs it on a host."""
    options = [f"-oIdentityFile={keys}/id_ed25519", f"-oUserKnownHostsFile={keys}/known_hosts"]
    return ["ssh", "-F/dev/null", "-oBatchMode=yes", *options, address]


def _answers(keys: Path, address: str) -> bool:
    with suppress(subprocess.CalledProcessError):
        _run(*on_host(keys, address), "true")
        return True
    return False


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PATH": PATH})
