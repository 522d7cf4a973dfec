#!/usr/bin/env bash
# The command as several processes on this machine, as it runs on several hosts:
#
#     launch/local.sh 2 --config=configs/tiny.py --workdir=runs/two
#
# The first argument is the number of processes; they share out config.mesh.num_cpu_devices. The
# output is that of process 0; the others write to logs in $LOGS. If one process fails, the others
# are stopped, and the exit code is the failed one's.
set -euo pipefail

PORT=${PORT:-12355}               # of the coordinator, on this machine
LOGS=${LOGS:-$(mktemp -d)}        # output of processes 1, 2, ...

processes=$1
shift
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

for ((i = processes - 1; i >= 0; i--)); do
    command=(python -m moe_jax.main "$@" --coordinator_address="localhost:$PORT"
        --num_processes="$processes" --process_id="$i")
    if ((i == 0)); then "${command[@]}" & else "${command[@]}" >"$LOGS/process$i.log" 2>&1 & fi
done
((processes == 1)) || echo "output of the other processes: $LOGS/process*.log"

for ((i = 0; i < processes; i++)); do
    wait -n
done
