"""Other accounts of the machine get neither into a cluster that djdist starts nor at its key."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

import lab as pipelines
from lab import doing
from lab.watching import SECONDS, wait_until

CALL = """
from {lab} import Scripted
from lab import doing

make_kwargs = {{"do": doing.wait_at_gate, "folder": {folder!r}}}
print(Scripted.populate(reserve_jobs=True, executor="dask", make_kwargs=make_kwargs))
"""
INTRUDER = """
import os, pwd, sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
import cryptography.hazmat.primitives.asymmetric.rsa, dask.array
from distributed import Client, Security

nobody = pwd.getpwnam("nobody")  # who may be unable to read the libraries
os.setgroups([])
os.setgid(nobody.pw_gid)
os.setuid(nobody.pw_uid)
os.chdir("/")
addresses = sys.argv[1].split()

def attempt(address, security):
    try:
        return f"in {address} {Client(address, security=security, timeout=5).run(os.getuid)}"
    except Exception as error:
        return f"refused {type(error).__name__}"

everywhere = [*addresses, *(address.replace("tls", "tcp") for address in addresses)]
with ThreadPoolExecutor() as threads:  # some are waited for until the timeout
    attempts = [threads.submit(attempt, *to) for to in product(everywhere, (None, Security.temporary()))]
for made in attempts:
    print(made.result())
for file in sys.argv[2].split():
    try:
        print("read", file, len(open(file).read()))
    except PermissionError:
        print("hidden", file)
"""


@pytest.mark.long
@pytest.mark.on("dask")
@pytest.mark.skipif(os.geteuid() != 0, reason="takes root, to run a process as another user")
def test_nobody_gets_into_a_dask_cluster(lab: ModuleType, script: Callable[..., Any], tmp_path: Path) -> None:
    pipelines.fill(lab, subjects=1, sessions=2)
    caller = script(CALL.format(lab=lab.__name__, folder=str(tmp_path)))
    wait_until(lambda: doing.begun(tmp_path), "a key")
    processes = [p for p in psutil.Process(caller.pid).children(recursive=True) if p.is_running()]
    told = " ".join(word for process in processes for word in process.cmdline())  # which everybody can read
    addresses = {word for word in told.split() if word.startswith(("tls://", "tcp://"))}
    ports = {c.laddr for p in processes for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
    files = set(re.findall(r'(/[^", ]+\.(?:pem|json))"', told))
    files |= {f"/proc/{process.pid}/environ" for process in processes}
    intruder = [sys.executable, "-c", INTRUDER, " ".join(addresses), " ".join(files)]
    said = subprocess.run(intruder, capture_output=True, text=True, timeout=SECONDS, check=False)
    doing.open_gate(tmp_path)
    output, error = caller.communicate(timeout=SECONDS)
    assert "'success_count': 2" in output, error
    assert addresses
    assert len(files) > len(processes)
    lines = said.stdout.splitlines()
    assert len(lines) == 4 * len(addresses) + len(files), said.stderr
    assert {line.split()[0] for line in lines} == {"refused", "hidden"}, said.stdout
    assert {address.ip for address in ports} == {"127.0.0.1"}
