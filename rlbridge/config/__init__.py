"""The typed configuration of a run: its sections, how it is loaded, and what is checked before anything starts."""

from rlbridge.config.check import check_config, incompatibilities, model_problem
from rlbridge.config.load import load_config
from rlbridge.config.schema import json_schema, to_yaml
from rlbridge.config.sections import RunConfig

__all__ = ["RunConfig", "check_config", "incompatibilities", "json_schema", "load_config", "model_problem", "to_yaml"]
