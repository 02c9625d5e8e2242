#!/bin/busybox sh
# The guest's first program: modules, then the root of the machine, read-only under a layer in memory.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs devtmpfs /dev
while read -r module; do
  $b insmod "/modules/$module" || echo "guest: $module cannot be loaded"
done < /modules/order
$b mount -t 9p -o trans=virtio,version=9p2000.L,msize=1048576,cache=loose,ro root /lower || $b poweroff -f
$b mount -t tmpfs -o size=90% tmpfs /layer
$b mkdir /layer/upper /layer/work
$b mount -t overlay -o lowerdir=/lower,upperdir=/layer/upper,workdir=/layer/work overlay /root || $b poweroff -f
for kept in proc sys dev; do
  $b mount --move "/$kept" "/root/$kept"
done
$b mkdir -p /root/run
$b mount -t tmpfs tmpfs /root/run
$b mkdir /root/run/out
$b mount -t 9p -o trans=virtio,version=9p2000.L,msize=1048576 out /root/run/out || $b poweroff -f
exec $b switch_root /root /bin/sh /run/out/init.sh
