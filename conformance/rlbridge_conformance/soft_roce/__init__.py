"""Real RDMA verbs on any Linux machine: the kernel's software RoCE (rdma_rxe), in a guest that sees this machine's files.

The guest is Debian's or Ubuntu's own kernel under qemu, without KVM. Its root is this machine's, read-only under a layer of its
own in memory, so the Python environment in use here is the one in there; what it writes to its directory `out` comes back.
"""
