"""Systems to compare, by name: the collaboration, each author alone, other policies, other models."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from collm.collaboration import CoLLM
from collm.core.combinations import ProxyTuningPolicy
from collm.core.head import DeferralHead
from collm.core.named import POLICIES, policy_named
from collm.core.policies import Policy, RandomPolicy, SingleAuthorPolicy, ThresholdPolicy
from collm.core.types import BASE, author_name
from collm.errors import ConfigError
from collm.models.llama import LlamaModel
from collm.models.loading import ModelSpec, load_tokenizer
from collm.models.members import Model, load_author
from collm.text.guards import TokenizerIdentity, check_tokenizers
from collm.tools.spec import ToolSpec

COLLABORATION = "collaboration"
_BASE_ALONE = SingleAuthorPolicy(BASE)
_WITH_VALUE = ("sft", "proxy", "threshold")
KNOWN = (
    "base, assistant (assistant-2, ..), threshold=0.4, random (at the collaboration's own rate), sft=PATH (a model "
    "alone), proxy=PATH (the assistant steered by the base, and by the base before tuning, which lies in PATH), or "
    f"a policy ({', '.join(POLICIES)})"
)


@dataclass(frozen=True)
class System:
    """A way to answer prompts.

    Attributes:
        load: loads the models, unless they are those of the collaboration.
        policy: chooses the authors; None for a random policy whose rate is not known yet.
        writes_as: for an assistant alone, its author number in the collaboration.
        called: names of its models, if they differ from those that `load` gives.
    """

    name: str
    load: Callable[[], CoLLM]
    policy: Policy | None
    writes_as: int = BASE
    called: Mapping[str, str] = field(default_factory=dict)

    def at_rate(self, rate: float) -> Policy:
        """The policy. A random policy without a rate gets this rate."""
        return RandomPolicy(rate) if self.policy is None else self.policy


def names_in(text: str) -> list[str]:
    """Split comma-separated names. The options of a policy can also contain commas."""
    names: list[str] = []
    for part in filter(None, text.split(",")):
        kind, equals, _ = part.partition("=")
        rule, colon, _ = names[-1].partition(":") if names else ("", "", "")
        is_option = (equals and ":" not in kind and kind not in _WITH_VALUE) or re.fullmatch(r"[-+.\de]*\d|inf", part)
        if colon and rule in POLICIES and is_option:
            names[-1] += f",{part}"
        else:
            names.append(part)
    return names


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Each name with only the last part of its path, if that is unique."""
    short = {name: re.sub("^(sft|proxy)=.*?([^/]*)/*$", r"\1=\2", name) for name in names}
    times = Counter(short.values())
    return {name: one if times[one] == 1 else name for name, one in short.items()}


def systems_named(model: CoLLM, names: Sequence[str], operating: ThresholdPolicy) -> list[System]:
    """The collaboration at its operating point, then the named systems without duplicates."""
    wanted = dict.fromkeys(name for name in names if name != COLLABORATION)
    return [System(COLLABORATION, lambda: model, operating), *(_system(model, name) for name in wanted)]


def thresholds_named(model: CoLLM, names: Sequence[str], operating: float) -> list[str]:
    """Names for the thresholds of the calibration. A ConfigError if there is none.

    The operating threshold is left out, and those at which one model of `names` writes everything.
    """
    if model.calibration is None:
        raise ConfigError("the collaboration is not calibrated, so there is no curve; run 'collm calibrate' first")
    lowest = 0.0 if "assistant" in names and len(model.assistants) == 1 else -1.0
    highest = 1.0 if "base" in names else 2.0
    inner = [point.threshold for point in model.calibration.points if lowest <= point.threshold < highest]
    return [f"threshold={threshold!r}" for threshold in inner if threshold != operating]


def _system(model: CoLLM, name: str) -> System:
    kind, _, value = name.partition("=")
    if kind == "sft" and value:
        _check_tokenizer(model, value)
        return System(name, lambda: _alone(model, ModelSpec(value)), _BASE_ALONE, called={"base": "sft"})
    if kind == "proxy" and value:
        return _proxy(model, name, value)
    if name.partition("-")[0] == "assistant":
        if name not in model.author_names:
            raise ConfigError(f"cannot compare {name!r}: the authors are {', '.join(model.author_names)}")
        author = model.author_names.index(name)
        if isinstance(model.assistants[author - 1], ToolSpec) or model.servers is not None:
            return System(name, lambda: model, SingleAuthorPolicy(author))  # the base writes where a tool abstains
        return System(name, lambda: _alone(model, _module(model, author), author), _BASE_ALONE, author, {"base": name})
    if name in ("base", "random"):
        return System(name, lambda: model, _BASE_ALONE if name == "base" else None)
    rule = f"threshold:{name}" if kind == "threshold" and value else name
    if rule.partition(":")[0] in POLICIES:
        return System(name, lambda: model, policy_named(rule))
    raise ConfigError(f"cannot compare {name!r}; expected one of {KNOWN}")


def _alone(model: CoLLM, member: nn.Module | LlamaModel | ModelSpec, author: int = BASE) -> CoLLM:
    """A model with an author's tokenizer and template, as a base that never defers."""
    alone = load_author(member, name="alone")
    head, module = DeferralHead(alone.hidden_size), alone.module
    template = model.template if model.alignment is None else model.alignment.tokenizers[author].template
    return CoLLM(module, [module], head, model.author_tokenizers[author], template=template)


def _proxy(model: CoLLM, name: str, path: str) -> System:
    if model.alignment is not None:
        raise ConfigError("proxy compares the tokens of several models, and these have different tokenizers")
    if isinstance(model.assistants[0], ToolSpec):
        raise ConfigError(f"proxy steers {author_name(1)}, which is a tool; expected a language model")
    model.check_in_memory()
    _check_tokenizer(model, path)

    def load() -> CoLLM:
        assistants, head = (_module(model, 1), ModelSpec(path)), DeferralHead(model.head.hidden_size, 2)
        options: dict[str, Any] = {"template": model.template, "accept_differences": model.accept_differences}
        return CoLLM(_module(model, BASE), assistants, head, model.tokenizer, **options)

    return System(name, load, ProxyTuningPolicy(model=1, tuned=0, untuned=2), called={author_name(2): "untuned"})


def _module(model: CoLLM, author: int) -> nn.Module | LlamaModel:
    """A model in memory, to be a member of another collaboration."""
    return cast(Model, model.members[author]).module


def _check_tokenizer(model: CoLLM, path: str) -> None:
    tokenizer = TokenizerIdentity.of(load_tokenizer(ModelSpec(path)))
    check_tokenizers(model.identity, tokenizer, path, accept=model.accept_differences)
