"""Policies written as text in a command line or a request: "name" or "name:option=value,option=value"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, cast

from collm.core.combinations import ContrastivePolicy, MixturePolicy, ProductPolicy, ProxyTuningPolicy
from collm.core.policies import (
    BudgetPolicy,
    ConfidencePolicy,
    JointPolicy,
    Policy,
    RandomPolicy,
    ScheduledPolicy,
    SingleAuthorPolicy,
    ThresholdPolicy,
)
from collm.errors import ConfigError

POLICIES: dict[str, type[Policy]] = {
    "threshold": ThresholdPolicy,
    "schedule": ScheduledPolicy,
    "budget": BudgetPolicy,
    "joint": JointPolicy,
    "single": SingleAuthorPolicy,
    "random": RandomPolicy,
    "confidence": ConfidencePolicy,
    "mixture": MixturePolicy,
    "product": ProductPolicy,
    "contrastive": ContrastivePolicy,
    "proxy": ProxyTuningPolicy,
}
"""Policies by name. `OraclePolicy` is missing because it needs the reference completion."""


def name_of(policy: Policy) -> str | None:
    """The text that `policy_named` parses into this policy, or None if its class has no name."""
    name = next((name for name, kind in POLICIES.items() if type(policy) is kind), None)
    if name is None:
        return None
    options = ",".join(f"{f.name}={getattr(policy, f.name)!r}" for f in fields(cast(Any, policy)))
    return f"{name}:{options}" if options else name


_NUMBERS: dict[str, Callable[[str], Any]] = {"int": int, "float": float}


def policy_named(text: str) -> Policy:
    """Parse a policy, for example "mixture" or "contrastive:alpha=0.1,beta=0.5".

    Raises:
        ConfigError: the name or an option is unknown, an option is missing, or a value is not a valid number.
    """
    name, _, assignments = text.partition(":")
    if name not in POLICIES:
        raise ConfigError(f"policy is {text!r}, expected one of {', '.join(POLICIES)}")
    kind: Any = POLICIES[name]
    types: dict[str, Callable[[str], Any]] = {f.name: _NUMBERS[str(f.type)] for f in fields(kind)}
    options: dict[str, Any] = {}
    for assignment in filter(None, assignments.split(",")):
        option, equals, value = assignment.partition("=")
        if not equals or option not in types or option in options:
            known = ", ".join(f"{each}=.." for each in types) or "none"
            raise ConfigError(f"policy {name!r} got {assignment!r}, expected each of these at most once: {known}")
        try:
            options[option] = types[option](value)
        except ValueError as error:
            kind_of = "whole number" if types[option] is int else "number"
            raise ConfigError(f"{option} of policy {name!r} is {value!r}, expected a {kind_of}") from error
    missing = [f.name for f in fields(kind) if f.default is MISSING and f.name not in options]
    if missing:
        example = ",".join(f"{option}=.." for option in (*options, *missing))
        raise ConfigError(f"policy {name!r} requires {' and '.join(missing)}; write {name}:{example}")
    policy: Policy = kind(**options)
    return policy
