#!/usr/bin/env bash
# One run on a Slurm allocation: a Ray head and workers on its nodes, the job on them, and everything ended with the job.
#
#   sbatch --nodes=2 --gpus-per-node=8 --cpus-per-task=96 --time=24:00:00 deploy/slurm.sh \
#       jobs/gsil_iterative.py --config jobs/configs/zephyr_7b_ultrafeedback.yaml --run.root /shared/runs
#
# Submit it in the project's root, after `make setup DEVICE=gpu` there; the root and --run.root lie on storage that all nodes mount.
# The same command continues a run. So a job that Slurm puts back into the queue (a preempted or failed node) goes on where it was, and
# one that comes near its time limit stops cleanly and puts itself back. `scancel` ends it for good.
#
# Settings by environment: GSIL_VENV (.venv), GSIL_START_SECONDS (180, in which the head has to answer), GSIL_HEAD_IP (the head's address
# on the fast network, where its name stands for another), GSIL_SCRATCH (/tmp, where Ray's own files lie on every node: choose another
# where that is small, but a short one, for the names of its Unix sockets).
#SBATCH --job-name=gsil
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=gsil-%j.log
# To this script alone, ten minutes before the time limit.
#SBATCH --signal=B:USR1@600
set -euo pipefail

if (($# == 0)); then
    echo "usage: sbatch [options] deploy/slurm.sh jobs/JOB.py [--config FILE ...]" >&2
    exit 2
fi
# sbatch runs a copy of this file: the project is where it was submitted.
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"
bin=$PWD/${GSIL_VENV:-.venv}/bin
ray=$bin/ray

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
# Of this job alone, should nodes be shared after all.
port=$((20000 + SLURM_JOB_ID % 20000))
scratch=${GSIL_SCRATCH:-/tmp}/ray-$SLURM_JOB_ID
# Other users reach these ports too: who has no token of this job gets nothing.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
# srun does not take over sbatch's --cpus-per-task by itself.
cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
export SRUN_CPUS_PER_TASK=$cpus
start=("$ray" start --block "--num-cpus=$cpus" "--num-gpus=${SLURM_GPUS_ON_NODE:-0}" "--temp-dir=$scratch")

steps=()
job=
near_limit=

# shellcheck disable=SC2317,SC2329  # called by traps
interrupt() {
    [[ -n $job ]] || exit 130
    # The job ends its stage's processes, says that the same command continues, and leaves with 130.
    kill -TERM "$job" 2>/dev/null || true
}

# shellcheck disable=SC2317,SC2329
tear_down() {
    trap - EXIT
    trap '' TERM INT USR1
    # Slurm's steps hand the signal on: `ray start --block` ends its node with it.
    kill -TERM ${job:+"$job"} ${steps[@]+"${steps[@]}"} 2>/dev/null || true
    wait || true
    srun --overlap --ntasks="${#nodes[@]}" --ntasks-per-node=1 rm -rf "$scratch" || true
}
trap tear_down EXIT
trap 'near_limit=yes; interrupt' USR1
trap interrupt TERM INT

# The address that the head's name stands for; where that is the loopback, as Debian writes it into /etc/hosts, its first interface.
on_head=(srun --overlap --nodes=1 --ntasks=1 "--nodelist=$head")
ip=${GSIL_HEAD_IP:-$("${on_head[@]}" hostname --ip-address)}
[[ $ip != 127.* ]] || ip=$("${on_head[@]}" hostname --all-ip-addresses)
ip=${ip%% *}
address=$ip:$port

"${on_head[@]}" "${start[@]}" --head "--node-ip-address=$ip" "--port=$port" --include-dashboard=false &
steps+=($!)
deadline=$((SECONDS + ${GSIL_START_SECONDS:-180}))
until "$ray" health-check --address "$address" >/dev/null 2>&1; do
    if ((SECONDS >= deadline)) || ! kill -0 "${steps[0]}" 2>/dev/null; then
        echo "error: no Ray head answers at $address on $head" >&2
        exit 1
    fi
    sleep 2
done
if ((${#nodes[@]} > 1)); then
    srun --overlap --nodes="$((${#nodes[@]} - 1))" --ntasks="$((${#nodes[@]} - 1))" --exclude="$head" "${start[@]}" "--address=$address" &
    steps+=($!)
fi
echo "Ray on ${nodes[*]}: $address"

# The job waits by itself for the resources that its stages ask for.
"$bin/python" "$@" --ray.address "$address" &
job=$!
status=0
wait "$job" || status=$?
# A signal ends `wait` before the job has ended.
while kill -0 "$job" 2>/dev/null; do
    status=0
    wait "$job" || status=$?
done
job=
tear_down
if [[ -n $near_limit && $status -ne 0 ]]; then
    echo "near the time limit: back into the queue, the run goes on from its finished stages"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
