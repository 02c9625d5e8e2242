"""RDMA as the kernel tells of it: devices and ports, what the ports have counted, and why RDMA would not be used here."""
