"""The served collaborations and their authors, by model name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from collm.collaboration import CoLLM
from collm.core.calibration import Calibration
from collm.core.params import SamplingParams
from collm.core.policies import Policy, SingleAuthorPolicy
from collm.core.types import BASE
from collm.engine.request import PromptIds, check_prompt
from collm.errors import CollmError, ConfigError, MissingExtra, RequestError
from collm.serving.errors import APIError, invalid, refused
from collm.serving.schemas import CollmOptions
from collm.serving.settings import Settings
from collm.serving.worker import Worker
from collm.text.chats import Chat
from collm.text.template import Prompt, tokenize

TOO_LONG = "context_length_exceeded"
"""OpenAI's code, at which clients shorten a conversation."""
MAX_TOKEN_CHARACTERS = 128
"""A prompt with more characters than that for each token that fits is refused before it is tokenized."""


@dataclass(frozen=True)
class Served:
    """A collaboration with its worker.

    Attributes:
        threshold: the default threshold; None for the calibrated one.
    """

    name: str
    model: CoLLM
    worker: Worker
    threshold: float | None = None

    @property
    def author_names(self) -> list[str]:
        """As in `CoLLM.author_names`."""
        return self.model.author_names

    @property
    def alone(self) -> list[str]:
        """The model names of its authors alone."""
        return [f"{self.name}/{author}" for author in self.author_names]

    @property
    def default_threshold(self) -> float | None:
        """The threshold of requests that have none; None if there is no default."""
        if self.threshold is not None:
            return self.threshold
        return self.model.calibration.best().threshold if self.model.calibration else None

    def info(self) -> dict[str, Any]:
        """Public information about the collaboration."""
        calibration = self.model.calibration
        return {
            "id": self.name,
            "author_names": self.author_names,
            "alone": self.alone,
            "default_threshold": self.default_threshold,
            "calibration": calibration and _measured(calibration),
            "chat": self.model.template.chat is not None,
        }


def _measured(calibration: Calibration) -> dict[str, Any]:
    found = calibration.to_dict()
    return {key: found[key] for key in ("metric_name", "num_prompts", "points", "budgets")}


