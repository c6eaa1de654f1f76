# Two machines that share this one's disk, as network namespaces with a bridge, and Slurm on both; ends with a command.
#
#     bash tests/support/two_machines.sh FOLDER COMMAND...     as root
#
# FOLDER/packages holds Debian's packages unpacked (slurm-wlm and what it needs). All is seen through an overlay: nothing
# is installed. COMMAND runs beside slurmctld; `node1` and `node2` are the nodes, v1 and v2 their cables.
set -eu
if [ -z "${INSIDE:-}" ]; then
  export FOLDER=$(realpath "$1"); shift
  exec unshare --mount --net --uts --pid --fork --kill-child env INSIDE=1 bash "$0" "$@"
fi
if [ "$INSIDE" = 1 ]; then
  mount --make-rprivate /
  mkdir -p "$FOLDER/overlay"; mount -t tmpfs -o size=2g tmpfs "$FOLDER/overlay"
  mkdir "$FOLDER/overlay/up" "$FOLDER/overlay/work" "$FOLDER/overlay/root"
  cp -r "$FOLDER/packages" "$FOLDER/overlay/packages"  # no layer may lie within another
  mount -t overlay overlay -o "lowerdir=$FOLDER/overlay/packages:/,upperdir=$FOLDER/overlay/up,workdir=$FOLDER/overlay/work" "$FOLDER/overlay/root"
  R="$FOLDER/overlay/root"
  mount -t proc proc "$R/proc"; mount --rbind /dev "$R/dev"; mount --rbind /sys "$R/sys"
  mkdir -p "$R$FOLDER"; mount --bind "$FOLDER" "$R$FOLDER"
  exec env INSIDE=2 chroot "$R" bash "$(realpath "$0")" "$@"
fi
ip link set lo up
mkdir -p /run/netns /run/munge /etc/slurm /var/log/slurm /var/spool/ctld
ip link add br0 type bridge; ip addr add 10.99.0.1/24 dev br0; ip link set br0 up
for i in 1 2; do
  ip netns add "n$i"; ip link add "v$i" type veth peer name eth0 netns "n$i"; ip link set "v$i" master br0 up
  ip -n "n$i" addr add "10.99.0.1$i/24" dev eth0; ip -n "n$i" link set eth0 up; ip -n "n$i" link set lo up
  mkdir -p "/var/spool/slurmd.node$i"
done
hostname ctl
printf '127.0.0.1 localhost\n10.99.0.1 ctl\n10.99.0.11 node1\n10.99.0.12 node2\n' > /etc/hosts
ln -sf slurmstepd-wlm /usr/sbin/slurmstepd
mkdir -p /run/m; head -c 128 /dev/urandom > /run/m/key; chmod 600 /run/m/key
munged --force --key-file=/run/m/key --socket=/run/m/socket --pid-file=/run/m/pid --log-file=/run/m/log --seed-file=/run/m/seed
cat > /etc/slurm/slurm.conf <<'C'
ClusterName=two
SlurmctldHost=ctl
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=/run/m/socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmctldPidFile=/run/ctld.pid
SlurmdPidFile=/run/slurmd.%n.pid
SlurmdSpoolDir=/var/spool/slurmd.%n
StateSaveLocation=/var/spool/ctld
SlurmctldLogFile=/var/log/slurm/ctld.log
SlurmdLogFile=/var/log/slurm/%n.log
KillWait=30
NodeName=node[1-2] CPUs=2 Sockets=1 CoresPerSocket=2 State=UNKNOWN
PartitionName=all Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
C
slurmctld-wlm -c
for i in 1 2; do nsenter --net="/run/netns/n$i" unshare --uts bash -c "hostname node$i; exec slurmd-wlm"; done
for _ in $(seq 60); do [ "$(sinfo -h -o %T)" = idle ] && break; sleep 0.5; done
sinfo -N -l
exec "$@"
