"""Bodies of answers, as the schema at /openapi.json states them; `shapes` writes them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Reply(BaseModel):
    """A JSON object with these keys and no others."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Reply):
    """What went wrong."""

    message: str
    type: str
    param: str | None = Field(description="The parameter at fault.")
    code: str | None


class ErrorReply(Reply):
    """Every error, and the `error` event of a stream that breaks off."""

    error: ErrorDetail


class Authorship(Reply):
    """Who wrote a completion or the tokens of a chunk; one entry for each token."""

    texts: list[str] = Field(description="The text that became certain with the token; often several, at times none.")
    token_ids: list[int]
    authors: list[int] = Field(description="Indices of author_names.")
    defer_probs: list[float]
    stood_in: list[bool] = Field(description="The base wrote it because an assistant's server could not be asked.")


class Authors(Reply):
    """The authors of a model."""

    author_names: list[str]


class UsageByAuthor(BaseModel):
    """Tokens by author's name, and the share of tokens that assistants wrote."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, int]
    deferral_rate: float


class Usage(Reply):
    """Tokens read and written."""

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
    """A token that might stand at a place of the prompt."""

    logprob: float
    rank: int = Field(description="How many tokens are at least as probable.")
    decoded_token: str


PromptLogprobs = list[dict[str, PromptToken] | None]
"""For each token of the prompt but the first, by token id: its own entry and those of the most probable."""


class CompletionChoice(Reply):
    """One completion, or what a chunk adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    prompt_logprobs: PromptLogprobs | None = None
    collm: Authorship


class CompletionReply(Reply):
    """POST /v1/completions, and each chunk of a stream (the last, of the usage, has no choices)."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    collm: Authors


class TokenLogprob(Reply):
    """A token that an author might have written; no bytes where it is no text of its own."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenLogprob(TokenLogprob):
    """The token that was written."""

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
    content: str | None = Field(description="None where there are calls alone.")
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
    """Who wrote a response."""


class InputDetails(Reply):
    """Of the tokens read."""

    cached_tokens: int


class OutputDetails(Reply):
    """Of the tokens written."""

    reasoning_tokens: int


class ResponseUsage(Reply):
    """Tokens read and written."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int
    collm: UsageByAuthor


class ResponseReply(BaseModel):
    """POST /v1/responses; it also repeats what was asked."""

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
    max_model_len: int | None = Field(description="Most tokens that every author reads; None for no limit.")
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
    """A model to ask for."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["collm"]


class ModelList(Reply):
    """GET /v1/models."""

    object: Literal["list"]
    data: list[ModelEntry]


class Point(Reply):
    """What a threshold gave on the calibration set."""

    threshold: float
    deferral_rate: float
    metric: float
    low: float
    high: float
    rate_low: float
    rate_high: float


class CalibrationInfo(Reply):
    """Thresholds that were measured, and the deferral rates that thresholds were looked for."""

    metric_name: str
    num_prompts: int
    points: list[Point]
    budgets: list[float]


class ModelInfo(Reply):
    """A collaboration."""

    id: str
    author_names: list[str]
    alone: list[str] = Field(description="Model names of its authors alone, in their order.")
    default_threshold: float | None = Field(description="None without a calibration: then say collm.threshold.")
    calibration: CalibrationInfo | None
    chat: bool = Field(description="It has a chat template.")


class Info(Reply):
    """GET /v1/collm/info."""

    object: Literal["list"]
    data: list[ModelInfo]


Candidate = Annotated[list[str | float], Field(min_length=2, max_length=2, description="A text, its probability.")]


class CandidatesReply(Reply):
    """POST /v1/collm/candidates: for each token and author its likeliest tokens with their probabilities."""

    author_names: list[str]
    candidates: list[list[list[Candidate]]]


class Status(Reply):
    """GET /health and /ready."""

    status: Literal["ok"]
