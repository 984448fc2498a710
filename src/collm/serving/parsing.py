"""Parse request bodies into requests of the engine, with the tools of a chat. Contradictions are errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic_core import from_json

from collm.core.params import SamplingParams, StructuredOutputs
from collm.core.policies import Policy
from collm.engine.request import PromptIds, Request
from collm.errors import ConfigError, RequestError
from collm.serving.collaborations import Target
from collm.serving.errors import invalid, refused
from collm.serving.schemas import (
    Asked,
    ChatRequest,
    ChatTool,
    CompletionRequest,
    Message,
    NamedTool,
    ResponseFormat,
    StructuredForm,
    TokenizeRequest,
)
from collm.serving.settings import Settings
from collm.text.chats import Chat, as_message
from collm.text.template import Prompt
from collm.text.tool_calls import ToolCallReader
from collm.text.tool_formats import ToolFormat, grammar, tool_format

DEFAULT_MAX_TOKENS = SamplingParams().max_new_tokens


@dataclass(frozen=True)
class ParsedRequest:
    """A parsed request body.

    Attributes:
        prompts: the prompts before encoding.
        param: the parameter with the prompts.
        params: sampling parameters of the first completion.
        policy: chooses the authors.
        n: number of completions of each prompt.
        logprobs: whether log-probabilities are returned.
        echo: whether the text begins with the prompt.
        generates: False for requests that only score the prompt.
        keep_last: number of tokens to keep at the end of a prompt, -1 for as many as fit, None for all.
        calls: the tools that can be called.
    """

    prompts: list[Prompt]
    param: str
    params: SamplingParams
    policy: Policy
    n: int = 1
    logprobs: bool = False
    echo: bool = False
    generates: bool = True
    keep_last: int | None = None
    calls: ToolChoice | None = None

    def requests(self, encode: Callable[[Prompt, str, int | None], PromptIds]) -> list[Request]:
        """One request for each completion, ordered by prompt."""
        encoded = [encode(prompt, self.param, self.keep_last) for prompt in self.prompts]
        prompts = [prompt for prompt in encoded for _ in range(self.n)]
        seeds = [None if self.params.seed is None else self.params.seed + i for i in range(len(prompts))]
        return [
            Request(prompt.base, replace(self.params, seed=seed), self.policy, prompt.assistants)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]

    @property
    def scored(self) -> int | None:
        """Number of most probable tokens at each position of the prompt; None if the prompt is not scored."""
        echoed = self.params.logprobs if self.echo and self.logprobs else None
        return max((one for one in (self.params.prompt_logprobs, echoed) if one is not None), default=None)


def read_completion(body: CompletionRequest, target: Target, settings: Settings) -> ParsedRequest:
    """Parse the body of /v1/completions.

    Raises:
        APIError: an invalid parameter.
    """
    n = body.n or 1
    if body.best_of is not None and body.best_of != n:
        raise invalid(f"best_of is {body.best_of}, expected {n}, as n: completions are not compared", "best_of")
    if body.max_tokens == 0 and not body.echo and body.prompt_logprobs is None:
        raise invalid("max_tokens is 0 without echo or prompt_logprobs, so there is no output; raise it", "max_tokens")
    several = isinstance(body.prompt, list) and not isinstance(body.prompt[0], int)
    prompts: list[Prompt] = body.prompt if several else [body.prompt]  # type: ignore[assignment, list-item]
    policy = target.policy(body.collm)
    form = _form(body.response_format, body.structured_outputs)
    params = _params(body, policy, settings, body.max_tokens or None, body.logprobs or 0, form)
    reading = ParsedRequest(prompts, "prompt", params, policy, n, body.logprobs is not None)
    reading = replace(
        reading, echo=bool(body.echo), generates=body.max_tokens != 0, keep_last=body.truncate_prompt_tokens
    )
    return _checked(reading, settings)


def read_chat(body: ChatRequest, target: Target, settings: Settings) -> ParsedRequest:
    """Parse the body of /v1/chat/completions.

    Raises:
        APIError: an invalid parameter.
    """
    if body.top_logprobs and not body.logprobs:
        raise invalid(f"top_logprobs is {body.top_logprobs} without logprobs; set logprobs", "top_logprobs")
    calls = tool_choice(body.tools, body.tool_choice, body.parallel_tool_calls, target)
    form = _form(body.response_format, body.structured_outputs)
    chat = as_chat(body, calls)
    if calls is not None and calls.constraint is not None:
        form = calls.constraint
    elif form is not None:
        calls = None  # the text has a form, which is not that of calls
    policy = target.policy(body.collm)
    most = body.max_completion_tokens or body.max_tokens
    params = _params(body, policy, settings, most, body.top_logprobs or 0, form)
    reading = ParsedRequest([chat], "messages", params, policy, body.n or 1, bool(body.logprobs))
    return _checked(replace(reading, keep_last=body.truncate_prompt_tokens, calls=calls), settings)


def as_chat(body: ChatRequest | TokenizeRequest, calls: ToolChoice | None) -> Chat:
    """The messages of a body, with tools and template options.

    Raises:
        APIError: an invalid parameter.
    """
    continues = bool(body.continue_final_message)
    opens = not continues if body.add_generation_prompt is None else body.add_generation_prompt
    with refused():
        return Chat(
            read_messages(body.messages or []),
            calls.shown if calls else None,
            add_generation_prompt=opens,
            continue_final_message=continues,
            template_kwargs=body.chat_template_kwargs,
        )


def read_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages in the form of chat templates.

    Raises:
        APIError: an invalid message.
    """
    found = []
    for place, message in enumerate(messages):
        try:
            found.append(as_message(_with_whole_arguments(message.model_dump(exclude_none=True))))
        except RequestError as error:
            raise invalid(f"messages[{place}]{error}", f"messages[{place}]") from error
    return found


