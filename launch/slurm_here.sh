#!/usr/bin/env bash
# Runs launch/slurm.sbatch in a real SLURM of one node on this machine, and shows that a killed run goes on:
#
#     launch/slurm_here.sh [PYTHON]
#
# Needs root and Debian's packages (apt-get install slurm-wlm munge). What SLURM writes goes into a temporary folder and
# its daemons end with this script; only /run/munge, if there is no munged yet, lies outside.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${1:-python}
for command in slurmctld slurmd munged; do
    command -v "$command" >/dev/null || { echo "$command is not installed: apt-get install slurm-wlm munge"; exit 1; }
done
folder=$(mktemp -d /tmp/mrjax-slurm.XXXXXX)
chmod 755 "$folder"
host=$(hostname -s)
export SLURM_CONF=$folder/slurm.conf
mkdir "$folder/state" "$folder/spool"

cat >"$SLURM_CONF" <<EOF
ClusterName=here
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPort=26817
SlurmdPort=26818
MailProg=/bin/true
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
EOF

daemons=()
tear_down() {
    scancel --user=root 2>/dev/null || true
    sleep 3
    for ((i = ${#daemons[@]} - 1; i >= 0; i--)); do kill "${daemons[i]}" 2>/dev/null || true; done
    wait
    rm -rf "$folder"
}
trap tear_down EXIT

if ! munge -n >/dev/null 2>&1; then
    mkdir -p /run/munge /var/log/munge
    chown munge: /run/munge /var/log/munge
    [[ -e /etc/munge/munge.key ]] || (umask 077 && head -c 1024 /dev/urandom >/etc/munge/munge.key && chown munge: /etc/munge/munge.key)
    setpriv --reuid=munge --regid=munge --init-groups munged --foreground &
    daemons+=($!)
    sleep 2
fi
slurmctld -D &
daemons+=($!)
sleep 2
slurmd -D -N "$host" &
daemons+=($!)
until sinfo --noheader --format=%t | grep -q idle; do sleep 1; done
sinfo

"$PYTHON" -m mrjax.demo --output="$folder/demo" --size=64 --slices=6 --train=2 --val=1 --test=1
log=$folder/run.log
run=$folder/run
submit() {
    sbatch --parsable --ntasks=2 --cpus-per-task=1 --output="$log" launch/slurm.sbatch --config=configs/unet.py \
        --workdir="$run" --config.data.dir="$folder/demo" --config.steps="$1" --config.model.channels=4 --config.model.levels=2 --config.log_every=5 \
        --config.checkpoint_every=10 --config.eval_every=1000000
}
steps() { find "$run/checkpoints" -maxdepth 1 -name '[0-9]*' -printf '%f\n' 2>/dev/null | grep -x '[0-9]*' | sort -n | tail -n 1; }
say() { echo "=== $*"; }
until_step() { until [[ $(steps || true) -ge $1 ]]; do sleep 0.5; done; }
until_gone() { while squeue --noheader --jobs="$1" 2>/dev/null | grep -q .; do sleep 1; done; }

say "a run of two tasks on the demo data, asked to stop by scancel"
job=$(submit 1000000)
until_step 20
scancel "$job"
until_gone "$job"
stopped=$(steps)
say "it stopped at step $stopped; submitted again, and one task killed by SIGKILL"
job=$(submit 1000000)
until_step $((stopped + 20))
started=$SECONDS
for id in $(pgrep -f -- "mrjax.main .*--workdir=$run "); do
    if grep -qzx SLURM_PROCID=1 "/proc/$id/environ"; then kill -KILL "$id"; fi
done
until squeue --noheader --jobs="$job" --format=%T | grep -q PENDING; do sleep 0.2; done
say "back in the queue $((SECONDS - started)) s after the kill, at step $(steps)"
killed=$(steps)
scancel "$job"
until_gone "$job"
say "the whole of it, to step $((killed + 20))"
job=$(submit $((killed + 20)))
until_gone "$job"
say "the log"
grep -v -E '^[|+]' "$log"
[[ $(steps) == $((killed + 20)) ]]
say "done: step $(steps)"
