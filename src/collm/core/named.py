"""Policies and objects written as text: "name:option=value,option=value", and "package.module:object"."""

from __future__ import annotations

import importlib
from dataclasses import MISSING, fields
from typing import Any, cast

from collm.core import combinations, policies
from collm.core.policies import Policy
from collm.errors import ConfigError

POLICIES: dict[str, type[Policy]] = {
    kind.name: kind
    for kind in (*vars(policies).values(), *vars(combinations).values())
    if isinstance(kind, type) and issubclass(kind, Policy) and kind.name
}
"""Policies by name. `OraclePolicy` has none because it needs the reference completion."""


def name_of(policy: Policy) -> str | None:
    """The text that `policy_named` parses into this policy, or None if its class has no name."""
    if POLICIES.get(policy.name) is not type(policy):
        return None
    options = ",".join(f"{one.name}={getattr(policy, one.name)!r}" for one in fields(cast(Any, policy)))
    return f"{policy.name}:{options}" if options else policy.name


def policy_named(text: str) -> Policy:
    """Parse a policy, for example "mixture" or "contrastive:alpha=0.1,beta=0.5".

    Raises:
        ConfigError: the name or an option is unknown, an option is missing, or a value is invalid.
    """
    name, _, assignments = text.partition(":")
    if name not in POLICIES:
        raise ConfigError(f"policy is {text!r}, expected one of {', '.join(POLICIES)}")
    kind: Any = POLICIES[name]
    types = {one.name: int if one.type == "int" else float for one in fields(kind)}
    options: dict[str, float] = {}
    for assignment in filter(None, assignments.split(",")):
        option, equals, value = assignment.partition("=")
        if not equals or option not in types or option in options:
            known = ", ".join(f"{each}=.." for each in types) or "none"
            raise ConfigError(f"policy {name!r} got {assignment!r}, expected each of these at most once: {known}")
        try:
            options[option] = types[option](value)
        except ValueError as error:
            number = "whole number" if types[option] is int else "number"
            raise ConfigError(f"{option} of policy {name!r} is {value!r}, expected a {number}") from error
    missing = [one.name for one in fields(kind) if one.default is MISSING and one.name not in options]
    if missing:
        example = ",".join(f"{option}=.." for option in (*options, *missing))
        raise ConfigError(f"policy {name!r} requires {' and '.join(missing)}; write {name}:{example}")
    return cast(Policy, kind(**options))


def imported(name: str, what: str) -> Any:
    """The object of a module that a user names as "package.module:object". `what` is its use, for errors.

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