def _with_whole_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """Complete arguments of calls that `max_tokens` cut, because clients send a message back as it came."""
    for call in message.get("tool_calls") or ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            with suppress(ValueError):
                read = from_json(function["arguments"] or "{}", allow_partial="trailing-strings")
                function["arguments"] = read if isinstance(read, dict) else function["arguments"]
    return message


def _form(asked: ResponseFormat | None, structured: StructuredForm | None) -> StructuredOutputs | None:
    """The structured output of a body."""
    wanted = asked is not None and asked.type != "text"
    if structured is not None:
        if wanted:
            raise invalid(
                "response_format and structured_outputs are both given; give one of them", "structured_outputs"
            )
        try:
            return StructuredOutputs(
                structured.json_, bool(structured.json_object), structured.regex, structured.choice, structured.grammar
            )
        except ConfigError as error:
            raise invalid(f"structured_outputs: {error}", "structured_outputs") from error
    if not wanted or asked is None:
        return None
    if asked.type == "json_object":
        return StructuredOutputs(json_object=True) if asked.schema_ is None else StructuredOutputs(json=asked.schema_)
    if asked.json_schema is None or asked.json_schema.schema_ is None:
        raise invalid("response_format is json_schema without a schema; add json_schema.schema", "response_format")
    return StructuredOutputs(json=asked.json_schema.schema_)


