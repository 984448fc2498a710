"""From request bodies to what the engine runs; what contradicts itself or would have no effect is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from collm.core.params import SamplingParams
from collm.core.policies import Policy
from collm.decoding.request import Request
from collm.models.template import Prompt
from collm.serving.collaborations import Target
from collm.serving.refusals import invalid
from collm.serving.schemas import Asked, ChatRequest, CompletionRequest, Message
from collm.serving.settings import Settings

DEFAULT_MAX_TOKENS = SamplingParams().max_new_tokens


@dataclass(frozen=True)
class Reading:
    """A request body, read.

    Attributes:
        prompts: as they came.
        param: where they stood in the body.
        params: of the first completion.
        policy: who writes.
        n: completions of each prompt.
        logprobs: whether they are wanted.
    """

    prompts: list[Prompt]
    param: str
    params: SamplingParams
    policy: Policy
    n: int
    logprobs: bool

    def requests(self, encode: Callable[[Prompt], list[int]]) -> list[Request]:
        """One for each completion: those of the first prompt, of the second, .."""
        encoded = [encode(prompt) for prompt in self.prompts]
        prompts = [token_ids for token_ids in encoded for _ in range(self.n)]
        seeds = [None if self.params.seed is None else self.params.seed + i for i in range(len(prompts))]
        return [
            Request(token_ids, replace(self.params, seed=seed), self.policy)
            for token_ids, seed in zip(prompts, seeds, strict=True)
        ]

    def echoed(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """For each completion, its prompt as text."""
        texts = [
            prompt if isinstance(prompt, str) else str(tokenizer.decode(list(prompt), skip_special_tokens=True))
            for prompt in self.prompts
        ]
        return [text for text in texts for _ in range(self.n)]


def read_completion(body: CompletionRequest, target: Target, settings: Settings) -> Reading:
    """What /v1/completions is asked.

    Raises:
        Refusal: naming the parameter.
    """
    n = body.n or 1
    if body.best_of is not None and body.best_of != n:
        raise invalid(f"best_of is {body.best_of}, expected the value of n, {n}; leave it out", "best_of")
    if body.echo and body.logprobs is not None:
        raise invalid("log-probabilities of prompts are not to be had; leave echo or logprobs out", "logprobs")
    several = isinstance(body.prompt, list) and not isinstance(body.prompt[0], int)
    prompts: list[Prompt] = body.prompt if several else [body.prompt]  # type: ignore[assignment, list-item]
    policy = target.policy(body.collm)
    params = _params(body, body.max_tokens, body.logprobs or 0, policy, settings)
    return _checked(Reading(prompts, "prompt", params, policy, n, body.logprobs is not None), settings)


def read_chat(body: ChatRequest, target: Target, settings: Settings) -> Reading:
    """What /v1/chat/completions is asked.

    Raises:
        Refusal: naming the parameter.
    """
    limits = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise invalid(
            f"max_tokens is {body.max_tokens} and max_completion_tokens {body.max_completion_tokens}; give one of them",
            "max_completion_tokens",
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid(
            f"top_logprobs is {body.top_logprobs} without logprobs; set logprobs or leave it out", "top_logprobs"
        )
    policy = target.policy(body.collm)
    params = _params(body, next(iter(limits), None), body.top_logprobs or 0, policy, settings)
    chat = as_chat(body.messages)
    return _checked(Reading([chat], "messages", params, policy, body.n or 1, bool(body.logprobs)), settings)


def as_chat(messages: Sequence[Message]) -> Prompt:
    return [{"role": message.role, "content": message.text} for message in messages]


def _params(
    body: Asked, max_tokens: int | None, top_logprobs: int, policy: Policy, settings: Settings
) -> SamplingParams:
    temperature = body.temperature or 0.0
    if max_tokens is not None and max_tokens > settings.max_tokens:
        raise invalid(f"max_tokens is {max_tokens}, this server writes at most {settings.max_tokens}", "max_tokens")
    if body.top_p not in (None, 1) and not temperature:
        raise invalid(f"top_p={body.top_p} has no effect at temperature 0; set a temperature or leave it out", "top_p")
    if body.seed is not None and not temperature and not policy.draws:
        raise invalid(f"seed={body.seed} has no effect: at temperature 0 nothing is drawn; leave it out", "seed")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options has no effect without stream; leave it out", "stream_options")
    return SamplingParams(
        max_new_tokens=max_tokens or min(DEFAULT_MAX_TOKENS, settings.max_tokens),
        temperature=temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed,
        stop=body.stop or (),
        logprobs=top_logprobs,
    )


def _checked(reading: Reading, settings: Settings) -> Reading:
    most = min(settings.max_choices, settings.max_batch + settings.max_waiting)
    count = len(reading.prompts) * reading.n
    if count > most:
        param = "n" if reading.n > 1 else reading.param
        raise invalid(f"the request asks for {count} completions, this server gives {most} to one request", param)
    return reading
