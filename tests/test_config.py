"""A config is typed, wrong in one error that lists everything, and checked before anything starts."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

from rlbridge import Backend, Capability, hookimpl
from rlbridge.config import RunConfig, check_config, incompatibilities, json_schema, load_config, model_problem, to_yaml
from rlbridge.errors import ConfigError
from rlbridge.plugins import Registry, Source
from rlbridge.roles.trainer import TrainerOptions

C = Capability


class AcmeOptions(TrainerOptions):
    """A backend's own keys."""

    overlap: float = Field(default=0.5, description="How much.")


def acme(name: str, *capabilities: Capability, load: str = "acme_backends:AcmeOptions", options: str = "") -> Backend:
    return Backend(name, load, "For tests.", options=options, capabilities=frozenset(capabilities), extra="nixl")


def acme_plugin() -> ModuleType:
    brought = {
        "trainers": [
            acme("native", C.MULTI_RANK, C.LIVE_STORAGE, C.CUDA, options="acme_backends:AcmeOptions"),
            acme("plain"),
            acme("absent", load="no_such_module:Trainer"),
        ],
        "generators": [acme("native", C.RANKS_ARE_ACTORS, C.CUDA), acme("engine")],
        "transports": [acme("nixl", C.LIVE_STORAGE, C.CUDA), acme("objects", C.NEEDS_RAY_ACTORS)],
        "rewards": [acme("exact_match")],
        "models": [acme("arithmetic")],
    }
    module = ModuleType("acme_backends")
    vars(module).update(
        {f"rlbridge_{role}": hookimpl(lambda backends=backends: backends) for role, backends in brought.items()}
    )
    vars(module).update(AcmeOptions=AcmeOptions)
    return module


@pytest.fixture(autouse=True)
def acme_registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    module = acme_plugin()
    monkeypatch.setitem(sys.modules, "acme_backends", module)
    registry = Registry([Source("acme", "acme", lambda: module)], strict=True)
    for part in ("config.sections", "config.check", "config.schema", "env.placing"):
        monkeypatch.setattr(f"rlbridge.{part}.registry", lambda: registry)
    return registry


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """What passes for a model directory, with prompts beside it."""
    (tmp_path / "model").mkdir()
    for name in ("model/config.json", "model/model.safetensors", "prompts.jsonl"):
        (tmp_path / name).touch()
    return tmp_path / "model"


@pytest.fixture
def file(model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": {"path": str(model)}, "data": {"path": str(tmp_path / "prompts.jsonl")}}))
    return path


def refusal(action: Any, *args: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        action(*args)
    return str(caught.value)


def test_defaults_need_only_a_model_and_prompts(file: Path) -> None:
    config = load_config(file)
    assert (config.name, config.runs_dir, config.seed) == (None, Path("runs"), 0)
    assert (config.trainer.backend, config.generator.backend, config.transport.backend) == ("native", "native", "nixl")
    assert check_config(config) == [f"data.held_out: 128 prompts of {config.prompts_path} are kept for evaluation"]


def test_section_is_of_the_chosen_backends_options_model(file: Path) -> None:
    config = load_config(file, ["trainer.overlap=0.25", "trainer.workers=2"])
    assert isinstance(config.trainer, AcmeOptions)
    assert (config.trainer.overlap, config.trainer.workers) == (0.25, 2)
    assert type(load_config(file, ["trainer.backend=plain"]).trainer) is TrainerOptions


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optimizer.lr=1e-4", "optimizer", "lr", 1e-4),
        ("optimizer.betas=[0.8, 0.9]", "optimizer", "betas", (0.8, 0.9)),
        ("sampling.stop=['a=b', c]", "sampling", "stop", ["a=b", "c"]),
        ("data.chat=true", "data", "chat", True),
        ("generator.variables={TOKENIZERS: 'no'}", "generator", "variables", {"TOKENIZERS": "no"}),
        ("trainer.resources.gpus=0.5", "trainer", "resources", {"cpus": 1.0, "gpus": 0.5, "accelerator": None}),
        ("cluster.address=", "cluster", "address", None),
    ],
)
def test_override_is_a_dotted_path_and_a_yaml_value(file: Path, override: str, section: str, key: str, value: object) -> None:
    loaded = getattr(load_config(file, [override]), section)
    assert loaded.model_dump()[key] == value


def test_later_override_wins(file: Path) -> None:
    assert load_config(file, ["seed=1", "seed=2"]).seed == 2


def test_override_does_not_reach_the_section_that_an_alias_shares(file: Path) -> None:
    file.write_text(file.read_text() + "trainer: &shared {dtype: bfloat16}\ngenerator: *shared\n")
    config = load_config(file, ["trainer.dtype=float32"])
    assert (config.trainer.dtype, config.generator.dtype) == ("float32", "bfloat16")


