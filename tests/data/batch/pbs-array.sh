#!/bin/bash
#PBS -N slidecube-detect
#PBS -J 0-7%4
#PBS -l select=1:ncpus=8:mem=30518mb:ngpus=1:a100
#PBS -l walltime=06:00:00
#PBS -q gpu
#PBS -A 'p 1'
#PBS -l qos=long
#PBS -r y
#PBS -j oe
#PBS -o /dev/null
#PBS --mail-type=FAIL

cd /home/a || exit 1
exec >> '/ws 100%/logs/detect-'"$PBS_ARRAY_INDEX".log 2>&1
echo "slidecube-detect: job $PBS_JOBID, node $(hostname), $(date -Is)"
module load python/3.11
source /home/a/venv/bin/activate
scratch="/scratch/$USER/$SLURM_JOB_ID"
if [ -n "$scratch" ] && mkdir -p "$scratch"; then
  export TMPDIR="$scratch"
else
  echo "no scratch folder '$scratch' on $(hostname): temporary files go to ${TMPDIR:-/tmp}"
fi
drain() {
  kill -USR1 "$work"
  { sleep 270; kill -TERM "$work"; } & late=$!
}
{ sleep 21300; kill -USR1 $$; } & clock=$!
'/opt/slide cube/bin/slidecube' detect '/home/a/it'"'"'s.toml' --shard "${PBS_ARRAY_INDEX}/8" &
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
kill "$clock" 2> /dev/null
case "$code" in 75 | 138) echo "work is left: submit it again" ;; esac
exit "$code"
