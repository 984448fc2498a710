"""Request bodies of OpenAI's API and of vLLM.

Fields are supported, ignored because they do not change the text, or unsupported: then they only accept the value
without an effect (`WHY_NOT` has the reasons). Every list has a maximum length, and validation stops at its first
invalid item. Texts are as long as the body may be.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from collm.core.params import MAX_LOGPROBS

MAX_CANDIDATES = 10
MAX_CANDIDATE_TOKENS = 4096
MAX_ITEMS = 4096
"""Largest number of items of a list, but for tokens."""
MAX_TOKENS = 1 << 20
"""Largest number of tokens of a list."""
_INT64 = 1 << 63


def _few_keys(value: Any) -> Any:
    """Reject an object with many keys before each of them is validated."""
    if isinstance(value, dict) and len(value) > MAX_ITEMS:
        raise ValueError(f"it has {len(value)} keys, expected at most {MAX_ITEMS}")
    return value


class JsonObject(BaseModel):
    """A JSON object of OpenAI's API, without type conversion. It keeps unknown keys."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    _limit_keys = model_validator(mode="before")(_few_keys)


def _encodable(text: str) -> str:
    """Reject half of a surrogate pair, which JSON can contain."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("it contains half of a surrogate pair, which is not a character") from error
    return text


T = TypeVar("T")
Text = Annotated[str, AfterValidator(_encodable)]
NonEmpty = Annotated[str, Field(min_length=1), AfterValidator(_encodable)]
Some = Annotated[list[T], Field(max_length=MAX_ITEMS, fail_fast=True)]
AtLeastOne = Annotated[list[T], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
Natural = Annotated[int, Field(ge=0, lt=_INT64)]
Tokens = Annotated[list[Natural], Field(max_length=MAX_TOKENS, fail_fast=True)]
TokenIds = Annotated[Tokens, Field(min_length=1)]
Count = Annotated[int, Field(ge=1, lt=_INT64)]
Phrase = Annotated[NonEmpty, Field(max_length=256)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Share = Annotated[float, Field(ge=0, le=1)]
Most = Annotated[int, Field(ge=-1, lt=_INT64)]
"""A number, or -1 for all."""
Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Object = Annotated[dict[str, Any], BeforeValidator(_few_keys)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,18}$")]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]

WHY_NOT = {
    "audio": "models write text alone",
    "modalities": "models write text alone",
    "best_of": "completions are not compared; ask for n of them",
    "suffix": "models continue a text and do not fill in",
    "functions": "use tools, which replaced them",
    "function_call": "use tool_choice, which replaced it",
    "web_search_options": "there is no web search",
    "use_beam_search": "beam search is not supported",
    "length_penalty": "it belongs to beam search, which is not supported",
    "documents": "put them into the messages",
    "chat_template": "the collaboration's own template renders chats, as in training",
    "skip_special_tokens": "special tokens have no text; collm.token_ids has them",
    "echo": "the answer only has the assistant's message",
    "background": "answers are not kept; stream instead",
    "previous_response_id": "answers are not kept; send the whole conversation in input",
    "conversation": "conversations are not kept; send the whole of it in input",
    "prompt": "there are no stored prompts; send instructions and input",
    "truncation": "a prompt that does not fit is refused; shorten it",
}


class StreamOptions(JsonObject):
    """Options of a stream."""

    include_usage: bool | None = Field(None, description="A last chunk with the usage and no choices.")
    include_obfuscation: bool | None = Field(None, description="Not used.")
    continuous_usage_stats: bool | None = Field(None, description="Every chunk has the usage so far.")


class CollmOptions(JsonObject, extra="forbid"):
    """Options of a collaboration. They have no effect on a single author such as NAME/base."""

    threshold: Annotated[float, Field(ge=-1, le=1)] | None = Field(
        None, description="The base keeps a token while its defer prob is at most this. Default: the calibrated one."
    )
    budget: Share | None = Field(
        None, description="Use the best threshold whose deferral rate is within this limit with 95 %."
    )
    price: float | Annotated[list[float], Field(min_length=1, max_length=MAX_ITEMS)] | None = Field(
        None, description="Defer where the head predicts a gain above this, in nats: one, or one for each assistant."
    )
    policy: Text | None = Field(None, description="Another policy: 'joint', 'mixture', 'contrastive:beta=0.5', ...")
    judge: Text | None = Field(
        None, description="Which tokens of the base stand: 'exact', 'blend:weight=0.5', 'joint', 'regret:nats=2'."
    )


class ResponseFormat(JsonObject):
    """The format of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Object | None = Field(None, description="An object with a `schema`.")
    schema_: Object | None = Field(None, alias="schema", description="Another place for the schema.")


