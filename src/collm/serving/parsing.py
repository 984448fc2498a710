"""Parse request bodies into prompts, parameters, policies and tools. Contradictions are errors."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from pydantic_core import from_json

from collm.core.params import SamplingParams, StructuredOutputs
from collm.core.policies import Policy
from collm.errors import ConfigError, RequestError
from collm.serving.errors import invalid, refused
from collm.serving.schemas import ChatMessage, ChatRequest, ChatTool, CompletionRequest, TextRequest, TokenizeRequest
from collm.serving.service import Target
from collm.text.chats import Chat, as_message
from collm.text.template import Prompt
from collm.text.tool_formats import ToolFormat, grammar, tool_format

DEFAULT_MAX_TOKENS = SamplingParams().max_tokens


@dataclass(frozen=True)
class ParsedRequest:
    """A parsed request body.

    Attributes:
        prompts: the prompts before encoding.
        param: the parameter with the prompts.
        params: sampling parameters of the first completion.
        echo: whether the text begins with the prompt.
        generates: False for requests that only score the prompt.
    """

    body: TextRequest
    prompts: list[Prompt]
    param: str
    params: SamplingParams
    policy: Policy
    logprobs: bool
    calls: ToolChoice | None = None
    echo: bool = False
    generates: bool = True

    @property
    def n(self) -> int:
        return self.body.n or 1

    @property
    def scored(self) -> int | None:
        """Number of most probable tokens at each position of the prompt; None if the prompt is not scored."""
        echoed = self.params.logprobs if self.echo and self.logprobs else None
        return max((one for one in (self.params.prompt_logprobs, echoed) if one is not None), default=None)

    @property
    def form_param(self) -> str:
        """The parameter with the structured output."""
        if self.calls is not None and self.calls.constraint is not None:
            return "tools"
        return "response_format" if self.body.structured_outputs is None else "structured_outputs"


def read_completion(body: CompletionRequest, target: Target) -> ParsedRequest:
    n = body.n or 1
    if body.best_of is not None and body.best_of != n:
        raise invalid(f"best_of is {body.best_of}, expected {n}, as n: completions are not compared", "best_of")
    if body.max_tokens == 0 and not body.echo and body.prompt_logprobs is None:
        raise invalid("max_tokens is 0 without echo or prompt_logprobs, so there is no output; raise it", "max_tokens")
    several = isinstance(body.prompt, list) and not isinstance(body.prompt[0], int)
    prompts: list[Prompt] = body.prompt if several else [body.prompt]  # type: ignore[assignment, list-item]
    parsed = _parsed(body, target, prompts, "prompt", body.max_tokens or None, body.logprobs, _form(body))
    return replace(parsed, echo=bool(body.echo), generates=body.max_tokens != 0)


def read_chat(body: ChatRequest, target: Target, param: str = "messages") -> ParsedRequest:
    """Parse the body of /v1/chat/completions. `param` is the parameter that the client sent the messages in."""
    if body.top_logprobs and not body.logprobs:
        raise invalid(f"top_logprobs is {body.top_logprobs} without logprobs; set logprobs", "top_logprobs")
    calls = tool_choice(body.tools, body.tool_choice, body.parallel_tool_calls, target)
    form = _form(body)
    chat = as_chat(body, calls)
    if calls is not None and calls.constraint is not None:
        form = calls.constraint
    elif form is not None:
        calls = None  # the text has a form, which is not that of calls
    most, logprobs = body.max_completion_tokens or body.max_tokens, body.top_logprobs or 0
    parsed = _parsed(body, target, [chat], param, most, logprobs if body.logprobs else None, form)
    return replace(parsed, calls=calls)


def as_chat(body: ChatRequest | TokenizeRequest, calls: ToolChoice | None) -> Chat:
    """The messages of a body, with tools and template options."""
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


def read_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages in the form of chat templates."""
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


