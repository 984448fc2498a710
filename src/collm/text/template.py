"""The prompt template, which converts prompts and chats to token ids for both training and decoding."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from collm.errors import ConfigError, DataError, RequestError
from collm.text import isolated
from collm.text.chats import Chat, Message, check_unicode, tool_name

Prompt = str | Sequence[Message] | Sequence[int]

MAX_CHARACTERS = 10_000_000
"""Largest number of characters that are tokenised. Longer texts take gigabytes and exceed any context."""
RENDERING_S = 10.0
"""Time limit of rendering a chat, in seconds."""
RENDERING_BYTES = 1 << 30
"""Memory limit of rendering a chat."""
_SOME_TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}


@dataclass(frozen=True)
class Encoded:
    """Token ids of a training sequence, and whether each is a training target."""

    token_ids: list[int]
    is_target: list[bool]


@dataclass(frozen=True)
class PromptTemplate:
    """Template of prompts and chats. It is saved in the artefact, so that decoding uses the template of training.

    Attributes:
        text: template of string prompts; contains `{prompt}` once.
        chat: Jinja chat template for lists of messages; None if the collaboration does not support chats.
        tool_chat: chat template for chats with tools; None if `chat` renders them too.
        turn_ends: ids of tokens that end an assistant's turn. Training appends the first one to a turn without an
            end. Empty means the tokenizer's EOS only.

    Raises:
        ConfigError: `text` does not contain `{prompt}` exactly once.
    """

    text: str = "{prompt}"
    chat: str | None = None
    turn_ends: tuple[int, ...] = ()
    tool_chat: str | None = None

    def __post_init__(self) -> None:
        if self.text.count("{prompt}") != 1:
            raise ConfigError(
                f"prompt template is {self.text!r}, expected a text that contains {{prompt}} exactly once"
            )

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, text: str = "{prompt}") -> PromptTemplate:
        """A template with a tokenizer's chat template. Of several named ones, `default` and `tool_use` are used."""
        found = tokenizer.chat_template
        named = found if isinstance(found, Mapping) else {"default": found}
        return cls(text, named.get("default"), tool_chat=named.get("tool_use"))

    def chat_for(self, tools: Sequence[object] | None) -> str | None:
        """The template of chats with these tools; None if there is none."""
        return self.tool_chat if tools and self.tool_chat is not None else self.chat

    def with_turn_ends(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]) -> PromptTemplate:
        """This template with `turn_ends` set, determined by rendering a turn.

        The end of a turn is a token of `stop_ids` after the content, else a special token that the template writes
        there, else the special tokens that open the next message, else EOS.

        Args:
            stop_ids: tokens at which decoding stops in any case: EOS of the tokenizer and of the base.

        Raises:
            DataError: no token ends a turn, and the tokenizer has no EOS.
        """
        kinds = [None] if self.tool_chat is None else [None, [_SOME_TOOL]]
        found = [end for tools in kinds for end in self._closing_tokens(tokenizer, stop_ids, tools)]
        ends = found or _eos_ids(tokenizer)
        if not ends:
            raise DataError(
                "no token ends an assistant's turn, so decoding would not stop: the chat template writes no special "
                "token after the content or before the next message, and the tokenizer has no EOS; set eos_token"
            )
        return replace(self, turn_ends=tuple(dict.fromkeys([*ends, *sorted(stop_ids)])))

    def _closing_tokens(
        self, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int], tools: Sequence[Mapping[str, Any]] | None
    ) -> list[int]:
        turn = Chat([{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}], tools)
        try:
            closed = self._turn(tokenizer, turn, 1)[1]
        except (DataError, RequestError):
            return []  # the template does not support this chat; training rows will raise the error
        closing = tokenize(tokenizer, closed.rpartition("answer")[2], special=False)
        special = special_ids(tokenizer)
        for wanted in (stop_ids, special):
            found = [token for token in closing if token in wanted]
            if found:
                return found[:1]
        openers: list[int] = []
        for role in ("user", "tool", "system"):
            with suppress(RequestError):
                longer = Chat([*turn, {"role": role, "content": "next"}], tools)
                whole = self.render_chat(tokenizer, longer, open_turn=False)
                if whole.startswith(closed):
                    openers += tokenize(tokenizer, whole[len(closed) :], special=False)[:1]
        return [token for token in dict.fromkeys(openers) if token in special]

    def encode_prompt(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
        """Convert a string, a chat or token ids, which pass unchanged, to the token ids of a prompt.

        Raises:
            RequestError: the prompt is empty or of another type, or there is no chat template for messages.
        """
        if isinstance(prompt, str):
            token_ids = tokenize(tokenizer, self.text.replace("{prompt}", prompt)) if prompt else []
        elif _is_list_of(prompt, int):
            token_ids = list(cast(Sequence[int], prompt))
        elif _is_list_of(prompt, Mapping):
            chat = Chat.of(cast(Sequence[Message], prompt))
            rendered = self.render_chat(tokenizer, chat, open_turn=chat.add_generation_prompt)
            token_ids = tokenize(tokenizer, rendered, special=False)
        else:
            raise RequestError(f"prompt is {prompt!r:.80}, expected a string, a list of messages or token ids")
        if not token_ids:
            raise RequestError("the prompt is empty; expected at least one token")
        return token_ids

    def encode_completion(self, tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> Encoded:
        """Encode a prompt as in `encode_prompt`, and its completion and EOS, which are targets.

        Raises:
            DataError: the tokenizer has no EOS token.
            RequestError: the prompt is empty.
        """
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no EOS token to end a completion; set tokenizer.eos_token")
        prompt_ids = self.encode_prompt(tokenizer, prompt)
        whole = tokenize(tokenizer, self.text.replace("{prompt}", prompt) + completion)
        encoded = _append_completion(tokenizer, prompt_ids, whole, completion)
        if encoded.is_target[-1] and encoded.token_ids[-1] == tokenizer.eos_token_id:
            return encoded
        return Encoded([*encoded.token_ids, *_eos_ids(tokenizer)], [*encoded.is_target, True])

    def encode_chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: Sequence[Message],
        *,
        unlearned: Collection[int] = (),
        apart: bool = False,
    ) -> list[Encoded]:
        """Encode a chat. Every assistant turn is a target, including the token that ends it (`turn_ends`).

        The tokens before a turn equal those of `encode_prompt` on the messages before it. If a template or tokenizer
        renders earlier turns differently once the chat continues, each turn gets a sequence of its own, else all share
        one.

        Args:
            messages: a `Chat` if it has tools.
            unlearned: indices of messages that are not targets.
            apart: return one sequence per assistant turn in any case.

        Raises:
            DataError: there is no assistant turn or no token to end one, a rendered turn does not start with its
                prompt, or the template does not show tools or calls.
            RequestError: there is no chat template, or it rejects the messages.
        """
        turns = [
            self._turn(tokenizer, messages, index)
            for index, message in enumerate(messages)
            if message["role"] == "assistant" and index not in unlearned
        ]
        if not turns:
            raise DataError("the chat has no assistant turn; expected at least one message with role 'assistant'")
        ends = self.turn_ends or self.with_turn_ends(tokenizer, _eos_ids(tokenizer)).turn_ends
        joined = None if apart else _join_turns(tokenizer, turns)
        ended = None if joined is None else _limit_targets(joined, ends)
        if ended is not None:
            return [ended]
        alone = []
        for opened, closed in turns:
            opened_ids, closed_ids = (tokenize(tokenizer, text, special=False) for text in (opened, closed))
            turn = _append_completion(tokenizer, opened_ids, closed_ids, closed[len(opened) :])
            alone.append(cast(Encoded, _limit_targets(turn, ends)))
        return alone

    def _turn(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], index: int) -> tuple[str, str]:
        """The text of the prompt for assistant message `index`, and the text that includes the message."""
        tools = Chat.of(messages).tools
        opened = self.render_chat(tokenizer, Chat(messages[:index], tools), open_turn=True)
        closed = self.render_chat(tokenizer, Chat(messages[: index + 1], tools), open_turn=False)
        if not closed.startswith(opened):
            raise DataError(
                f"the chat template opens the turn of message {index + 1} with {opened[-40:]!r}, but renders the "
                f"finished turn as {closed[-80:]!r}; training needs a template in which it continues the opening"
            )
        for shown, functions in ((opened, tools), (closed, messages[index].get("tool_calls"))):
            missing = [name for name in map(tool_name, functions or ()) if name and name not in shown]
            if missing:
                raise DataError(
                    f"the chat template does not show the function {missing[0]!r}; use a template (chat_template) that "
                    "supports tools and calls"
                )
        return opened, closed

    def render_chat(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, open_turn: bool) -> str:
        """Render a chat with its tools. `open_turn` adds the generation prompt.

        The role "developer" becomes "system" if the template does not support it. Raises as `encode_prompt`.
        """
        chat = Chat.of(messages)
        template = self.chat_for(chat.tools)
        if template is None:
            raise RequestError("the prompt is a list of messages, but there is no chat template; pass a string")
        if not messages:
            raise RequestError("the chat template has no messages to render; expected at least one")
        known = [{key: value for key, value in message.items() if value is not None} for message in messages]
        for fields in known:
            if fields.get("role") == "developer" and "developer" not in template:
                fields["role"] = "system"
        arguments = {
            **tokenizer.special_tokens_map,
            **chat.template_kwargs,
            "conversations": [known],
            "tools": chat.tools,
            "chat_template": template,
            "add_generation_prompt": open_turn,
            "continue_final_message": chat.continue_final_message and not open_turn,
        }
        try:
            return str(isolated.run("render", arguments, seconds=RENDERING_S, memory_bytes=RENDERING_BYTES))
        except (ValueError, TypeError, RecursionError) as error:
            raise RequestError(
                f"the chat template rejects the messages {json.dumps(messages, default=str)[:120]}: {error}"
            ) from error


