"""Ray's own pattern with two rlbridge backends: a trainer on H100s, a generator on B200s, weights by NIXL.

python docs/examples/ray_pattern.py MODEL_DIRECTORY            # on a cluster that has both accelerators
python docs/examples/ray_pattern.py MODEL_DIRECTORY --pretend  # here: Ray is told that it has them
"""

from __future__ import annotations

import socket
import sys

import ray

from rlbridge.cluster.direct import DirectGenerator, DirectTrainer, Weights
from rlbridge.roles.batch import Sampling

PRETEND = "--pretend" in sys.argv
GPUS, DEVICE = (0, "cpu") if PRETEND else (1, "cuda")


@ray.remote(accelerator_type="H100", num_gpus=GPUS, enable_tensor_transport=True)
class Trainer(DirectTrainer):
    """The native trainer."""

    @ray.method(tensor_transport="nixl")
    def get_weights(self) -> Weights:
        """Weights that Ray Direct Transport moves by NIXL, never through the object store."""
        return super().get_weights()


@ray.remote(accelerator_type="B200", num_gpus=GPUS, enable_tensor_transport=True)
class Generator(DirectGenerator):
    """The native generator."""


def main(model: str) -> int:
    """Start both, send two versions, and generate with the second. Returns the version that is served."""
    cluster = pretended_cluster() if PRETEND else None
    ray.init(address=cluster.address if cluster else None, logging_level="ERROR", log_to_driver=False)
    trainer = Trainer.remote("native", model, f"tcp://127.0.0.1:{free_port()}", device=DEVICE)
    generator = Generator.remote("native", model, device=DEVICE)

    version = 0
    for _ in range(2):
        version = ray.get(generator.set_weights.remote(trainer.get_weights.remote()), timeout=300)

    completion = ray.get(generator.generate.remote([[4, 5, 6]], Sampling(max_tokens=4, temperature=0.0)), timeout=60)[0]
    print(f"version {version} is served and verified; tokens {completion.token_ids} of versions {completion.versions}")
    ray.shutdown()
    if cluster:
        cluster.shutdown()
    return version


def pretended_cluster():  # type: ignore[no-untyped-def]
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for kind in ("H100", "B200"):
        cluster.add_node(num_cpus=1, resources={f"accelerator_type:{kind}": 1})
    return cluster


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main(sys.argv[1])
