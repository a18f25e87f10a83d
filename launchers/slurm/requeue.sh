# The end of a job's script: source launchers/slurm/requeue.sh STATUS
#
# A job whose ranks were told to stop, and have saved their state, goes back to the queue. The script ends with STATUS.

if [ "$1" -eq 143 ]; then
  # Not after scancel, which sends the same signal: such a job is no longer running.
  state=$(scontrol show job --oneliner "$SLURM_JOB_ID" | grep -o 'JobState=[A-Z]*')
  if [ "$state" = JobState=RUNNING ]; then
    echo "stopped with its state saved; back to the queue (restart $((${SLURM_RESTART_COUNT:-0} + 1)))"
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$1"
