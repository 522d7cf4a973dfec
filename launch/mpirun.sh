#!/usr/bin/env bash
# The command under Open MPI, whose hosts and ranks JAX finds by itself:
#
#     launch/mpirun.sh 2 --config=configs/tiny.py --workdir=runs/two
#     HOSTS=a:1,b:1 launch/mpirun.sh 2 --config=configs/deepseek_v3.py --workdir=/shared/runs/v3
#
# The first argument is the number of processes. If one fails, mpirun ends the others, and the run is
# started again, $RESTARTS times at most.
set -uo pipefail

HOSTS=${HOSTS:-localhost:$1}      # each with its number of processes
RESTARTS=${RESTARTS:-0}           # after a failure or exit code 75
OPTIONS=${OPTIONS:-}              # of mpirun, as --allow-run-as-root

processes=$1
shift
# mpirun gives process 0 a terminal even where it has none: then no live line, which files cannot hold.
[[ -t 1 ]] || export TERM=dumb
for ((attempt = 0; ; attempt++)); do
    # shellcheck disable=SC2086
    mpirun $OPTIONS --host "$HOSTS" -n "$processes" --bind-to none python -m moe_jax.main "$@"
    code=$?
    # 0: done; 2: a mistake; 3: given up. Nothing else is final.
    ((code == 0 || code == 2 || code == 3 || attempt >= RESTARTS)) && exit "$code"
    echo "exit code $code; starting again ($((attempt + 1)) of $RESTARTS)"
done
