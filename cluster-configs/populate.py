"""The job of a cluster: populate one table where DJDIST_EXECUTOR says.

On Ray its arguments say what each key needs, if that is not one CPU: python populate.py num_gpus=1 num_cpus=4
"""

import sys

from my_pipeline import ProcessedData

import djdist

needs = dict(argument.split("=") for argument in sys.argv[1:])
executor = djdist.RayExecutor(**{name: float(amount) for name, amount in needs.items()}) if needs else None

djdist.enable()
result = ProcessedData.populate(reserve_jobs=True, suppress_errors=True, executor=executor)
errors = len(ProcessedData.jobs.errors)
print(f"{result['success_count']} made, {errors} errors left")
sys.exit(1 if errors else 0)
