"""Request bodies. What is not listed is refused; what OpenAI has and collm lacks is listed with its no-op values."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from collm.core.params import MAX_LOGPROBS

MAX_CANDIDATES = 10
MAX_CANDIDATE_TOKENS = 4096
_INT64 = 1 << 63


class Body(BaseModel):
    """A JSON object without unknown keys, whose values are of the very types listed."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _encodable(text: str) -> str:
    """Half of a surrogate pair can be written in JSON, but is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("it holds half of a surrogate pair, which is no character") from error
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Token = Annotated[int, Field(ge=0, lt=_INT64)]
TokenIds = Annotated[list[Token], Field(min_length=1)]
NonEmpty = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[NonEmpty], Field(min_length=1)]
Zero = Annotated[float, Field(ge=0, le=0)]
Nothing = Annotated[dict[str, Any], Field(max_length=0)]
NoList = Annotated[list[Any], Field(max_length=0)]
Count = Annotated[int, Field(ge=1, lt=_INT64)]


class StreamOptions(Body):
    """What a stream has beside its chunks."""

    include_usage: bool = Field(False, description="A last chunk with the usage and no choices.")


class CollmOptions(Body):
    """Who writes. For a model like NAME, not for NAME/base."""

    threshold: Annotated[float, Field(ge=-1, le=1)] | None = Field(
        None, description="The base keeps a token while its defer prob is at most this. Default: the calibrated one."
    )
    budget: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="A deferral rate to stay within, in place of a threshold."
    )
    policy: Text | None = Field(None, description="Another rule: 'joint', 'mixture', 'contrastive:beta=0.5', ...")


class Asked(Body):
    """What completions and chats have in common."""

    model: Text = Field(description="A collaboration, or one of its authors alone: NAME/base, NAME/assistant.")
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    n: Annotated[int, Field(ge=1, le=128)] | None = Field(None, description="Completions of each prompt. Default: 1.")
    max_tokens: Count | None = Field(None, description="Most tokens of a completion. Default: 256.")
    stop: NonEmpty | Annotated[list[NonEmpty], Field(max_length=4)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="Default: 0, greedy, which the threshold was calibrated for."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="Below 1 only if temperature is not 0.")
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = Field(
        None, description="Only where something is drawn; completion i draws with seed + i."
    )
    user: Text | None = Field(None, description="Not used.")
    collm: CollmOptions | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Nothing | None = None


class CompletionRequest(Asked):
    """POST /v1/completions."""

    prompt: NonEmpty | Texts | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = Field(None, description="The text begins with the prompt. Not together with logprobs.")
    best_of: Count | None = Field(None, description="Only the value of n.")
    suffix: Literal[""] | None = None


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """One message; text parts are joined as they stand."""

    role: Literal["system", "user", "assistant"]
    content: Text | list[TextPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ResponseFormat(Body):
    """Text, the only format."""

    type: Literal["text"]


Messages = Annotated[list[Message], Field(min_length=1)]


class ChatRequest(Asked):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Count | None = Field(None, description="Another name of max_tokens.")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(None, description="Only with logprobs.")
    tools: NoList | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: NoList | None = None
    function_call: Literal["none", "auto"] | None = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    store: Literal[False] | None = None
    metadata: Nothing | None = None
    service_tier: Literal["auto", "default"] | None = None


class CandidatesRequest(Body):
    """POST /v1/collm/candidates: a prompt or messages, and the tokens that came after."""

    model: Text = Field(description="A collaboration.")
    prompt: NonEmpty | TokenIds | None = None
    messages: Messages | None = None
    token_ids: Annotated[list[Token], Field(max_length=MAX_CANDIDATE_TOKENS)]
    most: Annotated[int, Field(ge=1, le=MAX_CANDIDATES)] = Field(5, description="Candidates of each author.")
