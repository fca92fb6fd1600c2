#!/bin/bash
# Ray over a Slurm allocation, for as long as a script runs on it.
#
# In this folder:
#   sbatch --nodes=4 slurm.sh ../populate.py
#   squeue --me
#   scancel --batch --signal=TERM JOB_ID   # lets djdist end what runs, and Ray after it
#
# Before the first time, on the login node:
#   python3.11 -m venv ~/env
#   ~/env/bin/pip install --find-links ~/my_pipeline "ray[default]==2.60.0" "djdist[ray,postgres]" ~/my_pipeline
#   (umask 077; echo 'export DJ_USER=worker DJ_PASS=...' > ~/.datajoint.env)

#SBATCH --job-name=djdist
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@120

set -euo pipefail
source ~/env/bin/activate
source ~/.datajoint.env
export DJ_HOST=${DJ_HOST:-database.example.org} DJ_BACKEND=${DJ_BACKEND:-postgresql} DJDIST_EXECUTOR=ray
export RAY_AUTH_MODE=token
ray get-auth-token --generate > /dev/null  # in the home folder, which all nodes share

# others may have a Ray on the same node: a port, worker ports and a folder of this job's own
port=$((20000 + SLURM_JOB_ID % 10000))
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export RAY_ADDRESS=$head:$port
ray_start=(ray start --block --num-cpus="$SLURM_CPUS_PER_TASK" --min-worker-port=0 --max-worker-port=0)

trap 'kill $(jobs -p) 2> /dev/null || true; wait' EXIT
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
    "${ray_start[@]}" --head --port="$port" --temp-dir="/tmp/ray-$SLURM_JOB_ID" &
timeout 120 sh -c 'until ray health-check --address "$RAY_ADDRESS"; do sleep 1; done'
if ((SLURM_JOB_NUM_NODES > 1)); then
    others=$((SLURM_JOB_NUM_NODES - 1))
    srun --overlap --nodes=$others --ntasks=$others --exclude="$head" \
        "${ray_start[@]}" --address="$RAY_ADDRESS" &
fi

# djdist needs not wait for the other nodes: it uses them as they come
python "$@" &
script=$!
trap 'kill -TERM $script' TERM
wait $script || wait $script  # a signal ends the first wait only
