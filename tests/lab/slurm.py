"""Slurm itself, with hosts of the tests as its nodes."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lab.hosts import PATH, on_host
from lab.watching import wait_until
from servers import free_port

PROGRAMS = {"munged": "munge", "sbatch": "slurm-client", "slurmctld": "slurmctld", "slurmd": "slurmd"}
CONFIGURATION = """
AuthInfo=socket={folder}/munge.socket
AuthType=auth/munge
ClusterName=lab
CredType=cred/munge
FirstJobId={first_job}
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
MpiDefault=none
NodeName=DEFAULT CPUs=64 RealMemory=262144 Port={node_port}
PartitionName=lab Nodes=ALL Default=YES
ProctrackType=proctrack/linuxproc
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmctldHost={controller}({address})
SlurmctldLogFile={folder}/slurmctld.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldPort={port}
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/slurmd-%n
SlurmdUser=root
SlurmUser=root
StateSaveLocation={folder}/state
TaskPlugin=task/none
"""


def what_slurm_lacks() -> str | None:
    """Say what this machine has to install before, if it has to."""
    missing = [package for program, package in PROGRAMS.items() if not shutil.which(program, path=PATH)]
    return f"not on this machine: {', '.join(missing)}" if missing else None


@contextmanager
def slurm(folder: Path, address: str, nodes: dict[str, str]) -> Iterator[dict[str, str]]:
    """Give the environment in which `sbatch` finds it; its nodes are hosts by name and address."""
    (folder / "state").mkdir(parents=True)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    configuration = folder / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(
            folder=folder,
            controller=socket.gethostname(),
            address=address,
            port=free_port(),
            node_port=free_port(),
            first_job=random.randrange(10_000_000),  # jobs of two tests have folders of their own
        )
        + "".join(f"NodeName={name} NodeAddr={at}\n" for name, at in nodes.items())
    )
    environment = {"SLURM_CONF": str(configuration), "PATH": PATH}
    with ExitStack() as stack:
        munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "log", "pid", "seed")]
        socket_option = f"--socket={folder}/munge.socket"
        stack.enter_context(_daemon("munged", "--foreground", "--force", socket_option, *munge))
        wait_until((folder / "munge.socket").exists, "munge")
        stack.enter_context(_daemon("slurmctld", "-D", "-f", str(configuration)))
        for name, at in nodes.items():
            node = f"PATH={PATH} exec slurmd -D -N {name} -f {configuration}"
            stack.enter_context(_daemon(*on_host(folder.parent / ".ssh", at), node))
        wait_until(lambda: _idle(environment) == len(nodes), "Slurm's nodes")
        yield environment


@contextmanager
def _daemon(*command: str) -> Iterator[None]:
    process = subprocess.Popen(
        command, env={**os.environ, "PATH": PATH}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def _idle(environment: dict[str, str]) -> int:
    sinfo = ["sinfo", "--noheader", "--states=idle", "--format=%n"]
    done = subprocess.run(sinfo, env={**os.environ, **environment}, capture_output=True, text=True)
    return len(done.stdout.split())
