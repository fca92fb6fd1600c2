# Dask on the lab's own machines, over SSH; the scheduler is on the first, workers are on the others.
#
#   source ~/env/bin/activate
#   source ~/.datajoint.env
#   python ssh.py node1 node1 node2 node3
#
# Before the first time, in the home folder that all share, or on one machine, and then copied to all:
#   python3.11 -m venv ~/env
#   ~/env/bin/pip install --find-links ~/my_pipeline "djdist[dask,postgres]" asyncssh ~/my_pipeline
#   umask 077; cd
#   echo 'export DJ_HOST=database.example.org DJ_BACKEND=postgresql DJ_USER=me DJ_PASS=...' > .datajoint.env
#   openssl req -x509 -newkey rsa:3072 -nodes -days 3650 -subj /CN=djdist -keyout .dask.key -out .dask.crt
# Whoever has that key may use the cluster.

import sys
from pathlib import Path

import dask
from dask.distributed import Client, SSHCluster
from my_pipeline import ProcessedData

import djdist

# the same version everywhere, with djdist and your pipeline
ON_EVERY_HOST = """bash -c '. ~/.datajoint.env && exec ~/env/bin/python "$@"' --"""
# one thread a worker: a DataJoint connection serves one
WORKERS = {"n_workers": 8, "nthreads": 1}
SCHEDULER = {"protocol": "tls://"}
KEY, CERTIFICATE = (str(Path.home() / name) for name in (".dask.key", ".dask.crt"))
PAIR = {"key": KEY, "cert": CERTIFICATE}
# SSHCluster sends these settings to all hosts: the names of the files, not what is in them
WITH_KEY_ONLY = {
    "distributed.comm.require-encryption": True,
    "distributed.comm.tls.ca-file": CERTIFICATE,
    **{f"distributed.comm.tls.{role}": PAIR for role in ("scheduler", "worker", "client")},
}

if __name__ == "__main__":
    djdist.enable()
    with (
        dask.config.set(WITH_KEY_ONLY),
        SSHCluster(
            sys.argv[1:], remote_python=ON_EVERY_HOST, worker_options=WORKERS, scheduler_options=SCHEDULER
        ) as cluster,
        Client(cluster) as client,
    ):
        print("dashboard:", client.dashboard_link)
        ProcessedData.populate(reserve_jobs=True, suppress_errors=True, executor=client)