@pytest.mark.parametrize("value", ["1e-4", "1.0e-4", "0.0001"])
def test_number_with_an_exponent_is_a_number(file: Path, value: str) -> None:
    file.write_text(file.read_text() + f"optimizer:\n  lr: {value}\n")
    assert load_config(file).optimizer.lr == 1e-4


def test_empty_section_means_its_defaults(file: Path) -> None:
    file.write_text(file.read_text() + "sampling:\ntrainer:\n")
    assert load_config(file).sampling.max_tokens == 64


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "override 'seed' is not of the form section.key=value"),
        (".seed=1", "override '.seed=1' is not of the form"),
        ("model.path.deep=1", "model.path is '/"),
        ("sampling.stop=[", "override 'sampling.stop=[' is not YAML"),
        ("sampling=3", "sampling: has to be a section of keys, not 3"),
        ("trainer=native", "trainer: has to be a section of keys, not 'native'"),
    ],
)
def test_malformed_override_is_named(file: Path, override: str, message: str) -> None:
    assert message in refusal(load_config, file, [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1\nb: 2\n", r"run.yaml, line 2, is not YAML: expected ',' or '\]'"),
        (b"- a\n- b\n", r"run.yaml is not a config: it holds \['a', 'b'\]"),
        (b"\xff\xfe\xfa", "cannot read the config .*run.yaml: 'utf-8' codec"),
        (b"", r"model.path: required"),
    ],
)
def test_file_that_is_no_config_says_why(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    assert re.search(message, refusal(load_config, tmp_path / "run.yaml"))


def test_missing_file_is_named(tmp_path: Path) -> None:
    assert refusal(load_config, tmp_path / "no.yaml") == f"cannot read the config {tmp_path}/no.yaml: No such file or directory"


def test_everything_wrong_is_listed_in_one_error(file: Path) -> None:
    message = refusal(
        load_config,
        file,
        [
            "algorithm.stepz=3",
            "trainer.overlep=1",
            "trainer.resources.gpu=1",
            "optimizer.lr=fast",
            "sync.publish=never",
            "generator.backend=enginee",
            "samplin.top_k=3",
            "optimizer.grad_clip=.nan",
        ],
    )
    assert message.splitlines()[0] == f"{file} cannot be used:"
    for line in (
        "algorithm.stepz: unknown key; did you mean 'steps'?",
        "trainer.overlep: unknown key; did you mean 'overlap'?",
        "trainer.resources.gpu: unknown key; did you mean 'gpus'?",
        "optimizer.lr: input should be a valid number, unable to parse string as a number, not 'fast'",
        "sync.publish: input should be 'snapshot' or 'barrier', not 'never'",
        "generator.backend: no generator is named 'enginee'; did you mean 'engine'?",
        "samplin: unknown key; did you mean 'sampling'?",
        "optimizer.grad_clip: input should be a finite number, not nan",
    ):
        assert f"\n  {line}" in message


def test_prompts_default_to_those_of_the_model_maker(file: Path, model: Path) -> None:
    config = load_config(file, ["model.make=arithmetic", "data.path=null"])
    assert (config.data.path, config.data.held_out_path) == (model / "prompts.jsonl", model / "held_out.jsonl")
    assert "data.path: required, since no model.make brings prompts" in refusal(load_config, file, ["data.path=null"])


@given(
    seed=st.integers(0, 2**31),
    lr=st.floats(0, 1),
    stop=st.lists(st.text(max_size=5), max_size=3),
    backend=st.sampled_from(["native", "plain"]),
    transport=st.sampled_from(["auto", "nixl", "objects"]),
)
def test_yaml_of_a_config_loads_as_the_same_config(seed: int, lr: float, stop: list[str], backend: str, transport: str) -> None:
    config = RunConfig.model_validate(
        {
            "model": {"path": "m"},
            "data": {"path": "p"},
            "seed": seed,
            "optimizer": {"lr": lr},
            "sampling": {"stop": stop},
            "trainer": {"backend": backend},
            "transport": {"backend": transport},
        }
    )
    assert RunConfig.model_validate(yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["transport.backend=objects", "generator.backend=engine"],
            "transport.backend 'objects' moves Ray objects, and the ranks of generator.backend 'engine' are no Ray actors",
        ),
        (
            ["transport.backend=objects", "sync.publish=barrier"],
            "sync.publish barrier: transport.backend 'objects' cannot read a trainer's parameters in place",
        ),
        (
            ["trainer.backend=plain", "sync.publish=barrier"],
            "sync.publish barrier: the parameters of trainer.backend 'plain' cannot be read in place",
        ),
        (
            ["transport.backend=objects", "transport.require=rdma"],
            "transport.require rdma: transport.backend 'objects' does not use RDMA",
        ),
        (["sync.pause=keep"], "sync.pause keep: generator.backend 'native' can only wait for running requests"),
        (["trainer.backend=plain", "trainer.workers=2"], "trainer.workers is 2, and trainer.backend 'plain' runs on one"),
        (
            ["trainer.backend=plain", "trainer.resources.gpus=1"],
            "trainer.resources.gpus is 1, and trainer.backend 'plain' does not use CUDA",
        ),
        (
            ["trainer.workers=3", "algorithm.prompts_per_step=5", "algorithm.samples_per_prompt=2"],
            "prompts_per_step 5 x algorithm.samples_per_prompt 2 = 10 sequences a step, which trainer.workers 3 cannot share",
        ),
        (
            ["sync.cast=refuse", "generator.dtype=bfloat16"],
            "sync.cast refuse: trainer.dtype is float32, and generator.dtype bfloat16",
        ),
        (
            ["sync.publish=barrier", "generator.dtype=bfloat16"],
            "barrier reads bytes as they are: trainer.dtype is float32, and generator.dtype bfloat16",
        ),
        (
            ["trainer.backend=absent"],
            "trainer.backend: the trainer 'absent' is not installed here: no module named 'no_such_module'\n"
            "    pip install 'rlbridge[nixl]'",
        ),
        (["reward.fn=exact_mach"], "reward.fn: no reward is named 'exact_mach'; did you mean 'exact_match'?"),
        (["model.make=geometry"], "model.make: no model is named 'geometry'"),
        (["model.path=/nowhere"], "model.path: there is no directory /nowhere"),
        (["data.path=/nowhere.jsonl"], "data.path: there is no /nowhere.jsonl"),
        (["data.held_out_path=/nowhere.jsonl"], "data.held_out_path: there is no /nowhere.jsonl"),
    ],
)
def test_config_that_cannot_run_is_refused_by_name(file: Path, overrides: list[str], message: str) -> None:
    assert message in refusal(check_config, load_config(file, overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["transport.backend=objects"],
        ["sync.publish=barrier"],
        ["trainer.workers=4", "trainer.resources.gpus=1"],
        ["reward.fn=my_module:my_reward"],
        ["transport.backend=auto", "generator.backend=engine"],
    ],
)
def test_config_that_can_run_is_not_refused(file: Path, overrides: list[str]) -> None:
    check_config(load_config(file, overrides))


