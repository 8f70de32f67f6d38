#!/bin/bash
#PBS -N slidecube-mosaic
#PBS -l select=1:ncpus=4:mem=15259mb
#PBS -l walltime=04:00:00
#PBS -r y
#PBS -j oe
#PBS -o /dev/null

cd /home/a || exit 1
exec >> /ws/logs/mosaic.log 2>&1
echo "slidecube-mosaic: job $PBS_JOBID, node $(hostname), $(date -Is)"
drain() {
  kill -USR1 "$work"
  { sleep 270; kill -TERM "$work"; } & late=$!
}
{ sleep 14100; kill -USR1 $$; } & clock=$!
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
kill "$clock" 2> /dev/null
case "$code" in 75 | 138) echo "work is left: submit it again" ;; esac
exit "$code"
