# Dask on the lab's own machines, over SSH; the scheduler is on the first, workers are on the others.
#
#   pip install --find-links ~/my_pipeline "djdist[dask]" asyncssh ~/my_pipeline
#   export DJ_HOST=database.example.org DJ_BACKEND=postgresql DJ_USER=me DJ_PASS=...
#   python ssh.py node1 node1 node2 node3

import sys

from dask.distributed import Client, SSHCluster
from my_pipeline import ProcessedData

import djdist

ON_EVERY_HOST = "~/env/bin/python"  # the same version everywhere, with djdist and your pipeline
# one thread a worker: a DataJoint connection serves one
WORKERS = {"n_workers": 8, "nthreads": 1}

if __name__ == "__main__":
    djdist.enable()
    with (
        SSHCluster(sys.argv[1:], remote_python=ON_EVERY_HOST, worker_options=WORKERS) as cluster,
        Client(cluster) as client,
    ):
        print("dashboard:", client.dashboard_link)
        ProcessedData.populate(reserve_jobs=True, suppress_errors=True, executor=client)