def test_several_refusals_are_one_error(file: Path) -> None:
    overrides = ["trainer.backend=plain", "trainer.workers=7", "model.path=/nowhere", "data.path=/nowhere.jsonl"]
    assert len(refusal(check_config, load_config(file, overrides)).splitlines()) == 5


def test_incompatibilities_can_be_asked_of_any_transport(file: Path) -> None:
    config = load_config(file, ["transport.backend=auto", "generator.backend=engine"])
    assert incompatibilities(config, "auto") == incompatibilities(config, "nixl") == []
    assert len(incompatibilities(config, "objects")) == 1


@pytest.mark.parametrize(
    ("remove", "problem"),
    [("config.json", "it has no config.json"), ("model.safetensors", "has no weights"), ("", None)],
)
def test_model_problem_says_what_a_directory_lacks(model: Path, remove: str, problem: str | None) -> None:
    if remove:
        (model / remove).unlink()
    found = model_problem(model)
    assert problem in found if problem and found else found is None


def test_model_that_is_going_to_be_made_need_not_exist(file: Path, tmp_path: Path) -> None:
    overrides = ["model.make=arithmetic", f"model.path={tmp_path / 'new'}", "data.path=null", "generator.dtype=bfloat16"]
    assert check_config(load_config(file, overrides)) == [
        f"model.make: there is no directory {tmp_path / 'new'}, so arithmetic makes one",
        "sync.cast: weights are rounded from float32 to bfloat16 before they travel",
    ]


def keys(model: type[BaseModel], place: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        yield f"{place}{name}", field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{place}{name}.")


@pytest.mark.parametrize(("place", "field"), list(keys(RunConfig)), ids=lambda value: value if isinstance(value, str) else "")
def test_key_is_described_and_has_a_default(place: str, field: FieldInfo) -> None:
    assert field.description
    assert field.is_required() == (place == "model.path")


def test_json_schema_holds_the_options_of_importable_backends() -> None:
    schema = json_schema()
    trainers = {choice["properties"]["backend"]["const"]: choice for choice in schema["properties"]["trainer"]["anyOf"]}
    assert set(trainers) == {"native", "plain"}
    assert trainers["native"]["allOf"] == [{"$ref": "#/$defs/AcmeOptions"}]
    assert (trainers["native"]["required"], trainers["plain"]["required"]) == ([], ["backend"])
    assert "overlap" in schema["$defs"]["AcmeOptions"]["properties"]
    transports = [choice["properties"]["backend"]["const"] for choice in schema["properties"]["transport"]["anyOf"]]
    assert transports == ["nixl", "objects", "auto"]