@dataclass(frozen=True)
class Target:
    """A requested model: a collaboration, or one of its authors."""

    name: str
    served: Served
    author: int | None = None

    def policy(self, options: CollmOptions | None) -> Policy:
        """The policy for these options.

        Raises:
            APIError: options that contradict each other, or no default threshold.
        """
        options = options or CollmOptions.model_validate({})
        if self.author is not None:
            if options.model_fields_set:
                raise invalid(
                    f"{self.name} is one author alone, so collm has no effect; leave it out or ask {self.served.name}",
                    param="collm",
                )
            return SingleAuthorPolicy(self.author)
        threshold = options.threshold
        if threshold is None and options.budget is None and options.policy in (None, "threshold"):
            threshold = self.served.default_threshold
            if threshold is None:
                raise invalid(
                    f"there is no default threshold: {self.served.name} is not calibrated; send collm.threshold, start "
                    "the server with --threshold, or run 'collm calibrate' first",
                    "collm.threshold",
                )
        given = [name for name in ("policy", "budget", "threshold") if getattr(options, name) is not None]
        with refused(f"collm.{(given or ['threshold'])[0]}"):
            return self.served.model.policy(options.policy, threshold, options.budget)

    def encode(self, prompt: Prompt, param: str, longest: int | None, keep_last: int | None = None) -> PromptIds:
        """Encode a prompt for each model.

        Args:
            param: the parameter with the prompt.
            longest: the server's maximum number of tokens.
            keep_last: number of tokens to keep at the end, -1 for as many as fit, None for all.

        Raises:
            APIError: the prompt is empty or too long, or has an unknown token id.
        """
        model = self.served.model
        fitting = [one.max_length - 1 for one in model.runners if one.max_length is not None]
        fitting += [] if longest is None else [longest]
        if keep_last is None and fitting and _characters(prompt) > min(fitting) * MAX_TOKEN_CHARACTERS:
            raise invalid(
                f"the prompt has {_characters(prompt)} characters, this server takes {min(fitting)} tokens; shorten it",
                param=param,
                code=TOO_LONG,
            )
        with refused(param):
            token_ids = model.template.encode_prompt(model.tokenizer, prompt)
            assistants = model.assistant_prompts(prompt)
            if keep_last is not None:
                most = min([*fitting, len(token_ids)])
                token_ids = (
                    token_ids[-(most if keep_last < 0 else min(keep_last, len(token_ids))) :] if keep_last else []
                )
                assistants = model.assistant_prompts(token_ids)
        self.check(token_ids, param)
        if longest is not None and len(token_ids) > longest:
            raise invalid(
                f"the prompt has {len(token_ids)} tokens, this server takes {longest}; shorten it",
                param=param,
                code=TOO_LONG,
            )
        return PromptIds(token_ids, assistants)

    def check_params(self, params: SamplingParams, form: str) -> None:
        """Raise an APIError for parameters that this model does not support. Grammars are compiled.

        Args:
            form: the parameter with the structured output.
        """
        try:
            self.served.model.check_params(params)
        except MissingExtra as error:
            raise APIError(501, str(error), param=form, code="not_installed") from error
        except CollmError as error:
            param, _, rest = str(error).partition(" ")
            param = form if param.startswith("structured_outputs") else param
            raise invalid(f"{param} {rest}", param=param) from error

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """The token ids of a text without a template.

        Raises:
            APIError: the text is not valid Unicode.
        """
        with refused("prompt"):
            return tokenize(self.served.model.tokenizer, text, special=special)

    def render(self, chat: Chat, *, special: bool) -> list[int]:
        """The token ids of a chat.

        Raises:
            APIError: the chat template rejects the chat.
        """
        model = self.served.model
        with refused("messages"):
            text = model.template.render_chat(model.tokenizer, chat, open_turn=chat.add_generation_prompt)
        return self.tokenize(text, special=special)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, including special tokens.

        Raises:
            APIError: an unknown token id.
        """
        vocab_size = self.served.model.identity.vocab_size
        outside = [token for token in token_ids if token >= vocab_size]
        if outside:
            raise invalid(f"token id {outside[0]} is outside the vocabulary of {vocab_size} tokens", "tokens")
        return str(self.served.model.tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False))

    def text_of(self, prompt: Prompt) -> str:
        """The text of a completion's prompt."""
        if isinstance(prompt, str):
            return prompt
        ids = cast("list[int]", prompt)
        return str(
            self.served.model.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def check(self, token_ids: list[int], param: str) -> None:
        """Raise an APIError for unknown token ids, or a text that does not fit the context."""
        model = self.served.model
        authors = model.runners if model.alignment is None else model.runners[:1]
        try:
            check_prompt(authors, model.identity.vocab_size, token_ids)
        except RequestError as error:
            limits = [one.max_length for one in authors if one.max_length is not None]
            too_long = len(token_ids) >= min(limits, default=len(token_ids) + 1)
            raise invalid(str(error), param, TOO_LONG if too_long else None) from error


def _characters(prompt: Prompt) -> int:
    """Number of characters of a text, or about that of a chat; 0 for token ids."""
    if isinstance(prompt, str):
        return len(prompt)
    return sum(len(str(one.get("content") or "")) for one in prompt if isinstance(one, Mapping))


class Collaborations:
    """All collaborations of a server.

    Raises:
        ConfigError: no collaboration, or an invalid name.
    """

    def __init__(self, models: Mapping[str, CoLLM], settings: Settings) -> None:
        if not models:
            raise ConfigError("there is no collaboration to serve; give at least one")
        wrong = [name for name in models if not name or "/" in name]
        if wrong:
            raise ConfigError(f"a collaboration is named {wrong[0]!r}; expected a name without '/'")
        self.served = [
            Served(
                name,
                model,
                Worker(name, model, max_batch=settings.max_batch, max_waiting=settings.max_waiting),
                settings.threshold,
            )
            for name, model in models.items()
        ]
        self.targets = {one.name: Target(one.name, one) for one in self.served}
        for one in self.served:
            self.targets |= {name: Target(name, one, author) for author, name in enumerate(one.alone, start=BASE)}

    def target(self, name: str | None) -> Target:
        """The model with this name. Without a name, the first collaboration if all have the same tokenizer.

        Raises:
            APIError: there is no such model, or the tokenizers differ.
        """
        if name is None:
            if len({one.model.identity.hash for one in self.served}) > 1:
                raise invalid(
                    f"model is missing; this server has {', '.join(self.targets)}", "model", "missing_parameter"
                )
            name = self.served[0].name
        if name not in self.targets:
            raise APIError(
                404,
                f"there is no model {name[:80]!r}; this server has {', '.join(self.targets)}",
                param="model",
                code="model_not_found",
            )
        return self.targets[name]
