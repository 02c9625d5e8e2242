"""The trainer and the generator that come with rlbridge: transformers models, trained with FSDP2."""

from __future__ import annotations

from collections.abc import Sequence

from rlbridge import Backend, Capability, hookimpl


@hookimpl
def rlbridge_trainers() -> Sequence[Backend]:
    """GRPO on transformers models."""
    return [
        Backend(
            name="native",
            load="rlbridge_native.trainer:NativeTrainer",
            options="rlbridge_native.options:NativeTrainerOptions",
            summary="GRPO on any transformers causal LM, sharded with FSDP2; CPU or CUDA.",
            extra="native",
            requires=("torch", "transformers"),
            capabilities=frozenset({Capability.SHARDED, Capability.MULTI_RANK, Capability.LIVE_STORAGE, Capability.CUDA}),
        )
    ]


@hookimpl
def rlbridge_generators() -> Sequence[Backend]:
    """Sampling from transformers models."""
    return [
        Backend(
            name="native",
            load="rlbridge_native.generator:NativeGenerator",
            options="rlbridge_native.options:NativeGeneratorOptions",
            summary="Batched sampling from any transformers causal LM; CPU or CUDA.",
            extra="native",
            requires=("torch", "transformers"),
            capabilities=frozenset({Capability.RANKS_ARE_ACTORS, Capability.CUDA}),
        )
    ]


@hookimpl
def rlbridge_models() -> Sequence[Backend]:
    """Models made on the spot."""
    return [
        Backend(
            name="arithmetic",
            load="rlbridge_native.make:make_arithmetic",
            summary="A small Qwen3 that half knows how to add, with its prompts: made in about a minute.",
            extra="native",
            requires=("torch", "transformers"),
        )
    ]
