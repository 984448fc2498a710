"""Policies and objects written as text: "name:option=value,option=value", and "package.module:object"."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, cast

from collm.core import combinations, policies
from collm.core.judges import JUDGES, JudgedPolicy
from collm.core.policies import Policy, PricePolicy, ThresholdRule
from collm.errors import ConfigError

POLICIES: dict[str, type[Policy]] = {
    kind.name: kind
    for kind in (*vars(policies).values(), *vars(combinations).values())
    if isinstance(kind, type) and issubclass(kind, Policy) and kind.name
}
"""Policies by name. `OraclePolicy` has none because it needs the reference completion."""


def name_of(policy: Policy) -> str | None:
    """The text that `policy_named` parses into this policy, or None if its class has no name."""
    if isinstance(policy, JudgedPolicy):
        options = {"every": policy.every, **vars(policy.judge)}
        return f"{name_of(policy.rule)},judge={policy.judge.name}:{_assignments(options)}"
    if POLICIES.get(policy.name) is not type(policy):
        return None
    if isinstance(policy, PricePolicy):
        return f"{policy.name}:{','.join(map(repr, policy.prices))}"
    options = {one.name: getattr(policy, one.name) for one in fields(cast(Any, policy))}
    return f"{policy.name}:{_assignments(options)}" if options else policy.name


def _assignments(options: Mapping[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in options.items())


def policy_named(text: str) -> Policy:
    """Parse a policy: "mixture", "contrastive:alpha=0.1", "price:0.7,1.2", "threshold:threshold=0.5,judge=exact".

    Raises:
        ConfigError: the name or an option is unknown, an option is missing, or a value is invalid.
    """
    text, _, judge = text.partition(",judge=")
    name, _, assignments = text.partition(":")
    if name not in POLICIES:
        raise ConfigError(f"policy is {text!r}, expected one of {', '.join(POLICIES)}")
    if name == PricePolicy.name:
        try:
            policy: Policy = PricePolicy(tuple(map(float, assignments.split(","))))
        except ValueError as error:
            raise ConfigError(f"policy is {text!r}, expected nats per token of an assistant, as price:0.7") from error
    else:
        policy = POLICIES[name](**_options(f"policy {name!r}", fields(cast(Any, POLICIES[name])), assignments))
    return judged(policy, judge) if judge else policy


def judged(policy: Policy, text: str) -> JudgedPolicy:
    """A threshold rule with a judge: "exact", "blend:weight=0.3", "joint", "regret:nats=2,budget=10,every=8".

    Raises:
        ConfigError: the policy is no threshold rule, or as `policy_named`.
    """
    name, _, assignments = text.partition(":")
    if name not in JUDGES:
        raise ConfigError(f"judge is {text!r}, expected one of {', '.join(JUDGES)}, such as regret:nats=2")
    if not isinstance(policy, ThresholdRule):
        raise ConfigError(
            f"judge {name!r} needs a rule that compares the defer prob with a threshold, but the policy is "
            f"{name_of(policy) or policy}; leave one of them out"
        )
    every = next(one for one in fields(JudgedPolicy) if one.name == "every")
    options = _options(f"judge {name!r}", (*fields(JUDGES[name]), every), assignments)
    return JudgedPolicy(policy, every=options.pop("every", every.default), judge=JUDGES[name](**options))


_KINDS: dict[Any, tuple[Any, str]] = {"int": (int, "whole number"), "float": (float, "number"), "str": (str, "word")}


def _options(what: str, known: Sequence[Field[Any]], assignments: str) -> dict[str, Any]:
    """Parse "option=value,option=value" for these fields."""
    types, options = {one.name: _KINDS[one.type] for one in known}, dict[str, Any]()
    for assignment in filter(None, assignments.split(",")):
        option, equals, value = assignment.partition("=")
        if not equals or option not in types or option in options:
            expected = ", ".join(f"{each}=.." for each in types) or "none"
            raise ConfigError(f"{what} got {assignment!r}, expected each of these at most once: {expected}")
        kind, number = types[option]
        try:
            options[option] = kind(value)
        except ValueError as error:
            raise ConfigError(f"{option} of {what} is {value!r}, expected a {number}") from error
    missing = [one.name for one in known if one.default is MISSING and one.name not in options]
    if missing:
        example = ",".join(f"{option}=.." for option in (*options, *missing))
        name = what.split()[1].strip("'")
        raise ConfigError(f"{what} requires {' and '.join(missing)}; write {name}:{example}")
    return options


def imported(name: str, what: str) -> Any:
    """The object of a module that a user names as "package.module:object". `what` is its use, for errors.

    Raises:
        ConfigError: the module cannot be imported, or has no such name.
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
        raise ConfigError(f"{what} {name!r}: {module_name} has no such name; check it")
    return getattr(module, object_name)
