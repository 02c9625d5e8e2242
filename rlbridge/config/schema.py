"""A config as others read it: YAML for people and for `config.yaml`, a JSON schema for editors."""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from rlbridge.config.sections import AUTO_TRANSPORT, BACKEND_ROLES, RunConfig, default_backend, options_model
from rlbridge.plugins import Role, registry


def to_yaml(config: RunConfig) -> str:
    """Every key with its value. Loading it again gives an equal config."""
    # Escaped, since PyYAML (6.0) does not read back every character that it writes as it is, U+0085 for one.
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a config file, with the options of every backend that is importable here."""
    choices = {role: _options_models(role) for role in BACKEND_ROLES}
    models = {model for named in choices.values() for model in named.values()}
    references, shared = models_json_schema(
        [(RunConfig, "validation"), *((model, "validation") for model in sorted(models, key=lambda model: model.__qualname__))]
    )
    definitions = shared["$defs"]
    schema = definitions.pop(RunConfig.__name__)
    for role, named in choices.items():
        schema["properties"][role] = {
            "description": schema["properties"][role]["description"],
            "anyOf": [_choice(role, name, references[(model, "validation")]) for name, model in named.items()],
        }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "$defs": definitions}


def _options_models(role: Role) -> dict[str, type[BaseModel]]:
    names = [row.name for row in registry().listing() if row.role == role and row.importable]
    return {name: options_model(role, name) for name in names + ([AUTO_TRANSPORT] if role == "transport" else [])}


def _choice(role: Role, name: str, reference: dict[str, Any]) -> dict[str, Any]:
    required = [] if name == default_backend(role) else ["backend"]
    return {"allOf": [reference], "properties": {"backend": {"const": name}}, "required": required}
