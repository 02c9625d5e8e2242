# The guest's second program, on the machine's own root: an RDMA device, then what was asked for, then the end.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
out=/run/out
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
ln -sfn /proc/self/fd /dev/fd
# The wheel's libibverbs would complain of each provider that the distribution names here.
ls $out/librxe-rdmav*.so >/dev/null 2>&1 && mount -t tmpfs tmpfs /etc/libibverbs.d
hostname guest
ulimit -n 65536
ulimit -l unlimited
ip link set lo up
ip link add roce0 type dummy
ip addr add 10.78.0.1/24 dev roce0
ip link set roce0 mtu 9000 up
rdma link add rxe0 type rxe netdev roce0 || echo "guest: rdma_rxe makes no device"
echo "guest: up at $(cut -d' ' -f1 /proc/uptime)"
sh $out/command.sh </dev/null
echo $? > $out/exit-code
sync
echo "guest: done at $(cut -d' ' -f1 /proc/uptime)"
busybox poweroff -f
