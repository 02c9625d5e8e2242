"""The result of a conformance run as data: result.json, schema version 1. What a result holds is redacted as it is made."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

from rlbridge_conformance.levels import LEVELS, Level
from rlbridge_conformance.report.environment import Environment, Text
from rlbridge_conformance.report.redact import redact

SCHEMA = 1

State = Literal["pass", "fail", "error", "skip", "not_run"]
Verdict = Literal["conformant", "not-conformant", "error", "incomplete"]

STATES: tuple[State, ...] = get_args(State)
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

_EXIT_CODES: dict[Verdict, int] = {"conformant": 0, "not-conformant": 1, "error": 2, "incomplete": 3}
_OPTIONAL = ("what", "expected", "got")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class BackendInfo(_Part):
    """One role's backend."""

    name: str = Field(description="What the config calls it.")
    distribution: str = Field(description="The distribution that brings it.")
    version: str = Field(description="The version of that distribution; empty if it is not known.")
    options: Annotated[dict[str, JsonValue], BeforeValidator(redact)] = Field(description="Its options, redacted.")
    capabilities: list[str] = Field(description="What it declares.")
    reference: bool = Field(description="Supplied by the suite, because the user did not name that role.")


class LevelCounts(_Part):
    """How many checks of a level ended in each state."""

    passed: int = Field(0, ge=0, alias="pass", description="Checks that passed.")
    fail: int = Field(0, ge=0, description="Checks that the backend failed.")
    error: int = Field(0, ge=0, description="Checks that say nothing, since the suite broke.")
    skip: int = Field(0, ge=0, description="Checks of what the backend does not claim.")
    not_run: int = Field(0, ge=0, description="Checks of what it claims, for which this machine lacks something.")

    @property
    def claimed(self) -> int:
        """How many checks had to pass."""
        return self.passed + self.fail + self.error + self.not_run


class Check(_Part):
    """One check and how it ended."""

    id: str = Field(description="Its level and its name, with its parameters in brackets.")
    level: Level = Field(description="The level that it belongs to.")
    state: State = Field(description="How it ended.")
    seconds: float = Field(ge=0, allow_inf_nan=False, description="How long it took.")
    detail: Text = Field(description="The traceback, or the reason why it was skipped or did not run.")
    what: Text | None = Field(None, description="What was looked at, as a sentence that should be true.")
    expected: Text | None = Field(None, description="What should have been seen.")
    got: Text | None = Field(None, description="What was seen.")


class Wire(_Part):
    """What carried the bytes."""

    name: Text = Field("", description="The medium, for example cma; empty if no bytes were carried.")
    evidence: Text = Field("", description="How that is known.")


class Result(_Part):
    """All of result.json. `Result.of` makes one; its levels and its verdict have to be those that follow from its checks."""

    schema_version: Literal[1] = Field(1, alias="schema", description="Version of this schema.")
    verdict: Verdict = Field(description="What follows from the levels.")
    trainer: BackendInfo | None = Field(description="The trainer; null if there was none.")
    generator: BackendInfo | None = Field(description="The generator; null if there was none.")
    transport: BackendInfo | None = Field(description="The transport; null if there was none.")
    levels: Annotated[dict[Level, LevelCounts], AfterValidator(lambda levels: _in_order(levels))] = Field(
        description="The levels that were asked for, in order."
    )
    checks: list[Check] = Field(description="Every check of these levels.")
    wire: Wire = Field(description="What carried the bytes.")
    environment: Environment = Field(description="What it was measured on.")

    @classmethod
    def of(
        cls,
        levels: Iterable[Level],
        checks: Iterable[Check],
        environment: Environment,
        *,
        trainer: BackendInfo | None = None,
        generator: BackendInfo | None = None,
        transport: BackendInfo | None = None,
        wire: Wire | None = None,
    ) -> Result:
        """The result of `checks`, where `levels` were asked for. If the suite itself broke, say so by a check in state error.

        Raises:
            pydantic.ValidationError: a check belongs to a level that was not asked for.
        """
        checks = list(checks)
        counts = _count(levels, checks)
        return cls(
            verdict=verdict_of(counts),
            trainer=trainer,
            generator=generator,
            transport=transport,
            levels=counts,
            checks=checks,
            wire=wire or Wire(),
            environment=environment,
        )

    def in_state(self, state: State) -> list[Check]:
        """The checks that ended so, level by level."""
        return sorted((check for check in self.checks if check.state == state), key=lambda check: LEVELS.index(check.level))

    def to_json(self) -> str:
        """What result.json holds."""
        data = self.model_dump(mode="json", by_alias=True)
        for check in data["checks"]:
            for key in _OPTIONAL:
                if check[key] is None:
                    del check[key]
        return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @model_validator(mode="after")
    def _follows_from_its_checks(self) -> Result:
        if strays := sorted({check.level for check in self.checks} - set(self.levels)):
            raise ValueError(f"checks of levels that were not asked for: {', '.join(strays)}")
        if self.levels != _count(self.levels, self.checks):
            raise ValueError("the counts of the levels are not those of the checks")
        if self.verdict != verdict_of(self.levels):
            raise ValueError(f"the verdict is {self.verdict}, and the levels say {verdict_of(self.levels)}")
        return self


def verdict_of(levels: Mapping[Level, LevelCounts]) -> Verdict:
    """What the counts of the levels that were asked for amount to.

    A failure stands whatever else broke or did not run. A broken check hides whether there was a failure, so it comes before
    what is merely missing. And where nothing passed nothing was shown: such a level is incomplete, unless the backend claims
    nothing of it and passed elsewhere.
    """
    counts = levels.values()
    if any(level.fail for level in counts):
        return "not-conformant"
    if any(level.error for level in counts):
        return "error"
    if any(level.not_run for level in counts):
        return "incomplete"
    shown = any(level.passed for level in counts) and all(level.passed or level.skip for level in counts)
    return "conformant" if shown else "incomplete"


def exit_code(verdict: Verdict) -> int:
    """What the process ends with."""
    return _EXIT_CODES[verdict]


def json_schema() -> dict[str, Any]:
    """The JSON Schema of result.json."""
    schema = Result.model_json_schema(by_alias=True)
    schema["required"] = ["schema", *schema["required"]]
    counts = schema["$defs"]["LevelCounts"]
    counts["required"] = list(counts["properties"])
    wire = schema["$defs"]["Wire"]
    wire["required"] = list(wire["properties"])
    for key in _OPTIONAL:  # left out where there is none, never null
        schema["$defs"]["Check"]["properties"][key] = {
            "type": "string",
            "description": Check.model_fields[key].description,
        }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "rlbridge conformance result"}


def _count(levels: Iterable[Level], checks: Iterable[Check]) -> dict[Level, LevelCounts]:
    states = Counter((check.level, check.state) for check in checks)
    return {
        level: LevelCounts.model_validate({state: states[level, state] for state in STATES})
        for level in sorted(levels, key=LEVELS.index)
    }


def _in_order(levels: dict[Level, LevelCounts]) -> dict[Level, LevelCounts]:
    return {level: levels[level] for level in LEVELS if level in levels}