class StructuredForm(JsonObject, extra="forbid"):
    """vLLM's structured outputs. Exactly one field must be given."""

    json_: Object | Text | bool | None = Field(None, alias="json", description="A JSON schema.")
    json_object: bool | None = None
    regex: NonEmpty | None = None
    choice: AtLeastOne[NonEmpty] | None = None
    grammar: NonEmpty | None = Field(None, description="In llguidance's Lark syntax, or in GBNF.")


class Sampled(JsonObject):
    """Fields of every request that generates text."""

    model: Text = Field(description="A collaboration, or one of its authors alone: NAME/base, NAME/assistant.")
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="0 is greedy. Default: 1 with n, top_p, top_k or min_p, otherwise 0."
    )
    top_p: Share | None = Field(None, description="0 keeps the most probable token.")
    top_k: Most | None = Field(None, description="-1 and 0 keep all.")
    min_p: Share | None = None
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = Field(None, description="Completion i has seed + i.")
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: Annotated[dict[TokenKey, Bias], BeforeValidator(_few_keys)] | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: Annotated[list[Phrase], Field(max_length=1000, fail_fast=True)] | None = None
    min_tokens: Natural | None = None
    stop_token_ids: Some[Natural] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    truncate_prompt_tokens: Most | None = Field(None, description="Tokens to keep at the end, -1 for as many as fit.")
    structured_outputs: StructuredForm | None = None
    collm: CollmOptions | None = None
    user: Text | None = Field(None, description="Ignored, like all following fields.")
    metadata: Object | None = None
    store: bool | None = None
    service_tier: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    prompt_cache_retention: Text | None = None
    prompt_cache_options: Object | None = None
    priority: int | None = None
    request_id: Text | None = None
    cache_salt: Text | None = None
    spaces_between_special_tokens: bool | None = None
    return_tokens_as_token_ids: bool | None = Field(None, description="Log-probabilities name tokens as token_id:ID.")
    skip_special_tokens: Literal[True] | None = None
    use_beam_search: Literal[False] | None = None
    length_penalty: Annotated[float, Field(ge=1, le=1)] | None = None


class TextRequest(Sampled):
    """Fields of completions and chats."""

    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    n: Annotated[int, Field(ge=1, le=128)] | None = Field(None, description="Completions of each prompt. Default: 1.")
    stop: Phrase | Annotated[list[Phrase], Field(max_length=64, fail_fast=True)] | None = None
    prompt_logprobs: Logprobs | None = Field(
        None, description="Number of most probable tokens to list for each token of the prompt."
    )
    response_format: ResponseFormat | None = None


class CompletionRequest(TextRequest):
    """POST /v1/completions."""

    prompt: NonEmpty | AtLeastOne[NonEmpty] | TokenIds | AtLeastOne[TokenIds]
    max_tokens: Natural | None = Field(None, description="It can be 0 with echo or prompt_logprobs. Default: 256.")
    logprobs: Logprobs | None = Field(None, description="With echo, also for the prompt under the joint model.")
    echo: bool | None = Field(None, description="The text begins with the prompt.")
    best_of: Count | None = Field(None, description="Must be equal to n.")
    suffix: Literal[""] | None = None
    add_special_tokens: Literal[True] | None = None


class ChatMessage(JsonObject):
    """A message. Its text parts are joined. Further keys go to the chat template."""

    role: NonEmpty
    content: Text | Some[Object] | None = None
    name: Text | None = None
    tool_calls: Some[Object] | None = None
    tool_call_id: Text | None = None


