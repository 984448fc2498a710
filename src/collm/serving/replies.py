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
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(Reply):
    """One completion, or what a chunk adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
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


class ChatAnswer(Reply):
    """A message of the model."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(Reply):
    """One answer."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    collm: Authorship


class ChatReply(Reply):
    """POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    collm: Authors


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
