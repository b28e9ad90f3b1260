#!/usr/bin/env bash
# A Slurm of one node for the tests, as root, without systemd, on loopback: start.sh FOLDER. The process ids of what it started are in FOLDER/pids.
# Debian: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
# The configuration has to be /etc/slurm: the executor plugin drops SLURM_CONF. One that is not ours is left alone, and this stops.
set -eu
folder=$1
mark="# Written by quantgrid's tests."
node=$(hostname -s)
cores=$(slurmd -C | grep -o 'CPUs=.*ThreadsPerCore=[0-9]*') # as slurmd finds them: another line would leave the node drained
memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.8)}' /proc/meminfo)
mkdir -p "$folder/state" "$folder/spool" "$folder/log" /etc/slurm
if [ -e /etc/slurm/slurm.conf ] && ! grep -qF "$mark" /etc/slurm/slurm.conf; then
    echo "/etc/slurm/slurm.conf is not of these tests; it is left alone" >&2
    exit 2
fi
if [ -e /etc/slurm/slurm.conf ] && scontrol ping 2>/dev/null | grep -q UP; then
    echo "the Slurm of another run of these tests is up (kill \$(cat $(sed -n 's/^StateSaveLocation=//p' /etc/slurm/slurm.conf)/../pids) ends it)" >&2
    exit 2
fi
for card in 0 1; do # null devices in the place of GPUs
    [ -e "$folder/gpu$card" ] || mknod "$folder/gpu$card" c 1 3 || { echo "device files cannot be made here" >&2; exit 2; }
done
if ! munge -n >/dev/null 2>&1; then
    install -d -o munge -g munge -m 0700 /etc/munge /var/lib/munge /var/log/munge
    install -d -o munge -g munge -m 0755 /run/munge
    [ -s /etc/munge/munge.key ] || head -c 1024 /dev/urandom > /etc/munge/munge.key
    chown munge:munge /etc/munge/munge.key
    chmod 0400 /etc/munge/munge.key
    setpriv --reuid=munge --regid=munge --init-groups munged
    cat /run/munge/munged.pid >> "$folder/pids"
fi
echo "Name=gpu File=$folder/gpu[0-1]" > /etc/slurm/gres.conf
cat > /etc/slurm/slurm.conf <<CONF
$mark
ClusterName=quantgrid
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
SlurmctldPort=${SLURMCTLD_PORT:-16817}
SlurmdPort=${SLURMD_PORT:-16818}
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
MinJobAge=3600
KillWait=5
# Memory is watched by polling, as where a cluster has no cgroups: a job over its memory is killed within seconds.
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
GresTypes=gpu
NodeName=$node NodeAddr=127.0.0.1 $cores RealMemory=$memory Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
slurmctld
slurmd -N "$node"
for _ in $(seq 240); do
    [ "$(sinfo -h -o %T 2>/dev/null)" = idle ] && break
    sleep 0.5
done
for daemon in slurmctld slurmd; do
    cat "$folder/$daemon.pid" >> "$folder/pids"
    echo >> "$folder/pids"
done
[ "$(sinfo -h -o %T)" = idle ] || { echo "the node is not idle:"; sinfo; tail -5 "$folder"/log/*.log; exit 1; } >&2
