#!/bin/bash
#SBATCH --job-name=slidecube-detect
#SBATCH --array=0-2,5,7%4
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=30518M
#SBATCH --gres=gpu:1
#SBATCH --time=360
#SBATCH --partition=gpu
#SBATCH --account='p 1'
#SBATCH --qos=long
#SBATCH --constraint=a100
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --chdir=/home/a
#SBATCH --output='/ws 100%%/logs/detect-%a.log'
#SBATCH --open-mode=append
#SBATCH --mail-type=FAIL

echo "slidecube-detect: job ${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}, node $(hostname), start $((${SLURM_RESTART_COUNT:-0} + 1)), $(date -Is)"
module load python/3.11
source /home/a/venv/bin/activate
scratch="/scratch/$USER/$SLURM_JOB_ID"
if [ -n "$scratch" ] && mkdir -p "$scratch"; then
  export TMPDIR="$scratch"
else
  echo "no scratch folder '$scratch' on $(hostname): temporary files go to ${TMPDIR:-/tmp}"
fi
again() {
  if [ "${SLURM_RESTART_COUNT:-0}" -lt 50 ]; then
    echo "work is left: queued again"; scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
  else
    echo "work is left after 50 restarts: submit it again"
  fi
}
drain() {
  kill -USR1 "$work"
  { sleep 270; again; } & late=$!
}
'/opt/slide cube/bin/slidecube' detect '/home/a/it'"'"'s.toml' --shard "${SLURM_ARRAY_TASK_ID}/8" &
work=$!
trap 'heard=1; drain' USR1
trap 'heard=1' TERM INT  # the work hears them from the batch system itself
code=127
while :; do  # a signal ends the waiting, and not the work
  heard=
  wait "$work"
  ended=$?
  [ "$ended" = 127 ] || code=$ended
  [ -n "$heard" ] || break
done
[ -z "${late:-}" ] || kill "$late" 2> /dev/null
case "$code" in 75 | 138) again ;; esac
exit "$code"
