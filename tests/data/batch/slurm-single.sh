#!/bin/bash
#SBATCH --job-name=slidecube-mosaic
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=15259M
#SBATCH --time=240
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --chdir=/home/a
#SBATCH --output=/ws/logs/mosaic.log
#SBATCH --open-mode=append

echo "slidecube-mosaic: job ${SLURM_JOB_ID}, node $(hostname), start $((${SLURM_RESTART_COUNT:-0} + 1)), $(date -Is)"
again() {
  if [ "${SLURM_RESTART_COUNT:-0}" -lt 50 ]; then
    echo "work is left: queued again"; scontrol requeue "${SLURM_JOB_ID}"
  else
    echo "work is left after 50 restarts: submit it again"
  fi
}
drain() {
  kill -USR1 "$work"
  { sleep 270; again; } & late=$!
}
/opt/bin/slidecube mosaic /home/a/run.toml &
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
