"""A plugin whose engine pins other versions than rlbridge's users have, and brings an environment for it."""

from rlbridge import Backend, Environment, hookimpl


@hookimpl
def rlbridge_generators():
    return [
        Backend(
            name="acme",
            load="acme_engine.generator:AcmeGenerator",
            options="acme_engine.options:AcmeOptions",
            summary="The engine of Acme.",
            requires=("acme",),  # what must be importable where it runs
            environments=("acme-cpu",),  # where it has been tested, best first
        )
    ]


@hookimpl
def rlbridge_environments():
    return [
        Environment(
            name="acme-cpu",
            summary="Acme 3 on a CPU.",
            lock="acme_engine:acme-cpu.lock",
            requirements=("rlbridge", "acme==3.1.0", "transformers==5.12.0"),
            overrides=("torch==2.13.0",),
            no_deps=("acme-kernels==0.4.2",),
            variables={"ACME_DEVICE": "cpu"},
            modules=("acme.server", "ray"),
        )
    ]