def _is_list_of(prompt: object, kind: type) -> bool:
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str | bytes | bytearray)
        and all(isinstance(part, kind) for part in prompt)
    )


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    """Tokenise a text. `special` adds BOS once, and never EOS.

    Raises:
        RequestError: the text is not valid Unicode or is too long, or the tokenizer fails.
    """
    check_unicode(text, "the text cannot be read")
    if len(text) > MAX_CHARACTERS:
        raise RequestError(f"the text has {len(text)} characters, expected at most {MAX_CHARACTERS}; shorten it")
    try:
        # verbose=False: lengths are checked against the models, not against the tokenizer's limit
        token_ids = cast("list[int]", tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a Rust panic, which is not an Exception
            raise
        raise RequestError(f"the tokenizer fails on the text {text!r:.60}: {error!s:.200}") from error
    bos = tokenizer.bos_token_id
    if special and bos is not None and token_ids[:2] == [bos, bos] and text.startswith(str(tokenizer.bos_token)):
        token_ids = token_ids[1:]  # a rendered chat already has BOS
    if not special or len(token_ids) < 2 or token_ids[-1] != tokenizer.eos_token_id:
        return token_ids
    own = text.endswith(str(tokenizer.eos_token)) and token_ids[-2] != token_ids[-1]
    return token_ids if own else token_ids[:-1]  # some tokenizers append EOS, but a prompt continues


def _append_completion(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], whole_ids: list[int], completion: str
) -> Encoded:
    """Append the completion's tokens as targets, taken from the whole text if its tokens start with the prompt's."""
    if whole_ids[: len(prompt_ids)] == prompt_ids:
        target_ids = whole_ids[len(prompt_ids) :]
    else:  # a token would span prompt and completion, but decoding always starts after the prompt's own tokens
        target_ids = continuation_ids(tokenizer, completion)
    return Encoded([*prompt_ids, *target_ids], [False] * len(prompt_ids) + [True] * len(target_ids))