class FunctionDefinition(JsonObject):
    """A function that can be called."""

    name: FunctionName
    description: Text | None = None
    parameters: Object | None = Field(None, description="A JSON schema of its arguments.")
    strict: bool | None = None


class ChatTool(JsonObject):
    """A tool. Functions are the only kind."""

    type: Literal["function"]
    function: FunctionDefinition


class ChatOptions(JsonObject):
    """What the chat template shows besides the messages."""

    tools: Some[ChatTool] | None = None
    add_generation_prompt: bool | None = Field(None, description="Begin an assistant turn. Default: true.")
    continue_final_message: bool | None = Field(None, description="Continue the last message.")
    chat_template_kwargs: Object | None = Field(None, description="Variables of the chat template.")
    chat_template: None = None


class ChatRequest(ChatOptions, TextRequest):
    """POST /v1/chat/completions."""

    messages: AtLeastOne[ChatMessage]
    max_tokens: Count | None = Field(None, description="Maximum number of tokens of an answer. Default: 256.")
    max_completion_tokens: Count | None = Field(None, description="Maximum number of tokens. It overrides max_tokens.")
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = Field(None, description="With logprobs.")
    tool_choice: Literal["none", "auto", "required"] | ChatTool | None = Field(None, description="Default: auto.")
    parallel_tool_calls: bool | None = Field(None, description="Allow several calls. Default: true.")
    reasoning_effort: Text | None = Field(None, description="Ignored, like all following fields.")
    verbosity: Text | None = None
    prediction: Object | None = None
    include_reasoning: bool | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    audio: None = None
    web_search_options: None = None
    documents: Annotated[list[Any], Field(max_length=0)] | None = None
    echo: Literal[False] | None = None
    add_special_tokens: Literal[False] | None = None


class FlatTool(JsonObject):
    """A tool of /v1/responses."""

    type: Literal["function"]
    name: FunctionName
    description: Text | None = None
    parameters: Object | None = None
    strict: bool | None = None


class TextOptions(JsonObject):
    """Text options of /v1/responses."""

    format: ResponseFormat | None = None
    verbosity: Text | None = None


class ResponsesRequest(Sampled):
    """POST /v1/responses."""

    input: NonEmpty | AtLeastOne[Object] = Field(description="Text, or messages, function calls and their results.")
    instructions: Text | None = Field(None, description="A system message before the input.")
    max_output_tokens: Count | None = Field(None, description="Maximum number of tokens of the answer. Default: 256.")
    tools: Some[FlatTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    top_logprobs: Logprobs | None = Field(None, description="With include message.output_text.logprobs.")
    include: Some[Text] | None = Field(None, description="Supported: message.output_text.logprobs.")
    stream_options: StreamOptions | None = None
    reasoning: Object | None = Field(None, description="Ignored, like max_tool_calls.")
    max_tool_calls: int | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    conversation: None = None
    prompt: None = None


class TokenizeRequest(ChatOptions):
    """POST /tokenize: a prompt, or messages."""

    model: Text | None = Field(None, description="Optional if all collaborations have the same tokenizer.")
    prompt: Text | None = None
    messages: AtLeastOne[ChatMessage] | None = None
    add_special_tokens: bool | None = Field(None, description="Default: true for a prompt, false for messages.")
    return_token_strs: bool | None = None


class DetokenizeRequest(JsonObject):
    """POST /detokenize."""

    model: Text | None = Field(None, description="Optional if all collaborations have the same tokenizer.")
    tokens: Tokens


class CandidatesRequest(JsonObject, extra="forbid"):
    """POST /v1/collm/candidates: a prompt or messages, and the tokens of the answer."""

    model: Text = Field(description="A collaboration.")
    prompt: NonEmpty | TokenIds | None = None
    messages: AtLeastOne[ChatMessage] | None = None
    token_ids: Annotated[list[Natural], Field(max_length=MAX_CANDIDATE_TOKENS, fail_fast=True)]
    most: Annotated[int, Field(ge=1, le=MAX_CANDIDATES)] = Field(5, description="Number of candidates of each author.")
