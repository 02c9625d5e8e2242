"""The base of every role's options model: unknown keys are refused, every field is described."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Resources(BaseModel):
    """What Ray sets aside for one actor of a role."""

    model_config = ConfigDict(extra="forbid")

    cpus: float = Field(1.0, ge=0, description="CPU cores.")
    gpus: float = Field(0.0, ge=0, description="GPUs; the role then runs on CUDA.")
    accelerator: str | None = Field(None, description="Accelerator type as Ray names it, for example H100 or B200.")


class RoleOptions(BaseModel):
    """What the options of a trainer, a generator and a transport have in common."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    resources: Resources = Field(default_factory=Resources, description="Resources of each actor of this role.")
    env: str | None = Field(
        None,
        description="Name of the environment that the role's actors run in; null: this one, or where the backend cannot be"
        " imported here, the first of its own that is built.",
    )
    variables: dict[str, str] = Field(default_factory=dict, description="Environment variables of each actor of this role.")
    threads: int = Field(1, ge=0, description="OMP_NUM_THREADS of each actor; 0 leaves the variable alone.")
