# Dask on this machine.
#
#   pip install --find-links ~/my_pipeline "djdist[dask]" ~/my_pipeline
#   export DJ_HOST=database.example.org DJ_BACKEND=postgresql DJ_USER=me DJ_PASS=...
#   python local.py

from dask.distributed import Client, LocalCluster
from my_pipeline import ProcessedData

import djdist

# a key made for this cluster: else whoever has an account on this machine may run anything as you
FOR_YOU_ALONE = {"security": True, "dashboard_address": "localhost:8787"}

if __name__ == "__main__":
    djdist.enable()
    # one thread a worker: a DataJoint connection serves one
    with (
        LocalCluster(threads_per_worker=1, **FOR_YOU_ALONE) as cluster,
        Client(cluster) as client,
    ):
        print("dashboard:", client.dashboard_link)
        ProcessedData.populate(reserve_jobs=True, suppress_errors=True, executor=client)
