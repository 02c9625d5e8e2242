"""The sections of a run's config. Every field is described and, but for `model.path`, has a default."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from rlbridge.errors import PluginError
from rlbridge.plugins import Role, registry
from rlbridge.roles.generator import GeneratorOptions
from rlbridge.roles.trainer import TrainerOptions
from rlbridge.roles.transport import TransportOptions

AUTO_TRANSPORT = "auto"

Decay = Annotated[float, Field(ge=0, lt=1)]

BACKEND_ROLES: dict[Role, type[BaseModel]] = {
    "trainer": TrainerOptions,
    "generator": GeneratorOptions,
    "transport": TransportOptions,
}
"""The roles whose section is validated by the chosen backend's options model, with what is common to all of them."""


class Section(BaseModel):
    """A part of the config that is the same whatever the backends; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class ModelSection(Section):
    """The policy to train."""

    path: Path = Field(description="A Hugging Face model directory.")
    make: str | None = Field(default=None, description="Name of a model maker that makes the model at `path` if there is none.")
    trust_remote_code: bool = Field(default=False, description="Let the model directory's own Python run.")


class DataSection(Section):
    """The prompts, as JSON lines."""

    path: Path | None = Field(
        default=None, description="Training prompts. With model.make: prompts.jsonl in the model directory."
    )
    prompt_key: str = Field(default="prompt", description="Key of the prompt in a line.")
    answer_key: str = Field(default="answer", description="Key of the answer in a line.")
    chat: bool = Field(default=False, description="Put each prompt through the tokenizer's chat template.")
    held_out_path: Path | None = Field(
        default=None, description="Prompts for evaluation. With model.make: held_out.jsonl in the model directory."
    )
    held_out: int = Field(
        default=128, ge=0, description="Prompts to evaluate on; split off the training prompts if held_out_path is null."
    )


class RewardSection(Section):
    """What a completion is worth."""

    fn: str = Field(default="exact_match", min_length=1, description="Name of a reward function, or module:function.")


class SamplingSection(Section):
    """How completions are sampled."""

    max_tokens: int = Field(default=64, ge=1, description="Most tokens of a completion.")
    temperature: float = Field(
        default=1.0, gt=0, description="What logits are divided by; not 0, where no two samples would differ."
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Sample from the most likely tokens of this total probability; 1 is all."
    )
    top_k: int = Field(default=0, ge=0, description="Sample from this many of the most likely tokens; 0 is all.")
    stop: list[str] = Field(default_factory=list, description="Strings that end a completion.")


class AlgorithmSection(Section):
    """Group-relative policy optimization with a clipped ratio."""

    steps: int = Field(default=100, ge=1, description="Optimizer steps of the run.")
    prompts_per_step: int = Field(default=32, ge=1, description="Prompts of a step.")
    samples_per_prompt: int = Field(
        default=16, ge=2, description="Completions of a prompt: the group that its rewards are compared in."
    )
    clip_low: float = Field(
        default=0.2, ge=0, le=1, description="How far below 1 the ratio of new to old probability still counts."
    )
    clip_high: float = Field(default=0.2, ge=0, description="How far above 1 the ratio of new to old probability still counts.")
    kl_coef: float = Field(default=0.0, ge=0, description="Weight of the divergence from the initial model; 0 leaves it out.")
    normalise: Literal["group_std", "group_mean"] = Field(
        default="group_std",
        description="Advantages: the reward less the group's mean, with group_std divided by its standard deviation.",
    )


class OptimizerSection(Section):
    """AdamW."""

    lr: float = Field(default=1e-6, ge=0, description="Learning rate.")
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.95), description="Decay of the first and of the second moment.")
    eps: float = Field(default=1e-8, gt=0, description="Added to the denominator.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay.")
    grad_clip: float = Field(default=1.0, ge=0, description="Largest norm of the gradient; 0 clips nothing.")
    warmup_steps: int = Field(default=0, ge=0, description="Steps over which the learning rate rises linearly.")


class SyncSection(Section):
    """How the weights get from the trainer to the generators."""

    publish: Literal["snapshot", "barrier"] = Field(
        default="snapshot", description="snapshot copies, and training goes on; barrier is read in place, while training waits."
    )
    cast: Literal["generator", "refuse"] = Field(
        default="generator",
        description="Float dtypes that differ: round to the generator's in the trainer's snapshot, or refuse.",
    )
    pause: Literal["wait", "keep", "abort"] = Field(
        default="wait",
        description="What an install does to running requests: wait lets them finish, keep holds them, and they go on with"
        " the new weights; abort ends them with what they have.",
    )
    deadline_seconds: float = Field(default=60.0, gt=0, description="How long one sync may take.")
    lease_seconds: float = Field(
        default=120.0, gt=0, description="How long a published version is held for a generator that is silent."
    )


class EvaluationSection(Section):
    """When the held-out prompts are answered."""

    every: int = Field(
        default=10, ge=0, description="Steps between evaluations; 0 evaluates before the first and after the last only."
    )


class CheckpointSection(Section):
    """When the run's state is written."""

    every: int = Field(default=0, ge=0, description="Steps between checkpoints; 0 writes one at the end only.")
    keep: int = Field(default=2, ge=1, description="Checkpoints to keep; older ones are deleted.")


