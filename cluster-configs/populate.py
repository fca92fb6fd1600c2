"""The job of a cluster: populate one table where DJDIST_EXECUTOR says."""

import sys

from my_pipeline import ProcessedData

import djdist

djdist.enable()
result = ProcessedData.populate(reserve_jobs=True, suppress_errors=True)
print(f"{result['success_count']} made, {len(result['error_list'])} failed")
sys.exit(1 if result["error_list"] else 0)
