# Dask on a batch system, set up by jobqueue.yaml; in a notebook it takes the same lines.
#
# In this folder, on the login node:
#   mkdir -p ~/.config/dask && cp jobqueue.yaml ~/.config/dask/
#   source ~/env/bin/activate && source ~/.datajoint.env
#   python jobqueue.py SLURM  # or PBS

import sys

import dask_jobqueue
from dask.distributed import Client
from my_pipeline import ProcessedData

import djdist

if __name__ == "__main__":
    djdist.enable()
    kind = getattr(dask_jobqueue, f"{sys.argv[1]}Cluster")
    # else whoever reaches its ports may run anything as you: a key made for this cluster
    with kind(security=True) as cluster, Client(cluster) as client:
        print("dashboard:", client.dashboard_link)
        cluster.adapt(minimum_jobs=1, maximum_jobs=20)
        ProcessedData.populate(reserve_jobs=True, suppress_errors=True, executor=client)