def _form(body: TextRequest) -> StructuredOutputs | None:
    form = body.response_format if body.response_format and body.response_format.type != "text" else None
    if body.structured_outputs is not None:
        if form is not None:
            both = "response_format and structured_outputs are both given; give one of them"
            raise invalid(both, "structured_outputs")
        try:
            return StructuredOutputs(**body.structured_outputs.model_dump(by_alias=True, exclude_unset=True))
        except ConfigError as error:
            raise invalid(f"structured_outputs: {error}", "structured_outputs") from error
    if form is None:
        return None
    if form.type == "json_object":
        return StructuredOutputs(json_object=True) if form.schema_ is None else StructuredOutputs(json=form.schema_)
    schema = form.schema_ if form.json_schema is None else form.json_schema.get("schema")
    if not isinstance(schema, dict):
        raise invalid("response_format is json_schema without a schema; add json_schema.schema", "response_format")
    return StructuredOutputs(json=schema)


def _parsed(
    body: TextRequest,
    target: Target,
    prompts: list[Prompt],
    param: str,
    max_tokens: int | None,
    logprobs: int | None,
    form: StructuredOutputs | None,
) -> ParsedRequest:
    settings, count, policy = target.settings, len(prompts) * (body.n or 1), target.policy(body.collm)
    most = min(settings.max_choices, settings.max_batch + settings.max_waiting)
    if count > most:
        message = f"the request asks for {count} completions, this server gives {most} to one request"
        raise invalid(message, param if count == len(prompts) else "n")
    limit = settings.max_tokens
    if max_tokens is not None and max_tokens > limit:
        raise invalid(f"max_tokens is {max_tokens}, this server writes at most {limit}", "max_tokens")
    default = max(min(DEFAULT_MAX_TOKENS, limit), body.min_tokens or 0)
    given = {one.name: getattr(body, one.name, None) for one in fields(SamplingParams)}
    options = {name: value for name, value in given.items() if value is not None}
    options |= {
        "max_tokens": min(max_tokens or default, limit),
        "logit_bias": {int(token_id): bias for token_id, bias in (body.logit_bias or {}).items()},
        "structured_outputs": form,
        "logprobs": logprobs or 0,
        **_drawing(body),
    }
    with refused():
        params = SamplingParams(**options)
    if params.temperature == 0 and not policy.draws:
        params = replace(params, seed=None)  # which would draw nothing
    return ParsedRequest(body, prompts, param, params, policy, logprobs is not None)


def _drawing(body: TextRequest) -> dict[str, Any]:
    """Temperature and truncation. By default, n > 1 and truncation mean sampling."""
    if body.temperature == 0 or body.top_p == 0:
        return {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    several = body.temperature is None and (body.n or 1) > 1
    return {"temperature": 1.0 if several else body.temperature, "top_k": max(body.top_k or 0, 0)}


@dataclass(frozen=True)
class ToolChoice:
    """Tools of a chat.

    Attributes:
        shown: their definitions for the chat template.
        constraint: the grammar of a required call; None if the answer can be text.
        markers: token id -> text of the special tokens around calls.
    """

    shown: list[dict[str, Any]]
    written: ToolFormat
    parallel: bool
    constraint: StructuredOutputs | None
    markers: dict[int, str]


def tool_choice(
    tools: Sequence[ChatTool] | None,
    choice: Literal["none", "auto", "required"] | ChatTool | None,
    parallel: bool | None,
    target: Target,
) -> ToolChoice | None:
    """The tools of a request; None if none can be called."""
    if not tools:
        if choice in (None, "none", "auto"):
            return None
        raise invalid("tool_choice requires a call, but there are no tools; add tools", "tool_choice")
    if choice == "none":
        return None
    model = target.model
    written = tool_format(model.template.chat_for(tools) or "")
    if written is None:
        name = target.worker.name
        raise invalid(f"the chat template of {name} has no known format of tools; leave tools out", "tools")
    shown = [tool.model_dump(exclude_none=True) for tool in tools]
    special = {
        str(token): token_id for token_id, token in model.tokenizer.added_tokens_decoder.items() if token.special
    }
    required = shown if choice == "required" else []
    if isinstance(choice, ChatTool):
        required = [one for one in shown if one["function"]["name"] == choice.function.name]
        if not required:
            names = ", ".join(tool.function.name for tool in tools)
            raise invalid(f"tool_choice names {choice.function.name[:80]!r}, expected one of {names}", "tool_choice")
    constraint = None
    if required:
        several = parallel is not False and choice == "required"
        constraint = StructuredOutputs(grammar=grammar(written, required, parallel=several, special=special))
    markers = {token_id: text for text, token_id in special.items() if text in written.markers}
    return ToolChoice(shown, written, parallel is not False, constraint, markers)
