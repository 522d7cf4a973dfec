#!/usr/bin/env bash
# The command as several processes on this machine, as it runs on several hosts:
#
#     launch/local.sh 2 --config=configs/tiny.py --workdir=runs/two
#
# The first argument is the number of processes; they share out config.mesh.num_cpu_devices. The
# output is that of process 0; the others write to logs in $LOGS. Control-C reaches all: they save
# and leave. If one fails, so do the others, and the run is started again, $RESTARTS times at most.
set -uo pipefail

PORT=${PORT:-12355}               # of the coordinator, on this machine
LOGS=${LOGS:-$(mktemp -d)}        # output of processes 1, 2, ...
RESTARTS=${RESTARTS:-0}           # after a failure or exit code 75

processes=$1
shift
trap 'kill $(jobs -p) 2>/dev/null' EXIT
trap 'kill -INT $(jobs -p) 2>/dev/null' INT
stopping=0                        # asked for itself, it starts nothing again
trap 'stopping=1; kill -TERM $(jobs -p) 2>/dev/null' TERM

run() { # returns the first exit code that is not 0
    local i pid code=0 failed=0 pids=()
    for ((i = processes - 1; i >= 0; i--)); do
        command=(python -m moe_jax.main "$@" --coordinator_address="localhost:$PORT"
            --num_processes="$processes" --process_id="$i")
        if ((i == 0)); then "${command[@]}" & else "${command[@]}" >"$LOGS/process$i.log" 2>&1 & fi
        pids+=($!)
    done
    for pid in "${pids[@]}"; do
        # A signal ends `wait`, not the process.
        while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
        wait "$pid"
        code=$?
        ((failed)) || failed=$code
    done
    return "$failed"
}

((processes == 1)) || echo "output of the other processes: $LOGS/process*.log"
for ((attempt = 0; ; attempt++)); do
    run "$@"
    code=$?
    # 0: done; 2: a mistake; 3: given up. Nothing else is final.
    ((code == 0 || code == 2 || code == 3 || stopping || attempt >= RESTARTS)) && exit "$code"
    echo "exit code $code; starting again ($((attempt + 1)) of $RESTARTS)"
done
