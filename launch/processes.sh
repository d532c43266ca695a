#!/usr/bin/env bash
# Several processes on one machine, as one run:
#
#     launch/processes.sh N --config=configs/unet.py [--workdir=runs/unet] [--config.FIELD=VALUE ...]
#
# Process i takes GPU i where there are GPUs. PYTHON names another interpreter. SIGTERM and Ctrl-C reach all processes,
# which save a checkpoint and stop after the same step. If one is lost, the others end within a minute. The status is that
# of the first process that failed, or 2 if one of them found a user's error.
set -u
count=${1:?usage: launch/processes.sh N --config=FILE ...}
shift
port=$("${PYTHON:-python}" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_COORDINATOR_BIND_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$count

processes=()
for ((i = 0; i < count; i++)); do
    JAX_PROCESS_ID=$i JAX_LOCAL_DEVICE_IDS=${JAX_LOCAL_DEVICE_IDS:-$i} "${PYTHON:-python}" -m mrjax.main "$@" &
    processes+=($!)
done
trap 'kill -TERM "${processes[@]}" 2>/dev/null' TERM INT

status=0
for ((left = count; left > 0; left--)); do
    # A signal interrupts the wait, with a status above 128, while all processes are still there: wait again.
    while :; do
        wait -n -p ended "${processes[@]}"
        code=$?
        [[ -n ${ended-} ]] && break
    done
    for i in "${!processes[@]}"; do
        [[ ${processes[i]} == "$ended" ]] || continue
        unset "processes[i]"
        ((code)) && echo "launch/processes.sh: process $i of $count ended with status $code" >&2
    done
    ((code == 2)) && status=2
    if ((code)) && [[ -z ${reaper-} ]]; then
        status=$code
        # JAX ends the others; but not one that was still starting, or hangs.
        { sleep 60; kill -KILL "${processes[@]}"; } >/dev/null 2>&1 &
        reaper=$!
    fi
done
[[ -z ${reaper-} ]] || kill "$reaper" 2>/dev/null
exit "$status"
