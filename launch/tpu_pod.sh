#!/usr/bin/env bash
# One run over all hosts of a Cloud TPU slice, with the repository and its environment set up on each of them:
#
#     launch/tpu_pod.sh NAME ZONE --config=configs/unet.py --workdir=/mnt/shared/unet [--config.FIELD=VALUE ...]
#
# In ~/mrjax of every host: git clone, python3 -m venv .venv, .venv/bin/pip install -e '.[tpu]'. The workdir and the data
# lie on a file system that all hosts mount. Restarted after a preemption, the same line goes on from the last checkpoint.
set -eu
name=${1:?usage: launch/tpu_pod.sh NAME ZONE --config=FILE ...}
zone=${2:?usage: launch/tpu_pod.sh NAME ZONE --config=FILE ...}
shift 2
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
    --command="cd mrjax && exec .venv/bin/python -u -m mrjax.main $(printf '%q ' "$@")"
