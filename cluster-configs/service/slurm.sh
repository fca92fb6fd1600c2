#!/bin/bash
# A service on Slurm that makes what a pipeline lacks: each job asks for the next one.
#
# In this folder:
#   sbatch slurm.sh my_pipeline
#   squeue --me --name=djdist-service
#   scancel --me --name=djdist-service   # ends it: this job and the next
#
# Before the first time, on the login node:
#   python3.11 -m venv ~/env
#   ~/env/bin/pip install --find-links ~/my_pipeline "djdist[cli,notify,postgres]" ~/my_pipeline
#   (umask 077; echo 'export DJ_USER=worker DJ_PASS=...' > ~/.datajoint.env)  # and DJDIST_NOTIFY=slack://...

# options belong here: the next job doesn't get those of the command line
#SBATCH --job-name=djdist-service
#SBATCH --output=djdist-service-%j.out
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@300
# what your cluster asks for, without the first #:
##SBATCH --account=my_lab
##SBATCH --partition=long
##SBATCH --gpus-per-node=1

set -euo pipefail
source ~/env/bin/activate
source ~/.datajoint.env
export DJ_HOST=${DJ_HOST:-database.example.org} DJ_BACKEND=${DJ_BACKEND:-postgresql}
export DJDIST_GRACE_SECONDS=${DJDIST_GRACE_SECONDS:-240}  # what runs when the time is over may end; less than --signal's 300

# It waits in the queue from now on, and begins however this job ends, also by its node. The minute holds back what fails at once.
next=$(sbatch --parsable --dependency="afterany:$SLURM_JOB_ID" --begin=now+1minute "$0" "$@")

djdist populate "$@" --watch --executor local --processes 0 &
service=$!
trap 'kill -TERM $service' TERM
code=0
wait $service || wait $service || code=$?  # a signal ends the first wait only

case $code in
    143) ;;  # told to end by SIGTERM: the next job goes on
    # idle, by --idle-exit-seconds (1: with errors left), or nothing that another job could do better
    0 | 1 | 2) scancel "${next%%;*}"; exit $code ;;
    *) exit $code ;;  # such as 3: the database can't be reached, or 70: a bug; the next job tries again
esac
