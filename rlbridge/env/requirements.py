"""What an environment's requirements ask for, where one of them is rlbridge, or the plugin's own distribution."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator

from packaging.requirements import InvalidRequirement, Requirement

from rlbridge.env.driver import normalised
from rlbridge.environment import Environment
from rlbridge.errors import PluginError


def expanded(environment: Environment) -> list[str]:
    """The requirements, with what the installed rlbridge requires in place of it: it is copied, and never fetched.

    The same goes for the distribution that brings the environment; extras count.

    Raises:
        PluginError: one is no requirement.
    """
    own = {normalised("rlbridge"), normalised(environment.distribution)}
    try:
        return list(dict.fromkeys(_lines(map(Requirement, environment.requirements), own)))
    except InvalidRequirement as error:
        raise PluginError(f"a requirement of the environment {environment.name!r} is none: {error}") from error


def _lines(requirements: Iterable[Requirement], own: set[str]) -> Iterator[str]:
    for requirement in requirements:
        if normalised(requirement.name) in own:
            yield from _lines(_required(requirement), own)
        else:
            yield str(requirement)


def _required(own: Requirement) -> Iterator[Requirement]:
    for line in importlib.metadata.requires(own.name) or ():
        requirement = Requirement(line)
        marker, requirement.marker = requirement.marker, None
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *own.extras)):
            yield requirement
