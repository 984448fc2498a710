"""Response bodies, for the schema at /openapi.json. `shapes` writes them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Reply(BaseModel):
    """A JSON object with only these keys."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Reply):
    """What went wrong."""

    message: str
    type: str
    param: str | None = Field(description="The invalid parameter.")
    code: str | None


class ErrorReply(Reply):
    """An error response, or the `error` event of an interrupted stream."""

    error: ErrorDetail


class Authorship(Reply):
    """The authors of a completion or a chunk. Each list has one entry per token."""

    texts: list[str] = Field(
        description="The new text with each token. It can be empty, or the text of several tokens."
    )
    token_ids: list[int]
    authors: list[int] = Field(description="Indices into author_names.")
    defer_probs: list[float]
    stood_in: list[bool] = Field(description="The base wrote the token because an assistant's server did not respond.")


class Authors(Reply):
    """The authors of a model."""

    author_names: list[str]


class UsageByAuthor(BaseModel):
    """Number of tokens of each author, and the share of tokens that assistants wrote."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, int]
    deferral_rate: float


class Usage(Reply):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    collm: UsageByAuthor


class CompletionLogprobs(Reply):
    """One entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="None for the first token of a prompt.")
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class PromptToken(Reply):
    """A token at a position of the prompt."""

    logprob: float
    rank: int = Field(description="Number of tokens that are at least as probable.")
    decoded_token: str


PromptLogprobs = list[dict[str, PromptToken] | None]
"""For each token of the prompt, by token id: its own entry and the most probable tokens. None for the first token."""


class CompletionChoice(Reply):
    """A completion, or a part of it in a chunk."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    prompt_logprobs: PromptLogprobs | None = None
    collm: Authorship


class CompletionReply(Reply):
    """POST /v1/completions, and each chunk of a stream. The last chunk with the usage has no choices."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    collm: Authors


class TokenLogprob(Reply):
    """A token with its log-probability. bytes is None if the token has no text of its own."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenLogprob(TokenLogprob):
    """A generated token, with the most probable tokens in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Reply):
    """One entry for each token."""

    content: list[ChosenLogprob]
    refusal: None = None


class CalledFunction(Reply):
    """A function with its arguments, as JSON text."""

    name: str
    arguments: str


class ToolCall(Reply):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatAnswer(Reply):
    """A message of the model."""

    role: Literal["assistant"]
    content: str | None = Field(description="None if there are only tool calls.")
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Reply):
    """One answer."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    collm: Authorship


class ChatReply(Reply):
    """POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    collm: Authors


class OutputText(Reply):
    """Text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: list[dict[str, str]]
    logprobs: list[ChosenLogprob]


class OutputMessage(Reply):
    """A message of a response."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["completed", "incomplete"]
    content: list[OutputText]


class OutputCall(Reply):
    """A call of a function in a response; arguments are JSON text."""

    id: str
    type: Literal["function_call"]
    status: Literal["completed", "incomplete"]
    call_id: str
    name: str
    arguments: str


class ResponseAuthorship(Authorship, Authors):
    """The authors of a response."""


class InputDetails(Reply):
    """Details of the input tokens."""

    cached_tokens: int


class OutputDetails(Reply):
    """Details of the output tokens."""

    reasoning_tokens: int


class ResponseUsage(Reply):
    """Numbers of tokens."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int
    collm: UsageByAuthor


class ResponseReply(BaseModel):
    """POST /v1/responses. It also has the parameters of the request."""

    model_config = ConfigDict(extra="allow")
    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["completed", "incomplete"]
    output: list[OutputMessage | OutputCall]
    usage: ResponseUsage
    collm: ResponseAuthorship


class TokenizeReply(Reply):
    """POST /tokenize."""

    count: int
    max_model_len: int | None = Field(description="The shortest context of all authors; None for no limit.")
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeReply(Reply):
    """POST /detokenize."""

    prompt: str


class TokenizerInfo(Reply):
    """GET /tokenizer_info."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None


class Version(Reply):
    """GET /version."""

    version: str


class ModelEntry(Reply):
    """An available model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["collm"]


class ModelList(Reply):
    """GET /v1/models."""

    object: Literal["list"]
    data: list[ModelEntry]


class Point(Reply):
    """A threshold measured on the calibration set."""

    threshold: float
    deferral_rate: float
    metric: float
    low: float
    high: float
    rate_low: float
    rate_high: float


class CalibrationInfo(Reply):
    """The measured thresholds, and the budgets of the calibration."""

    metric_name: str
    num_prompts: int
    points: list[Point]
    budgets: list[float]


class ModelInfo(Reply):
    """A collaboration."""

    id: str
    author_names: list[str]
    alone: list[str] = Field(description="Model names of the authors alone.")
    default_threshold: float | None = Field(
        description="None without a calibration. Requests then need collm.threshold."
    )
    calibration: CalibrationInfo | None
    chat: bool = Field(description="Whether the collaboration has a chat template.")


class Info(Reply):
    """GET /v1/collm/info."""

    object: Literal["list"]
    data: list[ModelInfo]


Candidate = Annotated[list[str | float], Field(min_length=2, max_length=2, description="Text and probability.")]


class CandidatesReply(Reply):
    """POST /v1/collm/candidates: the most probable tokens of each author at each token."""

    author_names: list[str]
    candidates: list[list[list[Candidate]]]


class Status(Reply):
    """GET /health and /ready."""

    status: Literal["ok"]
