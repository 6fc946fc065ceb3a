#!/usr/bin/env bash
# A real SLURM of one node, this machine, for tests: controller, node daemon and authentication of its own.
#   apt-get install -y slurm-wlm munge      Debian's packages, once
#   local-slurm.sh start DIR [PORT]         then export SLURM_CONF=DIR/slurm.conf, and sbatch, squeue, scancel work
#   local-slurm.sh stop DIR                 ends what start began
# Needs root. All that it writes lies in DIR, which must be short (a socket's name has 107 characters at most); it listens
# on PORT and PORT + 1 of this machine, so that there may be several. Arrays have three jobs at most: longer sweeps need two.
set -euo pipefail

start() {
  local dir=$1 port=${2:-6817}
  mkdir -p "$dir"/{state,spool}
  (umask 077 && head -c 1024 /dev/urandom >"$dir/munge.key")
  cat >"$dir/slurm.conf" <<EOF
ClusterName=local
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
MaxArraySize=3
MpiDefault=none
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=0
NodeName=$(hostname) NodeAddr=127.0.0.1 CPUs=$(getconf _NPROCESSORS_ONLN) State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
EOF
  export SLURM_CONF=$dir/slurm.conf
  munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
    --seed-file="$dir/munge.seed" --log-file="$dir/munged.log"
  slurmctld
  slurmd
  for _ in $(seq 60); do
    if sinfo --noheader --format %t 2>/dev/null | grep -qE '^(idle|mix|alloc)'; then return; fi
    sleep 0.5
  done
  echo "local-slurm.sh: the node did not come up; see $dir/slurmctld.log and $dir/slurmd.log" >&2
  return 1
}

stop() {
  local dir=$1 daemon
  export SLURM_CONF=$dir/slurm.conf
  scancel --user root || true
  for _ in $(seq 20); do
    if [ -z "$(squeue --noheader 2>/dev/null)" ]; then break; fi
    sleep 0.5
  done
  for daemon in slurmd slurmctld munged; do
    if [ -e "$dir/$daemon.pid" ]; then kill "$(cat "$dir/$daemon.pid")" || true; fi
  done
}

case ${1:-} in
  start | stop) "$@" ;;
  *) echo "usage: $0 start DIR [PORT] | stop DIR" >&2; exit 2 ;;
esac
