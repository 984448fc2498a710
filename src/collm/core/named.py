"""Policies and objects written as text: "name:option=value,option=value", and "package.module:object"."""

from __future__ import annotations

import importlib
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


def imported(name: str, what: str) -> Any:
    """The object of a module that a user names as "package.module:object".

    Args:
        what: what the object is used as, for errors.

    Raises:
        ConfigError: the module cannot be imported, or has nothing of that name.
    """
    module_name, _, object_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may fail in any way while it is imported
        raise ConfigError(
            f"{what} {name!r} cannot be imported ({type(error).__name__}: {error}); "
            f"check the name, or add the folder that holds {module_name!r} to PYTHONPATH"
        ) from error
    if not hasattr(module, object_name):
        raise ConfigError(f"{what} {name!r}: {module_name} has nothing of that name; check it")
    return getattr(module, object_name)
