"""The arguments of `CoLLM.generate`, and running prompts through a decoding loop: to their ends, or token by token."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import cast

from collm.core.calibration import Calibration
from collm.core.head import DeferralHead, check_prices
from collm.core.judges import JUDGES, ExactJudge, JudgedPolicy
from collm.core.named import name_of
from collm.core.params import SamplingParams
from collm.core.policies import Policy, PricePolicy
from collm.core.types import Completion, ModelUsage, TokenStep, deferral_rate
from collm.engine.engine import DecodingLoop, RequestOutput
from collm.engine.request import Request, check_names_author
from collm.errors import ConfigError
from collm.text.alignment import Alignment
from collm.text.template import Prompt
from collm.tools.spec import ToolSpec

OnCompletion = Callable[[int, Completion], None]
"""Called with the index and the completion of each prompt that is done."""


class Completions(list[Completion]):
    """Completions of several prompts, and what each model did for them.

    Attributes:
        usage: model name -> forward passes, tokens read and written, of this call.
    """

    def __init__(self, completions: Sequence[Completion], usage: dict[str, ModelUsage]) -> None:
        super().__init__(completions)
        self.usage = usage

    @property
    def deferral_rate(self) -> float:
        """Share of all generated tokens that assistants wrote."""
        return deferral_rate([author for completion in self for author in completion.authors])


def complete(
    engine: DecodingLoop, requests: Iterable[Request], on_completion: OnCompletion | None = None
) -> list[Completion]:
    """Decode all requests and close the engine. The completions are in the order of the requests.

    Raises:
        CollmError: a request failed.
    """
    done: dict[int, Completion] = {}
    with closing(engine):
        for request in requests:
            engine.add(request)
        for output in _outputs(engine):
            if output.completion is not None:
                done[output.number] = output.completion
                if on_completion is not None:
                    on_completion(output.number, output.completion)
    return [done[number] for number in sorted(done)]


def steps(engine: DecodingLoop) -> Generator[TokenStep, None, None]:
    """Decode the engine's one request token by token. The engine is closed at the end of the generator.

    Raises:
        CollmError: the request failed.
    """
    with closing(engine):
        for output in _outputs(engine):
            assert output.step is not None
            yield output.step


def _outputs(engine: DecodingLoop) -> Iterator[RequestOutput]:
    while engine.has_work:
        for output in engine.step():
            if output.failure is not None:
                raise output.failure
            yield output


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts as it is; a single prompt (text, messages, token ids) as a list of one."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int | dict)):
        return [cast(Prompt, prompts)]
    return list(cast("Sequence[Prompt]", prompts))


def params_for_each(params: SamplingParams | Sequence[SamplingParams], count: int) -> list[SamplingParams]:
    """Sampling parameters for each prompt. If a single one has a seed, prompt i gets seed + i.

    Raises:
        ConfigError: the number of parameters is not the number of prompts.
    """
    if isinstance(params, SamplingParams):
        seed = params.seed
        return [params if seed is None else replace(params, seed=seed + index) for index in range(count)]
    if len(params) != count:
        raise ConfigError(
            f"got {len(params)} sampling parameters for {count} prompts; give one for each, or one for all"
        )
    return list(params)


def policy_for_each(policies: Sequence[Policy], count: int, choice: Mapping[str, object]) -> Sequence[Policy]:
    """Policies of all prompts, if there is one for each.

    Raises:
        ConfigError: the number of policies is not the number of prompts, or there are options that choose one.
    """
    if any(one is not None for one in choice.values()):
        raise ConfigError(f"{', '.join(choice)} have no effect beside policies for each prompt; leave them out")
    if len(policies) != count:
        raise ConfigError(f"got {len(policies)} policies for {count} prompts; give one for each, or one for all")
    return policies


def price_policy(price: float | Sequence[float]) -> PricePolicy:
    """The policy of one price, or of one for each assistant. A ConfigError if one is not a number."""
    return PricePolicy(tuple(price) if isinstance(price, Sequence) else (price,))


def choose_threshold(
    calibration: Calibration | None,
    head: DeferralHead,
    threshold: float | None,
    budget: float | None,
    price: float | Sequence[float] | None,
) -> float:
    """The given threshold, or that of a price, or the calibrated one for a budget, or the default.

    Raises:
        ConfigError: several options are given, several prices, a price for a head that predicts no gains, or the
            collaboration is not calibrated.
    """
    options = {"threshold": threshold, "budget": budget, "price": price}
    if len(given := [name for name, value in options.items() if value is not None]) > 1:
        raise ConfigError(f"{' and '.join(given)} are given, but each selects a threshold; give one of them")
    if threshold is not None:
        return threshold
    if price is not None:
        rule = price_policy(price)
        check_prices(head, rule.prices)
        if len(set(rule.prices)) > 1:
            raise ConfigError(f"several prices are no threshold; compare the policy {name_of(rule)} instead")
        return rule.threshold_at(0, 0, 0.0)
    if calibration is None:
        needed = "a budget needs a calibration" if budget is not None else "there is no default threshold"
        raise ConfigError(f"{needed}: the collaboration is not calibrated; run 'collm calibrate' or pass a threshold")
    return calibration.best(1.0 if budget is None else budget).threshold


def check_policy(policy: Policy, head: DeferralHead, assistants: Sequence[object], alignment: Alignment | None) -> None:
    """Raise a ConfigError if models cannot follow a policy."""
    rule = policy.rule if isinstance(policy, JudgedPolicy) else policy
    if isinstance(rule, PricePolicy):
        check_prices(head, rule.prices)
    if alignment is not None:
        check_names_author(policy, len(assistants))
    if isinstance(policy.judge, ExactJudge) and any(isinstance(one, ToolSpec) for one in assistants):
        others = ", ".join(name for name in JUDGES if name != ExactJudge.name)
        raise ConfigError(
            f"judge 'exact' writes as if the assistant wrote everything, which a tool cannot; use {others}"
        )