def continuation_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenise a text that continues another, without the space that some tokenizers add before the first word."""
    for end in ("\n", "."):
        before, whole = (tokenize(tokenizer, part, special=False) for part in (end, end + text))
        if whole[: len(before)] == before:
            return whole[len(before) :]
    return tokenize(tokenizer, text, special=False)


def _join_turns(tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]]) -> Encoded | None:
    """Encode all turns in one sequence; None unless each turn's text and tokens start with those of the previous."""
    whole = tokenize(tokenizer, turns[-1][1], special=False)
    is_target: list[bool] = []
    done = ""
    for opened, closed in turns:
        if not opened.startswith(done):
            return None
        for text, target in ((opened, False), (closed, True)):
            token_ids = tokenize(tokenizer, text, special=False)
            if whole[: len(token_ids)] != token_ids:
                return None
            is_target += [target] * (len(token_ids) - len(is_target))
        done = closed
    return Encoded(whole, is_target)


def _limit_targets(encoded: Encoded, ends: Sequence[int]) -> Encoded | None:
    """Limit targets to the token that ends each turn, because decoding stops there.

    If a turn contains no such token, the token after it becomes a target, or is appended at the end of the sequence.
    Returns None if the token after it ends no turn.
    """
    learned: list[bool] = []
    is_open = False
    for place, (token, target) in enumerate(zip(encoded.token_ids, encoded.is_target, strict=True)):
        is_open = is_open or (target and not (place and encoded.is_target[place - 1]))
        if is_open and not target and token not in ends:
            return None
        learned.append(is_open)
        is_open = is_open and token not in ends
    return Encoded([*encoded.token_ids, *ends[:is_open]], [*learned, *[True] * is_open])


def _eos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [cast(int, tokenizer.eos_token_id)]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Token ids that stand for no text."""
    added = cast("dict[int, Any]", tokenizer.added_tokens_decoder)
    return {*cast("list[int]", tokenizer.all_special_ids), *(one for one, token in added.items() if token.special)}
