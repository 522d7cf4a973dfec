#!/usr/bin/env bash
# The command on all hosts of a Cloud TPU slice, from the machine that has gcloud:
#
#     TPU=my-v5p ZONE=us-east5-a launch/tpu_vm.sh --config=configs/deepseek_v3.py \
#         --workdir=/shared/runs/v3
#
# The project and Python's environment must be in $FOLDER on every host. The run is started again
# after a failure or a preemption, $RESTARTS times at most; it goes on from its newest checkpoint.
set -uo pipefail

TPU=${TPU:?the name of the TPU}
ZONE=${ZONE:?its zone}
FOLDER=${FOLDER:-moe_jax}         # on the hosts, below the home directory
RESTARTS=${RESTARTS:-20}          # after a failure or exit code 75

# Quoted for the shell over there.
printf -v command 'cd %q && exec .venv/bin/python -m moe_jax.main' "$FOLDER"
printf -v arguments ' %q' "$@"
for ((attempt = 0; ; attempt++)); do
    gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$command$arguments"
    code=$?
    # 0: done; 2: a mistake; 3: given up. Nothing else is final.
    ((code == 0 || code == 2 || code == 3 || attempt >= RESTARTS)) && exit "$code"
    echo "exit code $code; starting again ($((attempt + 1)) of $RESTARTS)"
    sleep 30
done