def _params(
    body: Asked,
    policy: Policy,
    settings: Settings,
    max_tokens: int | None,
    logprobs: int,
    form: StructuredOutputs | None,
) -> SamplingParams:
    if max_tokens is not None and max_tokens > settings.max_tokens:
        raise invalid(f"max_tokens is {max_tokens}, this server writes at most {settings.max_tokens}", "max_tokens")
    most = max_tokens or max(min(DEFAULT_MAX_TOKENS, settings.max_tokens), body.min_tokens or 0)
    options: dict[str, Any] = {
        "max_new_tokens": min(most, settings.max_tokens),
        "seed": body.seed,
        "stop": body.stop or (),
        "min_tokens": body.min_tokens or 0,
        "stop_token_ids": body.stop_token_ids or (),
        "ignore_eos": bool(body.ignore_eos),
        "include_stop_str_in_output": bool(body.include_stop_str_in_output),
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "repetition_penalty": body.repetition_penalty or 1.0,
        "logit_bias": {int(token_id): bias for token_id, bias in (body.logit_bias or {}).items()},
        "allowed_token_ids": body.allowed_token_ids,
        "bad_words": body.bad_words or (),
        "structured_outputs": form,
        "logprobs": logprobs,
        "prompt_logprobs": body.prompt_logprobs,
    }
    with refused():
        params = SamplingParams(**options, **_drawing(body))
    draws = params.temperature > 0 or policy.draws
    return params if draws else replace(params, seed=None)  # which would draw nothing


def _drawing(body: Asked) -> dict[str, Any]:
    """Temperature and truncation. By default, n > 1 and truncation mean sampling."""
    top_k = max(body.top_k or 0, 0)
    top_p = 1.0 if body.top_p is None else body.top_p
    if body.temperature == 0 or top_p == 0:
        return {"temperature": 0.0}
    temperature = body.temperature
    if temperature is None and (body.n or 1) > 1:
        temperature = 1.0
    return {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": body.min_p or 0.0}


def _checked(reading: ParsedRequest, settings: Settings) -> ParsedRequest:
    most = min(settings.max_choices, settings.max_batch + settings.max_waiting)
    count = len(reading.prompts) * reading.n
    if count > most:
        param = "n" if reading.n > 1 else reading.param
        raise invalid(f"the request asks for {count} completions, this server gives {most} to one request", param)
    return reading


@dataclass(frozen=True)
class ToolChoice:
    """Tools of a chat.

    Attributes:
        shown: their definitions for the chat template.
        written: the template's format of calls.
        parallel: whether several calls are allowed.
        constraint: the grammar of a required call; None if the answer can be text.
        markers: token id -> text of the special tokens around calls.
    """

    shown: list[dict[str, Any]]
    written: ToolFormat
    parallel: bool
    constraint: StructuredOutputs | None
    markers: dict[int, str]

    def reader(self) -> ToolCallReader:
        """A parser that separates calls from text."""
        return ToolCallReader(self.written, {tool["function"]["name"] for tool in self.shown})


def tool_choice(
    tools: Sequence[ChatTool] | None,
    choice: Literal["none", "auto", "required"] | NamedTool | None,
    parallel: bool | None,
    target: Target,
) -> ToolChoice | None:
    """The tools of a request; None if none can be called.

    Raises:
        APIError: a choice without tools, an unknown name, or a template without tools.
    """
    if not tools:
        if choice in (None, "none", "auto"):
            return None
        raise invalid("tool_choice requires a call, but there are no tools; add tools", "tool_choice")
    if choice == "none":
        return None
    model = target.served.model
    written = tool_format(model.template.chat_for(tools) or "")
    if written is None:
        raise invalid(
            f"the chat template of {target.served.name} has no known format of tools; leave tools out",
            "tools",
        )
    shown = [tool.model_dump(exclude_none=True) for tool in tools]
    names = [tool.function.name for tool in tools]
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise invalid(
            f"tool_choice names {choice.function.name[:80]!r}, expected one of {', '.join(names)}", "tool_choice"
        )
    special = {
        str(token): token_id for token_id, token in model.tokenizer.added_tokens_decoder.items() if token.special
    }
    constraint = None
    if choice == "required" or isinstance(choice, NamedTool):
        callable_tools = [
            one for one in shown if choice == "required" or one["function"]["name"] == choice.function.name
        ]
        several = parallel is not False and choice == "required"
        constraint = StructuredOutputs(grammar=grammar(written, callable_tools, parallel=several, special=special))
    markers = {token_id: text for text, token_id in special.items() if text in written.markers}
    return ToolChoice(shown, written, parallel is not False, constraint, markers)
