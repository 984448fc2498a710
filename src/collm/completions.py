"""The arguments of `CoLLM.generate`, and running prompts through a decoding loop: to their ends, or token by token."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import cast

from collm.core.calibration import Calibration
from collm.core.params import SamplingParams
from collm.core.policies import Policy
from collm.core.types import Completion, ModelUsage, TokenStep, deferral_rate
from collm.engine.engine import DecodingLoop, RequestOutput
from collm.engine.request import Request
from collm.errors import ConfigError
from collm.text.template import Prompt

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


def policy_for_each(
    policies: Sequence[Policy], count: int, threshold: float | None, budget: float | None
) -> Sequence[Policy]:
    """Policies of all prompts, if there is one for each.

    Raises:
        ConfigError: the number of policies is not the number of prompts, or there is a threshold or a budget.
    """
    if threshold is not None or budget is not None:
        raise ConfigError("threshold and budget have no effect beside policies for each prompt; leave them out")
    if len(policies) != count:
        raise ConfigError(f"got {len(policies)} policies for {count} prompts; give one for each, or one for all")
    return policies


def choose_threshold(calibration: Calibration | None, threshold: float | None, budget: float | None) -> float:
    """The given threshold, or the calibrated one for a budget, or the default.

    Raises:
        ConfigError: both options are given, or the collaboration is not calibrated.
    """
    if threshold is not None and budget is not None:
        raise ConfigError("threshold and budget are both given; a budget selects a threshold, so give one of them")
    if threshold is not None:
        return threshold
    if calibration is None:
        needed = "a budget needs a calibration" if budget is not None else "there is no default threshold"
        raise ConfigError(f"{needed}: the collaboration is not calibrated; run 'collm calibrate' or pass a threshold")
    return calibration.best(1.0 if budget is None else budget).threshold


def check_lookahead(lookahead: int | None, policies: Sequence[Policy], num_assistants: int) -> None:
    """Raise a ConfigError if drafts are asked for, but a policy rules them out."""
    asking = next((policy for policy in policies if policy.consults(num_assistants)), None)
    if lookahead and asking is not None:
        raise ConfigError(
            f"lookahead={lookahead} has no effect with {asking}, which asks other authors before every token; "
            "leave it out"
        )
