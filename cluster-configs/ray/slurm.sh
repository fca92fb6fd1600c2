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
#   source ~/env/bin/activate && ray get-auth-token --generate   # in the home folder, which all nodes share
#   (umask 077; echo 'export DJ_USER=worker DJ_PASS=...' > ~/.datajoint.env)

#SBATCH --job-name=djdist
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@120
# what your cluster asks for, without the first #:
##SBATCH --account=my_lab
##SBATCH --partition=long
##SBATCH --gpus-per-node=1

set -euo pipefail
source ~/env/bin/activate
source ~/.datajoint.env
export DJ_HOST=${DJ_HOST:-database.example.org} DJ_BACKEND=${DJ_BACKEND:-postgresql} DJDIST_EXECUTOR=ray
export RAY_AUTH_MODE=token
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0  # else Ray waits as long as Slurm does before it kills
# imports from a home folder on a network, by many at a time, take longer than Ray waits by default
export RAY_agent_register_timeout_ms=240000 RAY_raylet_start_wait_time_s=240 RAY_NUM_REDIS_GET_RETRIES=120

ulimit -n "$(ulimit -H -n)"  # the soft limit is often too low for Ray's sockets

# others may have a Ray on the same node: ports and a folder of this job's own. The ports are below those that Linux gives away.
export RAY_FOLDER=/tmp/ray-$SLURM_JOB_ID
port=$((12000 + SLURM_JOB_ID % 1250 * 16))
on_each_node=(
    --min-worker-port=0 --max-worker-port=0 --node-manager-port=$((port + 3)) --object-manager-port=$((port + 4))
    --dashboard-agent-listen-port=$((port + 5)) --dashboard-agent-grpc-port=$((port + 6))
    --runtime-env-agent-port=$((port + 7)) --metrics-export-port=$((port + 8))
)
on_the_head=(
    --head --port="$port" --dashboard-port=$((port + 1)) --ray-client-server-port=$((port + 2)) --temp-dir="$RAY_FOLDER"
)

# a node's first address; if that is not on the network that all nodes share, write here what gives the right one
node_address() { hostname --all-ip-addresses | cut -d ' ' -f 1; }
head=$SLURMD_NODENAME  # this script runs on the first node
export RAY_ADDRESS=$(node_address):$port

# a step that is told to end, by this script or by scancel, leaves nothing in the nodes' /tmp
ray_start() {
    ray start --block --num-cpus="$SLURM_CPUS_PER_TASK" --node-ip-address="$(node_address)" "$@" &
    trap 'kill $! 2> /dev/null' TERM
    wait || wait
    until rm -rf "$RAY_FOLDER" 2> /dev/null; do sleep 0.2; done
}
export -f node_address ray_start
step=(srun --overlap --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK")

trap 'scancel --signal=TERM "$SLURM_JOB_ID"; wait' EXIT
"${step[@]}" --nodes=1 --ntasks=1 --nodelist="$head" \
    bash -c 'ray_start "$@"' - "${on_each_node[@]}" "${on_the_head[@]}" &
timeout 300 sh -c 'until ray health-check --address "$RAY_ADDRESS"; do sleep 1; done'
if ((SLURM_JOB_NUM_NODES > 1)); then
    others=$((SLURM_JOB_NUM_NODES - 1))
    "${step[@]}" --nodes=$others --ntasks=$others --exclude="$head" \
        bash -c 'ray_start "$@"' - "${on_each_node[@]}" --address="$RAY_ADDRESS" &
fi

# djdist needs not wait for the other nodes: it uses them as they come
python "$@" &
script=$!
trap 'kill -TERM $script' TERM
wait $script || wait $script  # a signal ends the first wait only
