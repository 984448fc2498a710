"""The prompt template: how a prompt or a chat becomes token ids, the same in training and in decoding."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from collm.errors import ConfigError, DataError, RequestError

Message = Mapping[str, str]
Prompt = str | Sequence[Message] | Sequence[int]


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt with its targets.

    Attributes:
        token_ids: the whole sequence.
        is_target: per token, whether it is to be learned.
    """

    token_ids: list[int]
    is_target: list[bool]


@dataclass(frozen=True)
class PromptTemplate:
    """Kept in the artefact, so that decoding renders prompts exactly as training did.

    Attributes:
        text: wraps string prompts; contains `{prompt}` once.
        chat: Jinja chat template for lists of messages; None where the collaboration takes no chats.

    Raises:
        ConfigError: `text` does not contain `{prompt}` exactly once.
    """

    text: str = "{prompt}"
    chat: str | None = None

    def __post_init__(self) -> None:
        if self.text.count("{prompt}") != 1:
            raise ConfigError(f"prompt template is {self.text!r}, expected text that contains {{prompt}} exactly once")

    def encode_prompt(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
        """Token ids to decode from; ids pass unchanged, strings and chats are rendered.

        Raises:
            RequestError: an empty prompt, messages without a chat template, or something else than a prompt.
        """
        if isinstance(prompt, str):
            token_ids = _tokenize(tokenizer, self.text.replace("{prompt}", prompt)) if prompt else []
        elif all(isinstance(part, int) for part in prompt):
            token_ids = list(cast(Sequence[int], prompt))
        elif all(isinstance(part, Mapping) for part in prompt):
            rendered = self.render_chat(tokenizer, cast(Sequence[Message], prompt), open_turn=True)
            token_ids = _tokenize(tokenizer, rendered, special=False)
        else:
            raise RequestError(f"a prompt is a string, a list of messages or a list of token ids, came {prompt!r:.80}")
        if not token_ids:
            raise RequestError("the prompt is empty; expected at least one token")
        return token_ids

    def encode_completion(self, tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> Encoded:
        """A prompt and its completion, which ends with EOS; only the completion is a target.

        Raises:
            DataError: the tokenizer has no EOS token.
        """
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no EOS token, so a completion cannot end; set tokenizer.eos_token")
        segments = [(self.text.replace("{prompt}", prompt), False), (completion, True)]
        encoded = _encode_segments(tokenizer, segments, special=True)
        eos = int(cast(int, tokenizer.eos_token_id))
        return Encoded([*encoded.token_ids, eos], [*encoded.is_target, True])

    def encode_chat(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Encoded:
        """A chat; every assistant turn is a target, up to the token that ends it.

        Raises:
            DataError: no assistant turn, or a template that rewrites earlier turns when the chat goes on.
        """
        segments: list[tuple[str, bool]] = []
        done = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            opened = self.render_chat(tokenizer, messages[:index], open_turn=True)
            closed = self.render_chat(tokenizer, messages[: index + 1], open_turn=False)
            if not (opened.startswith(done) and closed.startswith(opened)):
                raise DataError(
                    f"the chat template renders the turns before message {index + 1} differently once the chat goes on, "
                    "so one sequence cannot train all turns; give one row per assistant turn"
                )
            segments += [(opened[len(done) :], False), (closed[len(opened) :], True)]
            done = closed
        if not segments:
            raise DataError("the chat has no assistant turn; expected at least one message with role 'assistant'")
        encoded = _encode_segments(tokenizer, segments, special=False)
        return Encoded(encoded.token_ids, _up_to_eos(encoded, tokenizer))

    def render_chat(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, open_turn: bool) -> str:
        """The text of a chat; `open_turn` adds what invites the assistant's answer.

        Raises:
            RequestError: there is no chat template, or it refuses the messages.
        """
        if self.chat is None:
            raise RequestError("chat messages came, but this collaboration has no chat template; pass a string")
        try:
            rendered = tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self.chat,
                tokenize=False,
                add_generation_prompt=open_turn,
            )
        except (TemplateError, KeyError, TypeError, ValueError) as error:
            raise RequestError(
                f"the chat template refuses the messages {json.dumps(messages)[:120]}: {error}"
            ) from error
        return cast(str, rendered)


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    token_ids = cast("list[int]", tokenizer(text, add_special_tokens=special)["input_ids"])
    if (
        special
        and len(token_ids) > 1
        and token_ids[-1] == tokenizer.eos_token_id
        and not text.endswith(_eos(tokenizer))
    ):
        return token_ids[:-1]  # some tokenizers close every text, but a prompt goes on
    return token_ids


def _eos(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.eos_token)


def _encode_segments(
    tokenizer: PreTrainedTokenizerBase, segments: Sequence[tuple[str, bool]], *, special: bool
) -> Encoded:
    """Tokenise the joined text if every prefix that ends at a border is then a prefix of the tokens, as decoding
    would see it; else tokenise segment by segment."""
    whole = _tokenize(tokenizer, "".join(text for text, _ in segments), special=special)
    is_target: list[bool] = []
    prefix = ""
    for text, target in segments:
        prefix += text
        tokens = _tokenize(tokenizer, prefix, special=special)
        if whole[: len(tokens)] != tokens:
            return _encode_apart(tokenizer, segments, special=special)
        is_target += [target] * (len(tokens) - len(is_target))
    return Encoded(whole, is_target)


def _encode_apart(
    tokenizer: PreTrainedTokenizerBase, segments: Sequence[tuple[str, bool]], *, special: bool
) -> Encoded:
    encoded = Encoded([], [])
    for index, (text, target) in enumerate(segments):
        tokens = _tokenize(tokenizer, text, special=special and index == 0)
        encoded.token_ids.extend(tokens)
        encoded.is_target.extend([target] * len(tokens))
    return encoded


def _up_to_eos(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[bool]:
    """Drop what a template writes after a turn's EOS from the targets: decoding has stopped there."""
    kept, ended = [], False
    for token, target in zip(encoded.token_ids, encoded.is_target, strict=True):
        kept.append(target and not ended)
        ended = target and (ended or token == tokenizer.eos_token_id)
    return kept