class ClusterSection(Section):
    """The Ray cluster that the run lives on."""

    address: str | None = Field(
        default=None, description="auto or host:port of a cluster to join; null starts one on this machine for the run."
    )
    start_seconds: float = Field(default=120.0, gt=0, description="How long the actors may take to start.")
    step_seconds: float = Field(
        default=1800.0,
        gt=0,
        description="How long one call may take: generating a step's completions, a training step, a save.",
    )
    temp_dir: Path | None = Field(default=None, description="Where Ray keeps its sessions; null leaves it to Ray.")


def options_model(role: Role, name: str) -> type[BaseModel]:
    """The model that validates the section of `role` when its backend is `name`.

    Raises:
        PluginError: there is no such backend, or its options cannot be imported.
    """
    if role == "transport" and name == AUTO_TRANSPORT:
        return TransportOptions
    return registry().options_model(role, name)


def default_backend(role: Role) -> str:
    """The backend of `role` where the config names none."""
    return str(BACKEND_ROLES[role].model_fields["backend"].default)


def _chosen_by_backend(role: Role) -> BeforeValidator:
    def validate(value: object) -> object:
        if isinstance(value, BaseModel):
            value = value.model_dump(exclude_unset=True)
        if not isinstance(value, Mapping):
            return value
        name = value.get("backend", default_backend(role))
        try:
            model = options_model(role, str(name))
        except PluginError as error:
            raise _at(f"{error}", ("backend",), name) from error
        return model.model_validate(value)

    return BeforeValidator(validate)


def _at(message: str, path: tuple[str, ...], value: object) -> ValidationError:
    problem = PydanticCustomError("rlbridge", "{message}", {"message": message})
    return ValidationError.from_exception_data("config", [InitErrorDetails(type=problem, loc=path, input=value)])


class RunConfig(Section):
    """Everything that a run is told."""

    name: str | None = Field(
        default=None,
        pattern=r"^\w[\w.-]*$",
        description="Name of the run's directory; null takes the config file's, and the first free.",
    )
    runs_dir: Path = Field(default=Path("runs"), description="Where the directories of runs are.")
    seed: int = Field(default=0, ge=0, description="Seeds sampling, the order of prompts, and what the model maker makes.")
    model: ModelSection = Field(default={}, validate_default=True, description="The policy to train.")
    data: DataSection = Field(default_factory=DataSection, description="The prompts.")
    reward: RewardSection = Field(default_factory=RewardSection, description="What a completion is worth.")
    sampling: SamplingSection = Field(default_factory=SamplingSection, description="How completions are sampled.")
    algorithm: AlgorithmSection = Field(default_factory=AlgorithmSection, description="The steps and the loss.")
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection, description="AdamW.")
    trainer: Annotated[SerializeAsAny[TrainerOptions], _chosen_by_backend("trainer")] = Field(
        default={},
        validate_default=True,
        description="The trainer; `backend` names it, and decides which further keys there are.",
    )
    generator: Annotated[SerializeAsAny[GeneratorOptions], _chosen_by_backend("generator")] = Field(
        default={},
        validate_default=True,
        description="The generators; `backend` names them, and decides which further keys there are.",
    )
    transport: Annotated[SerializeAsAny[TransportOptions], _chosen_by_backend("transport")] = Field(
        default={},
        validate_default=True,
        description="The transport; `backend` names it, and decides which further keys there are.",
    )
    sync: SyncSection = Field(default_factory=SyncSection, description="How weights get to the generators.")
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection, description="When to evaluate.")
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection, description="When to write the run's state.")
    cluster: ClusterSection = Field(default_factory=ClusterSection, description="The Ray cluster.")

    @model_validator(mode="after")
    def _default_data(self) -> RunConfig:
        if self.model.make is not None:
            self.data.path = self.data.path or self.model.path / "prompts.jsonl"
            self.data.held_out_path = self.data.held_out_path or self.model.path / "held_out.jsonl"
        elif self.data.path is None:
            raise _at("required, since no model.make brings prompts", ("data", "path"), None)
        return self

    @property
    def prompts_path(self) -> Path:
        """Where the training prompts are; `data.path`, which validation has filled in."""
        assert self.data.path is not None
        return self.data.path
